"""FGD: imitates the neck by the teacher's attention over cells and channels, and by relations between cells.

Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022, arXiv 2111.11837.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from defeat.engine.config import Config
from defeat.engine.detectors.base import Detector, TrainPass
from defeat.engine.detectors.precision import widened
from defeat.engine.methods.base import NeckMethod, StepInfo, TeacherPass, image_cells, paper_value, pointwise_if_needed
from defeat.engine.methods.entry import Entry, weighs
from defeat.engine.methods.masks import focal_weights

Weight = Annotated[float | None, Field(ge=0, le=1e6, json_schema_extra=weighs("neck"))]


class FGDConfig(Config):
    """FGD's parameters. A weight of null is the authors', for a two-stage student or for a one-stage one with anchors.

    The adapters are 1x1 convolutions, and none where the channels are equal.
    """

    method: Literal["fgd"] = "fgd"
    object_weight: Annotated[
        Weight,
        Field(description="Weight of cells in objects (alpha); null: 5e-5 two-stage, 1e-3 one-stage with anchors."),
    ] = None
    background_weight: Annotated[
        Weight,
        Field(description="Weight of background cells (beta); null: 2.5e-5 two-stage, 5e-4 one-stage with anchors."),
    ] = None
    attention_weight: Annotated[
        Weight,
        Field(description="Weight of the attention maps (gamma); null: 5e-5 two-stage, 1e-3 one-stage with anchors."),
    ] = None
    relation_weight: Annotated[
        Weight,
        Field(description="Weight of the global relation (lambda); null: 5e-7 two-stage, 5e-6 one-stage with anchors."),
    ] = None
    temperature: Annotated[float, Field(description="Temperature of the attention.", gt=0, le=100)] = 0.5


def attention(features: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Return where and in which channels features (B, C, H, W) are large: (B, H, W) and (B, C).

    `H W softmax(mean over channels of |F| / T)` over cells, `C softmax(mean over cells of |F| / T)` over channels: the
    mean of either is 1.
    """
    size = features.abs()
    _, channels, height, width = features.shape
    spatial = height * width * (size.mean(dim=1).flatten(1) / temperature).softmax(dim=1)
    return spatial.unflatten(1, (height, width)), channels * (size.mean(dim=(2, 3)) / temperature).softmax(dim=1)


def focal_loss(
    student: Tensor, teacher: Tensor, foreground: Tensor, background: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the object, the background and the attention part of one level, unweighted; each divided by B.

    With A^S and A^C the teacher's attention: `sum(foreground A^S A^C (student - teacher)^2)`, likewise with background;
    and the sum of absolute differences between the student's attention and the teacher's, of both kinds.

    Args:
        student: adapted features, (B, C, H, W).
        teacher: the teacher's features, same shape; no gradient flows into them.
        foreground: (B, H, W), see `focal_weights`.
        background: (B, H, W), likewise.
        temperature: T of the attention, above 0.
    """
    student, teacher = widened(student), widened(teacher.detach())
    spatial, channel = attention(teacher, temperature=temperature)
    ours_spatial, ours_channel = attention(student, temperature=temperature)
    # Summed over channels first: what weighs cells then weighs one map instead of C of them.
    difference = spatial * ((student - teacher).square() * channel[:, :, None, None]).sum(dim=1)  # (B, H, W)
    attended = (ours_spatial - spatial).abs().sum() + (ours_channel - channel).abs().sum()
    batch = len(student)
    return (difference * foreground).sum() / batch, (difference * background).sum() / batch, attended / batch


class Relation(nn.Module):
    """Adds to each cell what the whole map has to say: a global context block (Cao et al. 2019).

    `F + W2 ReLU(LayerNorm(W1 sum over cells of softmax(Wk F) F))`, W2 starting at zero.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.key = nn.Conv2d(channels, 1, kernel_size=1)
        hidden = channels // 2
        last = nn.Conv2d(hidden, channels, kernel_size=1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, hidden, kernel_size=1), nn.LayerNorm([hidden, 1, 1]), nn.ReLU(), last
        )
        for parameter in (*self.key.parameters(), *last.parameters()):
            nn.init.zeros_(parameter)
        nn.init.kaiming_normal_(self.key.weight, nonlinearity="relu")

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        attended = self.key(features).flatten(2).softmax(dim=2)  # (B, 1, H W)
        context = (features.flatten(2) * attended).sum(dim=2)  # (B, C)
        related: Tensor = features + self.transform(context[:, :, None, None])
        return related


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the sum of squared differences of two related maps (B, C, H, W), divided by B."""
    return (widened(student) - widened(teacher)).square().sum() / len(student)


class FGD(NeckMethod):
    """The losses, summed over levels; adapters; and for each level a relation block of either side.

    The padding of a batch is not background. The attention and the relation cover all cells, as in the authors' code:
    padding changes the attention of an image's cells by one common factor, and not their order.

    The block on the teacher's maps is trained too, as the authors' is; no gradient goes through it into the teacher.
    Raises as `NeckMethod`.
    """

    def __init__(self, config: FGDConfig, student: Detector, teacher: Detector) -> None:
        super().__init__(student, teacher, pointwise_if_needed)
        self.temperature = config.temperature
        weights = {
            "neck_object": paper_value(config.object_weight, student, two_stage=5e-5, one_stage=1e-3),
            "neck_background": paper_value(config.background_weight, student, two_stage=2.5e-5, one_stage=5e-4),
            "neck_attention": paper_value(config.attention_weight, student, two_stage=5e-5, one_stage=1e-3),
            "neck_relation": paper_value(config.relation_weight, student, two_stage=5e-7, one_stage=5e-6),
        }
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        related = self.pairs if "neck_relation" in self.weights else []
        self.student_relations = nn.ModuleList(Relation(teacher.channels[theirs]) for _, theirs in related)
        self.teacher_relations = nn.ModuleList(Relation(teacher.channels[theirs]) for _, theirs in related)

    def losses(self, student: TrainPass, teacher: TeacherPass, step_info: StepInfo) -> dict[str, Tensor]:  # noqa: ARG002
        """See `Method.losses`: `neck_object`, `neck_background`, `neck_attention`, `neck_relation`; with a weight."""
        ours, theirs = self.maps(student, teacher)
        boxes = [target["boxes"] for target in student.targets]
        inside = image_cells(student, ours, self.strides)
        levels: dict[str, list[Tensor]] = {name: [] for name in self.weights}
        for index, stride in enumerate(self.strides):
            mine, other = ours[index], theirs[index]
            found = {}
            if self.weights.keys() - {"neck_relation"}:
                masks = focal_weights(boxes, inside[index], size=(mine.shape[-2], mine.shape[-1]), stride=stride)
                focal = focal_loss(mine, other, *masks, temperature=self.temperature)
                found = dict(zip(("neck_object", "neck_background", "neck_attention"), focal, strict=True))
            if self.student_relations:
                related = self.student_relations[index](mine), self.teacher_relations[index](other)
                found["neck_relation"] = relation_loss(*related)
            for name, parts in levels.items():
                parts.append(found[name])
        return {name: self.weights[name] * torch.stack(parts).sum() for name, parts in levels.items()}


METHOD = Entry(
    summary="The neck weighted by the teacher's attention, objects and background apart, and its global relations "
    "(Yang et al., CVPR 2022).",
    config=FGDConfig,
    build=FGD,
    needs=("neck",),
)
