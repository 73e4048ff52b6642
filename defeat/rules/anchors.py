"""How a family makes the sizes of its anchors: used by the family itself, and by the service from the catalog."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class AnchorSizes:
    """The sides of a level's anchors, from the keys of a detector's spec.

    The i-th of n sides is `anchor_scale * base * 2 ** (i * step)`, in whole pixels. n is the value of the key `count`,
    or 1.

    Attributes:
        base: side that `anchor_scale` multiplies, px; None: the level's stride.
        count: key of the number of sides; None: a level has one.
        spread: `octave`: the sides divide an octave, step 1 / n. `doubling`: each is twice the one before, step 1.
        rounds: to the nearest pixel, half to even; or down.
    """

    base: int | None = None
    count: str | None = None
    spread: Literal["octave", "doubling"] = "octave"
    rounds: Literal["nearest", "down"] = "nearest"

    def of(self, spec: Mapping[str, Any], stride: int) -> tuple[int, ...]:
        """Return the sides of the anchors of a level in pixels; `stride` is the level's, px."""
        count = spec[self.count] if self.count else 1
        side = spec["anchor_scale"] * (self.base or stride)
        step = count if self.spread == "octave" else 1
        sides = [side * 2 ** (index / step) for index in range(count)]
        return tuple(round(one) if self.rounds == "nearest" else int(one) for one in sides)
