"""Whether a checkpoint's tensors fit a detector that is to start from them."""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from app.request_models import Problem, pointer, problem
from app.specs.catalog import Catalog
from app.specs.levels import extra_levels_of
from app.specs.validation import check_detector
from defeat.rules import Path, show


def tensor_problems(
    catalog: Catalog, path: Path, detector: Mapping[str, Any], given: Mapping[str, Any]
) -> Iterator[Problem]:
    """Return what keeps the tensors of a detector `given` from fitting `detector`, both specs, the latter complete."""
    own = check_detector(catalog, dict(given), ()).value
    if own is None:
        return
    wanted, found = _shapes(catalog, detector), _shapes(catalog, own)
    differing = [key for keys in wanted | found if wanted.get(keys) != found.get(keys) for key in keys]
    unlike = [key for key in dict.fromkeys(differing) if detector.get(key) != own.get(key)]
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
    fields = catalog.fields(detector)
    shapes: dict[tuple[str, ...], object] = {
        (key,): detector[key] for key in ("architecture", *catalog.deciding("tensors", detector))
    }
    counts = {key: detector[key] for key, field in fields.items() if "x-anchors" in field}
    shapes[tuple(counts)] = prod(len(value) if isinstance(value, list) else value for value in counts.values())
    backbone = catalog.backbones.get(detector["backbone"])
    if backbone is None or "backbone" not in catalog.family(detector)["provides"]:  # the family cuts it by itself
        return shapes | {("backbone",): detector["backbone"]}
    place = backbone["strides"].index(detector["strides"][-1])
    layout, channels = backbone["layouts"][place], detector.get("pyramid_channels")
    # The first convolution of the extra levels has as many channels as what it starts from: two kinds of them may fit,
    # and would no longer once the backbone or the channels are set to the checkpoint's.
    starts = {"pyramid": channels, "backbone": backbone["channels"][place], None: None}
    first = {key: starts[entry["convolves"]] for key, entry in extra_levels_of(catalog, detector)}
    convolving = tuple(
        key for key, field in fields.items() if any(one["convolves"] for one in field.get("x-extra-levels", ()))
    )
    shapes |= {(key,): (first.get(key), layout, channels) for key in convolving}
    return shapes | {("backbone",): layout}
