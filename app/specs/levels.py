"""The levels of a detector's pyramid, computed from its spec: as `defeat.engine.detectors` builds them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.specs.catalog import Catalog
from defeat.rules.anchors import AnchorSizes

Anchors = tuple[tuple[int, ...], tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of a detector's pyramid.

    Attributes:
        stride: in pixels.
        channels: of its map.
        anchors: of each of its cells, sides in pixels and ratios of height over width; None for families that do not
            provide "logits".
        side: cells along one side of its map, of the square that the student resizes every image to; None if images
            keep their shape: maps then have the same shape for all backbones.
    """

    stride: int
    channels: int
    anchors: Anchors | None
    side: int | None


def extra_levels_of(catalog: Catalog, detector: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the keys that add levels above the backbone's, each with the entry of `x-extra-levels` for its value."""
    return [
        (key, entry)
        for key, field in catalog.fields(detector).items()
        for entry in field.get("x-extra-levels", ())
        if detector.get(key) == entry["value"]
    ]


def strides_of(catalog: Catalog, detector: Mapping[str, Any]) -> list[int]:
    """Return the strides of a detector spec's pyramid in pixels, finest first, extra levels too.

    SSD's last two levels, whose strides no other family has, are left out.
    """
    strides: list[int] = list(detector["strides"])
    factors = [factor for _, entry in extra_levels_of(catalog, detector) for factor in entry["factors"]]
    return [*strides, *(factor * strides[-1] for factor in factors)]


def backbone_strides_of(catalog: Catalog, detector: Mapping[str, Any]) -> list[int]:
    """Return the strides of the backbone's maps; empty for families that do not provide "backbone"."""
    return list(detector["strides"]) if "backbone" in catalog.family(detector)["provides"] else []


def levels_of(catalog: Catalog, detector: Mapping[str, Any], *, size: int | None) -> list[Level]:
    """Return the levels of a complete detector spec, finest first; `size`: of the student's images, see `Level`."""
    strides = strides_of(catalog, detector)
    has_logits = "logits" in catalog.family(detector)["provides"]
    return [
        Level(
            stride=stride,
            channels=channels,
            anchors=_anchors(catalog, detector, stride) if has_logits else None,
            side=_side(catalog, detector, stride, size) if size else None,
        )
        for stride, channels in zip(strides, _channels(catalog, detector, len(strides)), strict=True)
    ]


def pairs_of(student: Sequence[Level], teacher: Sequence[Level]) -> list[tuple[Level, Level]]:
    """Pair levels of equal stride, as `defeat.engine.methods.base.pair_levels` does."""
    open_levels: dict[int, list[Level]] = defaultdict(list)
    for level in teacher:
        open_levels[level.stride].append(level)
    return [(level, open_levels[level.stride].pop(0)) for level in student if open_levels[level.stride]]


def _channels(catalog: Catalog, detector: Mapping[str, Any], count: int) -> list[int]:
    if "pyramid_channels" in detector:
        return [detector["pyramid_channels"]] * count
    entries = (entry for entry in catalog.family(detector)["channels"] if entry["of"].items() <= detector.items())
    return list(next(entries)["channels"][:count])


def _anchors(catalog: Catalog, detector: Mapping[str, Any], stride: int) -> Anchors:
    sizes = AnchorSizes(**catalog.family(detector)["anchors"])
    return sizes.of(detector, stride), tuple(detector.get("anchor_ratios", (1.0,)))


def _side(catalog: Catalog, detector: Mapping[str, Any], stride: int, size: int) -> int:
    rounds = catalog.family(detector)["rounds"] or catalog.backbones[detector["backbone"]]["rounds"]
    if rounds == "up":
        return -(-size // stride)
    strides = detector["strides"]
    coarsest = size // strides[-1]
    # Extra levels round up, whatever the backbone does.
    return size // stride if stride in strides else -(-coarsest * strides[-1] // stride)
