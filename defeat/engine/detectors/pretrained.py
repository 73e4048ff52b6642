"""Published detectors as teachers: families name them, torchvision has their weights."""

from typing import Any, cast
from urllib.error import URLError

from torchvision.models import WeightsEnum

from defeat.engine.detectors import DETECTORS, Detector, Published, build
from defeat.engine.detectors.unset import Unset
from defeat.engine.report import RunError


def published() -> dict[str, Published]:
    """Return every family's published detectors by name."""
    return {name: entry for family in DETECTORS.values() for name, entry in family.published.items()}


def classes_of(weights: WeightsEnum) -> list[str]:
    """Return the class names of labels 1, 2, …; torchvision's `N/A` stand for COCO's unused ids."""
    return list(weights.meta["categories"][1:])


def load_pretrained(name: str, weights_name: str) -> Detector:
    """Build a published detector and load its weights, from torch's cache or the network.

    Raises:
        RunError: `unknown_detector`, `unknown_weights` (the detail lists the choices); `weights_unavailable`.
    """
    known = published()
    if name not in known:
        raise RunError("user", "unknown_detector", f"unknown detector {name!r}; known: {', '.join(known)}")
    entry = known[name]
    if weights_name not in entry.weights:
        raise RunError(
            "user", "unknown_weights", f"unknown weights {weights_name!r} of {name}; known: {', '.join(entry.weights)}"
        )
    weights = entry.weights[weights_name]
    with Unset():
        detector = build(entry.config.model_dump(mode="json"), classes_of(weights))
    try:
        # The hash is part of the file's name and checked as it is downloaded.
        state: dict[str, Any] = cast(dict[str, Any], weights.get_state_dict(progress=False, check_hash=True))
    except (URLError, OSError) as error:
        raise RunError(
            "infra",
            "weights_unavailable",
            f"{name} {weights_name} could not be downloaded ({error}); give the worker network access, or put "
            f"{weights.url.rsplit('/', 1)[-1]} into hub/checkpoints under TORCH_HOME",
        ) from error
    detector.load_state_dict(state)
    return detector
