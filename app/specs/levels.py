"""The levels of a detector's pyramid, computed from its spec: as `defeat.engine.detectors` builds them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.specs.catalog import Catalog

# What levels above the backbone's add to a pyramid, as multiples of its coarsest stride: see `defeat.engine.detectors`.
_EXTRA_LEVELS: dict[tuple[str, object], tuple[int, ...]] = {
    ("extra_levels", "p6p7"): (2, 4),
    ("extra_levels", "p6p7_backbone"): (2, 4),
    ("pool_level", True): (2,),
}
# The smallest anchors of a family with `anchor_doublings` are multiples of this, on every level.
_DOUBLED_STRIDE = 32

Anchors = tuple[tuple[int, ...], tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of a detector's pyramid.

    Attributes:
        stride: in pixels.
        channels: of its map.
        anchors: of each of its cells, sides in pixels and ratios of height over width; None where no logits of cells
            are handed out.
        side: cells along one side of its map, of the square that the student resizes every image to; None where
            images keep their shape: maps then have one shape whatever the backbone.
    """

    stride: int
    channels: int
    anchors: Anchors | None
    side: int | None


def strides_of(detector: Mapping[str, Any]) -> list[int]:
    """Return the strides of a detector spec's pyramid in pixels, finest first, extra levels too.

    SSD's last two levels, whose strides no other family has, are left out.
    """
    strides: list[int] = list(detector.get("strides", ()))
    factors = [
        factor
        for (key, value), added in _EXTRA_LEVELS.items()
        if strides and detector.get(key) == value
        for factor in added
    ]
    return [*strides, *(factor * strides[-1] for factor in factors)]


def backbone_strides_of(catalog: Catalog, detector: Mapping[str, Any]) -> list[int]:
    """Return the strides of the backbone's maps that the detector hands out; empty for families that hand out none."""
    provides = catalog.detectors[detector["architecture"]]["provides"]
    return list(detector["strides"]) if "backbone" in provides else []


def levels_of(catalog: Catalog, detector: Mapping[str, Any], *, size: int | None) -> list[Level]:
    """Return the levels of a complete detector spec, finest first; `size`: of the student's images, see `Level`."""
    strides = strides_of(detector)
    has_logits = "logits" in catalog.detectors[detector["architecture"]]["provides"]
    return [
        Level(
            stride=stride,
            channels=channels,
            anchors=_anchors(detector, stride) if has_logits else None,
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
    family = catalog.detectors[detector["architecture"]]
    entries = (entry for entry in family["channels"] if entry["of"].items() <= detector.items())
    return list(next(entries)["channels"][:count])


def _anchors(detector: Mapping[str, Any], stride: int) -> Anchors:
    """See the families' files in `defeat.engine.detectors`; they round and cut off as it is done here."""
    scale, ratios = detector["anchor_scale"], tuple(detector.get("anchor_ratios", (1.0,)))
    if octaves := detector.get("anchor_octaves"):
        return tuple(int(scale * stride * 2 ** (octave / octaves)) for octave in range(octaves)), ratios
    if doublings := detector.get("anchor_doublings"):
        return tuple(round(scale * _DOUBLED_STRIDE * 2**doubling) for doubling in range(doublings)), ratios
    return (round(scale * stride),), ratios


def _side(catalog: Catalog, detector: Mapping[str, Any], stride: int, size: int) -> int:
    """Extra levels, and all of the families that hand out no maps of a backbone, round up."""
    strides = backbone_strides_of(catalog, detector)
    if not strides or catalog.backbones[detector["backbone"]]["rounds"] == "up":
        return -(-size // stride)
    coarsest = size // strides[-1]
    return size // stride if stride in strides else -(-coarsest * strides[-1] // stride)
