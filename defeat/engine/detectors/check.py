"""The `check_checkpoint` run: checks that an uploaded file holds a whole detector, and rewrites it as `save` does."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from defeat.engine import detectors
from defeat.engine.detectors.base import full_coverage
from defeat.engine.report import Reporter, RunError

MAX_CLASSES = 10_000
# What training scripts wrap a state dict in, and what they put before its names.
WRAPPERS = ("model", "state_dict", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.", "model.")


def run(spec: Mapping[str, Any], inputs: Mapping[str, Any], reporter: Reporter) -> dict[str, Any]:
    """Check `inputs["weights"]` against a detector spec and write `checkpoint.safetensors`.

    Args:
        spec: `detector` and `classes`; null if the file names them itself, as files of `save` do.
        inputs: `weights`, the path of a safetensors or torch file.
        reporter: gets progress and the artifact.

    Returns:
        `detector` (every default filled in), `classes`, and `coverage`: how many of the detector's tensors were loaded.

    Raises:
        RunError: `not_a_checkpoint`, `detector_missing`, `classes_missing`, `classes_differ`, `tensors_do_not_fit`, …
    """
    reporter.progress("checking", fraction=0.0)
    path = Path(inputs["weights"])
    tensors, header = read_weights(path)
    known = header or {"detector": None, "classes": None}
    for key in ("detector", "classes"):
        if spec.get(key) is None and known[key] is None:
            raise RunError(
                "user", f"{key}_missing", f"the file does not name its {key}: give {key} when creating the checkpoint"
            )
    if header and spec.get("classes") and list(spec["classes"]) != header["classes"]:
        raise RunError(
            "user",
            "classes_differ",
            f"classes are given as {_short(spec['classes'])}, and the file has {_short(header['classes'])}",
        )
    classes = spec.get("classes") or known["classes"]
    if not 1 <= len(classes) <= MAX_CLASSES:
        raise RunError(
            "user", "bad_classes", f"a detector has 1 to {MAX_CLASSES} classes, and {len(classes)} are given"
        )
    if len(set(classes)) < len(classes):
        raise RunError("user", "bad_classes", "two classes have the same name; give each its own")
    detector = detectors.build(spec.get("detector") or known["detector"], classes)
    reporter.progress("checking", fraction=0.5)
    reporter.check_cancelled()
    coverage = load_strictly(detector, tensors)
    path = reporter.artifact(
        "checkpoint.safetensors", kind="checkpoint", content_type="application/octet-stream", details=coverage
    )
    detectors.save(detector, path)
    reporter.progress("checking", fraction=1.0)
    return {"detector": detector.config.model_dump(mode="json"), "classes": list(classes), "coverage": coverage}


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read a weights file's tensors, and its header if `save` wrote it.

    The file is tried as safetensors first; anything else is read by `torch.load(weights_only=True)`, which builds
    tensors and plain containers and never runs code of a pickle.

    Raises:
        RunError: `not_a_checkpoint` if it is neither, is cut off, or holds no tensors.
    """
    try:
        tensors = safetensors.torch.load_file(path)
        return _bare(tensors), detectors.read_header(path)
    except SafetensorError as error:
        reason = str(error)
    _check_zip(path, reason)
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch.load's errors on a damaged file are many: KeyError, TypeError, struct.error, …
        raise RunError(
            "data",
            "not_a_checkpoint",
            "the torch file holds more than tensors and plain containers, or is damaged; save the state_dict alone, or "
            f"use safetensors ({f'{type(error).__name__}: {error}'.splitlines()[0][:200]})",
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(document, dict) and isinstance(document.get(wrapper), dict):
            document = document[wrapper]
    if not isinstance(document, dict) or not document or not all(_is_plain(value) for value in document.values()):
        raise RunError(
            "data",
            "not_a_checkpoint",
            "the torch file holds no state_dict: a dict of names to dense tensors of numbers",
        )
    return _bare({str(name): tensor for name, tensor in document.items()}), None


def _short(names: Sequence[str]) -> str:
    return f"{', '.join(map(repr, names[:20]))}{', …' if len(names) > 20 else ''} ({len(names)})"


def _check_zip(path: Path, reason: str) -> None:
    """Raise `RunError` unless the file is a zip as torch writes it: nothing in it is compressed.

    So tensors take no more memory than the upload has bytes, even from a hostile zip.
    """
    try:
        with zipfile.ZipFile(path) as members:
            compressed = any(member.file_size != member.compress_size for member in members.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise RunError(
            "data", "not_a_checkpoint", f"the file is neither a whole safetensors file ({reason}) nor a torch file"
        ) from error
    if compressed:
        raise RunError("data", "not_a_checkpoint", "the torch file is compressed; upload it as torch.save wrote it")


def _is_plain(value: object) -> bool:
    """Return whether a value can be a weight: a dense tensor of real numbers, in memory."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_complex()
        and not value.is_quantized
    )


def _bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without a prefix that all their names share."""
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def load_strictly(detector: detectors.Detector, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Load all of a detector's tensors and return the coverage.

    Raises:
        RunError: `tensors_do_not_fit` if any is missing, unexpected, or of another shape; the detail counts those that
            fit.
    """
    wanted = detector.state_dict()
    # Frozen batch norm has no counter of batches, and files may have one: it is not a weight.
    given = {name: one for name, one in tensors.items() if name in wanted or not name.endswith("num_batches_tracked")}
    missing = [name for name in wanted if name not in given and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in given if name not in wanted]
    misshapen = [
        f"{name} {list(given[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    total = len(wanted)
    loaded = sum(name in given for name in wanted) - len(misshapen)
    if missing or unexpected or misshapen:
        parts = [
            f"{len(names)} {what}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
            if names
        ]
        raise RunError(
            "data",
            "tensors_do_not_fit",
            f"{loaded} of the detector's {total} tensors fit the file ({'; '.join(parts)})",
        )
    detector.load_state_dict(dict(given), strict=False)
    return full_coverage(total)
