"""Distillation for object detectors: the client of the service, and the engine that trains and loads detectors.

`Client` talks to a service over HTTP. `load` reads a downloaded student; it needs torch
(`pip install "defeat-service[engine]"`). Both are imported when they are first used, so that `import defeat` costs
nothing.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from defeat.client.client import Client
    from defeat.client.errors import (
        ApiError,
        ClientError,
        ConnectionFailed,
        DigestMismatch,
        InvalidInput,
        WaitTimeout,
    )
    from defeat.engine.detectors import Detector

__all__ = [
    "ApiError",
    "Client",
    "ClientError",
    "ConnectionFailed",
    "DigestMismatch",
    "InvalidInput",
    "WaitTimeout",
    "load",
]


def load(path: str | Path, *, device: str = "cpu") -> "Detector":
    """Rebuild a downloaded student, or another checkpoint of the service, in eval mode.

    Args:
        path: the safetensors file.
        device: where its weights go, as torch names devices: `cpu`, `cuda`, `cuda:1`.

    Its `detect` takes a list of images (3, height, width), float in [0, 1], and returns for each `boxes`
    (n, 4; x1 y1 x2 y2 in the image's pixels), `labels` (n; 1 is the first of `classes`) and `scores` (n; 0 to 1).

    Raises:
        ImportError: torch, or another package that the engine needs, is not installed.
        OSError: the file cannot be read.
        defeat.engine.report.RunError: the file is not a checkpoint of ours, or is damaged.
    """
    try:
        from defeat.engine import detectors
    except ModuleNotFoundError as error:
        raise ImportError(
            f'defeat.load needs {error.name}, which is not installed: pip install "defeat-service[engine]"'
        ) from error
    return detectors.load(path, device=device)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module("defeat.client.client" if name == "Client" else "defeat.client.errors")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
