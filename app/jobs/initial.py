"""Whether a checkpoint's tensors fit a detector that is to start from them."""

from collections.abc import Iterator, Mapping
from typing import Any

from app.bodies import Problem, pointer, problem, show
from app.catalog import Catalog
from app.validation import Path, check_detector

# Each of these changes the names or the shapes of a detector's tensors, whatever the others are.
_SHAPING = (
    "architecture",
    "strides",
    "pyramid_channels",
    "pyramid_batch_norm",
    "rpn_convolutions",
    "box_head",
    "head_channels",
    "head_norm",
    "mask_channels",
    "mask_batch_norm",
    "reduced_tail",
)
_ALIKE_UP_TO = 8  # px: so far the larger networks of a family (ResNet-50 and -101) have the same layers


def tensor_problems(
    catalog: Catalog, path: Path, detector: Mapping[str, Any], given: Mapping[str, Any]
) -> Iterator[Problem]:
    """Tell what keeps the tensors of a detector `given` from fitting `detector`, both specs, the latter complete.

    What cannot be told from the specs is left to the run.
    """
    own = check_detector(catalog, dict(given), ()).value
    if own is None:
        return
    unlike = [key for key in _SHAPING if detector.get(key) != own.get(key)]
    if detector["backbone"] != own["backbone"] and detector["strides"][-1] > _ALIKE_UP_TO:
        unlike.append("backbone")
    if unlike:
        kept = ", ".join(f"{key} {show(own[key])}" for key in unlike if key in own)
        yield problem(
            pointer(path),
            "tensors_do_not_fit",
            f"the checkpoint is of a detector with another {', '.join(unlike)}: set {path[0]}.detector to what it has "
            f"({kept}), or use random or imagenet",
        )
