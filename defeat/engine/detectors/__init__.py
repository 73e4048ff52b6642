"""The registry of detector families, and how a detector is built, saved and loaded.

Adding a family is one file and one line in `DETECTORS`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from defeat.engine.config import Config
from defeat.engine.detectors.base import Detections, Detector, HeadKind, Part, Target, TrainPass
from defeat.engine.detectors.faster_rcnn import (
    FasterRCNNConfig,
    FasterRCNNDetector,
    FasterRCNNMobileNetConfig,
    FasterRCNNMobileNetDetector,
)
from defeat.engine.detectors.fcos import FCOSConfig, FCOSDetector
from defeat.engine.detectors.mask_rcnn import MaskRCNNConfig, MaskRCNNDetector
from defeat.engine.detectors.retinanet import RetinaNetConfig, RetinaNetDetector
from defeat.engine.detectors.ssd import SSDConfig, SSDDetector
from defeat.engine.detectors.ssdlite import SSDLiteConfig, SSDLiteDetector
from defeat.engine.detectors.unset import Unset
from defeat.engine.report import RunError, write_atomically

__all__ = [
    "DETECTORS",
    "Detections",
    "Detector",
    "Target",
    "TrainPass",
    "build",
    "load",
    "read_header",
    "save",
]

FORMAT_VERSION = 1
METADATA_KEY = "defeat"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One detector family: its config and how a detector is made from it.

    Attributes:
        head: its `Detector.head_kind`.
        provides: its `Detector.provides`, for the API.
    """

    summary: str
    head: HeadKind
    provides: tuple[Part, ...] = ()
    config: type[Config]
    build: Callable[..., Detector]


DETECTORS: dict[str, Family] = {
    "faster_rcnn": Family(
        summary="Two-stage detector with a feature pyramid (Ren et al. 2015, Lin et al. 2017), torchvision's.",
        head="two_stage",
        provides=FasterRCNNDetector.provides,
        config=FasterRCNNConfig,
        build=FasterRCNNDetector,
    ),
    "faster_rcnn_mobilenet": Family(
        summary="Faster R-CNN on MobileNetV3 as torchvision has it: a pyramid whose finest stride is 32, twice.",
        head="two_stage",
        provides=FasterRCNNMobileNetDetector.provides,
        config=FasterRCNNMobileNetConfig,
        build=FasterRCNNMobileNetDetector,
    ),
    "fcos": Family(
        summary="One-stage detector with a feature pyramid and no anchors (Tian et al. 2019), torchvision's.",
        head="one_stage",
        provides=FCOSDetector.provides,
        config=FCOSConfig,
        build=FCOSDetector,
    ),
    "mask_rcnn": Family(
        summary="Faster R-CNN with a mask head, trained where the data has masks (He et al. 2017), torchvision's.",
        head="two_stage",
        provides=MaskRCNNDetector.provides,
        config=MaskRCNNConfig,
        build=MaskRCNNDetector,
    ),
    "retinanet": Family(
        summary="One-stage detector with a feature pyramid and the focal loss (Lin et al. 2017), torchvision's.",
        head="one_stage",
        provides=RetinaNetDetector.provides,
        config=RetinaNetConfig,
        build=RetinaNetDetector,
    ),
    "ssd": Family(
        summary="One-stage detector on VGG-16 at a fixed size (Liu et al. 2016), torchvision's.",
        head="one_stage",
        provides=SSDDetector.provides,
        config=SSDConfig,
        build=SSDDetector,
    ),
    "ssdlite": Family(
        summary="SSD of depthwise convolutions on MobileNetV3, for phones (Howard et al. 2019), torchvision's.",
        head="one_stage",
        provides=SSDLiteDetector.provides,
        config=SSDLiteConfig,
        build=SSDLiteDetector,
    ),
}


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
    """Return `{"detector", "classes"}` from a safetensors file of ours, or None if it carries no such header.

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

    Raises:
        RunError: the file is not ours, is cut off, or its tensors do not fit its spec.
    """
    path = Path(path)
    header = read_header(path)
    if header is None:
        raise RunError(
            "data", "no_header", f"{path.name} does not say which detector it is (no {METADATA_KEY!r} metadata)"
        )
    with Unset():
        detector = build(header["detector"], header["classes"])
    try:
        detector.load_state_dict(safetensors.torch.load_file(path))
    except RuntimeError as error:
        raise RunError("data", "tensors_do_not_fit", f"{path.name}: {error}"[:2000]) from error
    return detector.to(device).eval()
