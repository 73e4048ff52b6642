"""The registry of detector families, and how a detector is built, saved and loaded.

A family is one file, which describes it in `FAMILY`, and its name in the loop below. One from outside this package
calls `register`, see `defeat.engine.plugins`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from defeat.engine import plugins
from defeat.engine.detectors import (
    faster_rcnn,
    faster_rcnn_mobilenet,
    fcos,
    mask_rcnn,
    retinanet,
    ssd,
    ssdlite,
)
from defeat.engine.detectors.base import Detections, Detector, Target, TrainPass
from defeat.engine.detectors.family import Family, Published
from defeat.engine.detectors.unset import Unset
from defeat.engine.report import RunError, write_atomically

__all__ = [
    "DETECTORS",
    "Detections",
    "Detector",
    "Family",
    "Published",
    "Target",
    "TrainPass",
    "build",
    "load",
    "read_header",
    "register",
    "save",
]

FORMAT_VERSION = 1
METADATA_KEY = "defeat"

DETECTORS: dict[str, Family] = {}
"""Families by name, in the order in which they registered."""


def register(family: Family) -> None:
    """Add a family. Raises `ValueError` if there is another one of its name."""
    plugins.add(DETECTORS, "detector family", family.name, family)


for _module in (faster_rcnn, faster_rcnn_mobilenet, fcos, mask_rcnn, retinanet, ssd, ssdlite):
    register(_module.FAMILY)


def build(
    spec: Mapping[str, Any], classes: Sequence[str], *, pretrained_backbone: bool = False, where: str = "detector"
) -> Detector:
    """Build a detector from its spec.

    Args:
        spec: `{"architecture": …, …}`; missing keys take their defaults.
        classes: names of the labels 1, 2, ….
        pretrained_backbone: start the backbone from ImageNet weights instead of random ones.
        where: where the spec stands, for the error.

    Raises:
        RunError: unknown architecture, unknown keys, values out of range, weights that cannot be had.
    """
    architecture = spec.get("architecture")
    if not isinstance(architecture, str) or architecture not in DETECTORS:
        raise RunError(
            "user", "unknown_architecture", f"{where}.architecture is {architecture!r}; known: {', '.join(DETECTORS)}"
        )
    family = DETECTORS[architecture]
    return family.build(family.config.parse(spec, where=where), classes, pretrained_backbone=pretrained_backbone)


def dumps(detector: Detector) -> bytes:
    """Return the detector as the bytes of a safetensors file with its spec and classes inside."""
    header = {
        "format_version": FORMAT_VERSION,
        "detector": detector.config.model_dump(mode="json"),
        "classes": detector.classes,
    }
    # Clones: shared storage, a view of a larger one, or the order of `channels_last` is not for a file format.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in detector.state_dict().items()
    }
    return safetensors.torch.save(tensors, {METADATA_KEY: json.dumps(header)})


def save(detector: Detector, path: Path) -> None:
    """Write the detector to `path`, atomically. Raises `RunError("infra", "disk_full", …)` as `write_atomically`."""
    write_atomically(path, dumps(detector))


def read_header(path: Path) -> dict[str, Any] | None:
    """Return `{"detector", "classes"}` from a safetensors file of `save`, or None if it has no such header.

    Raises:
        RunError: `not_safetensors` if the file is no safetensors file or is cut off.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise RunError("data", "not_safetensors", f"{path.name} is not a complete safetensors file: {error}") from error
    if METADATA_KEY not in metadata:
        return None
    try:
        header = json.loads(metadata[METADATA_KEY])
        if header["format_version"] != FORMAT_VERSION:
            raise RunError(
                "data",
                "unknown_format_version",
                f"{path.name} has format version {header['format_version']!r}; this version reads {FORMAT_VERSION}",
            )
        if not isinstance(header["classes"], list) or not all(isinstance(name, str) for name in header["classes"]):
            raise TypeError("classes must be a list of names")
        return {"detector": dict(header["detector"]), "classes": header["classes"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError("data", "bad_header", f"the header of {path.name} cannot be read: {error!r}") from error


def load(path: str | Path, *, device: str = "cpu") -> Detector:
    """Rebuild a detector from a file that `save` wrote: in eval mode, ready for `detect`.

    Its family may be one of a module that `DEFEAT_PLUGINS` names.

    Raises:
        RunError: `save` did not write the file, it is cut off, or its tensors do not fit its spec.
    """
    path = Path(path)
    header = read_header(path)
    if header is None:
        raise RunError(
            "data", "no_header", f"{path.name} does not name its detector (it has no {METADATA_KEY!r} metadata)"
        )
    plugins.load()
    with Unset():
        detector = build(header["detector"], header["classes"])
    try:
        detector.load_state_dict(safetensors.torch.load_file(path))
    except RuntimeError as error:
        raise RunError("data", "tensors_do_not_fit", f"{path.name}: {error}"[:2000]) from error
    return detector.to(device).eval()
