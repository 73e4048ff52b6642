"""A method's description of itself: everything that the registry and the catalog must know of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

from defeat.engine.config import Config
from defeat.engine.methods.base import Method

Compared = Literal["neck", "backbone", "proposals", "logits"]


def weighs(part: Compared) -> dict[str, JsonValue]:
    """Return the `json_schema_extra` of a field that is the weight of a loss, and what that loss compares.

    A loss whose weight is 0 is left out. The weight must be 0 where the detectors do not have its part in common:
    `backbone`, maps of the backbone; `proposals`, two-stage heads; `logits`, class logits of like cells and anchors.
    """
    return {"x-weighs": part}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One distillation method.

    Attributes:
        summary: one line for the catalog.
        config: its config, whose `method` is the method's name. Weights of its losses are marked by `weighs`.
        build: makes it of its config, the student and the teacher, which is None only if it needs none.
        needs_teacher: whether it needs one.
        needs: what the two detectors must have: "neck", pyramid levels of equal stride; "equal_channels", as many
            channels on these; "student.X" or "teacher.X", X among what this one provides (see `Detector.provides`).
        backbone_strides: strides at which it compares maps of the backbones, in pixels.
    """

    summary: str
    config: type[Config]
    build: Callable[..., Method]
    needs_teacher: bool = True
    needs: tuple[str, ...] = ()
    backbone_strides: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The value of `method` that picks it."""
        return str(self.config.model_fields["method"].default)

    @property
    def weights(self) -> list[str]:
        """Parameters that weigh a part of the loss, of which at least one must not be 0."""
        return list(self._weighed())

    def weights_of(self, part: Compared) -> list[str]:
        """Return those of the weights whose losses compare this part of the detectors."""
        return [name for name, compared in self._weighed().items() if compared == part]

    def _weighed(self) -> dict[str, JsonValue]:
        extras = {name: field.json_schema_extra for name, field in self.config.model_fields.items()}
        return {
            name: extra["x-weighs"] for name, extra in extras.items() if isinstance(extra, dict) and "x-weighs" in extra
        }
