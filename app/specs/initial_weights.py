"""Whether a checkpoint's tensors fit a detector that is to start from them."""

from collections.abc import Iterator, Mapping
from typing import Any

from app.request_models import Problem, pointer, problem, show
from app.specs.catalog import Catalog
from app.specs.validation import Path, check_detector

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
_ANCHORS = ("anchor_octaves", "anchor_doublings", "anchor_ratios")


def tensor_problems(
    catalog: Catalog, path: Path, detector: Mapping[str, Any], given: Mapping[str, Any]
) -> Iterator[Problem]:
    """Tell what keeps the tensors of a detector `given` from fitting `detector`, both specs, the latter complete."""
    own = check_detector(catalog, dict(given), ()).value
    if own is None:
        return
    wanted, found = _shapes(catalog, detector), _shapes(catalog, own)
    differing = [key for keys, value in wanted.items() if value != found[keys] for key in keys]
    unlike = [key for key in differing if detector.get(key) != own.get(key)]
    if unlike:
        kept = ", ".join(f"{key} {show(own[key])}" for key in unlike if key in own)
        yield problem(
            pointer(path),
            "tensors_do_not_fit",
            f"the checkpoint is of a detector with another {', '.join(unlike)}: set {path[0]}.detector to what it has "
            f"({kept}), or use random or imagenet",
        )


def _shapes(catalog: Catalog, detector: Mapping[str, Any]) -> dict[tuple[str, ...], object]:
    """Return what the keys of a spec make of the tensors' names and shapes."""
    shapes: dict[tuple[str, ...], object] = {(key,): detector.get(key) for key in _SHAPING}
    per_size = detector.get("anchor_octaves") or detector.get("anchor_doublings") or 1
    shapes[_ANCHORS] = per_size * len(detector.get("anchor_ratios", ()))
    strides = detector["strides"]
    backbone = catalog.backbones.get(detector["backbone"])
    if backbone is None or strides[-1] not in backbone["strides"]:  # of a family with a trunk of its own
        return shapes | {("backbone",): detector["backbone"], ("extra_levels",): None}
    place = backbone["strides"].index(strides[-1])
    layout, channels = backbone["layouts"][place], detector.get("pyramid_channels")
    # The first convolution of the extra levels has as many channels as what it starts from: two kinds of them may fit,
    # and would no longer once the backbone or the channels are set to the checkpoint's.
    first = {"p6p7": channels, "p6p7_backbone": backbone["channels"][place]}.get(detector.get("extra_levels", "none"))
    return shapes | {("backbone",): layout, ("extra_levels",): (first, layout, channels)}
