"""How hard each loss pulls at the features it shares with the others, and part weights that follow from it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from defeat.engine.detectors.base import TrainPass
from defeat.engine.methods.losses import mean_over_ranks

# Steps that are measured: the first ones all, for an adapter that starts near zero soon lets a hundred times more
# gradient through; then one in so many. A measured step takes a sixth (ResNet-50) to a half (a tiny student) longer.
FIRST_STEPS = 10
MEASURE_EVERY = 50
# Share of a new measurement in the mean of them, a geometric one: a ratio halved and one doubled cancel out.
NEW_SHARE = 0.2
# A float16 gradient of 1e-8, as a neck's is at full size, is 0, and one of 1e5 overflows: in float16 each is measured
# at all of these, and the first that does not overflow counts.
_HALF_SCALES = (2.0**16, 2.0**8, 1.0)
# A factor beyond this is not believed: the part hardly reaches the features at all.
LARGEST_FACTOR = 1e6


def gradient_norms(losses: Mapping[str, Tensor], features: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the Euclidean norm of each loss's gradient over all values of all `features` together.

    The graph is kept and no `.grad` is written: a training step's backward pass after it is what it would have been
    without. It costs the part of a backward pass that lies behind the features, for each loss.

    Args:
        losses: scalars by name. One that does not depend on the features, or on nothing that is trained, has norm 0.
        features: tensors inside the losses' graph, of any shapes. What reaches one through another counts in both; one
            that needs no gradient, such as a map of frozen stages, counts in none.

    Returns:
        For each loss a float32 (float64 for float64 features) scalar on its device, without a graph.
    """
    trained = [one for one in features if one.requires_grad]
    return {name: _gradient_norm(loss, trained) for name, loss in losses.items()}


def _gradient_norm(loss: Tensor, features: Sequence[Tensor]) -> Tensor:
    if not loss.requires_grad or not features:
        return torch.zeros((), dtype=torch.float32, device=loss.device)
    if not any(feature.dtype == torch.float16 for feature in features):
        return _norm_at(loss, features, 1.0)
    large, middle, small = (_norm_at(loss, features, scale) for scale in _HALF_SCALES)
    return torch.where(large.isfinite(), large, torch.where(middle.isfinite(), middle, small))


def _norm_at(loss: Tensor, features: Sequence[Tensor], scale: float) -> Tensor:
    """Return the norm of the gradient as it is found when the loss is `scale` times as large."""
    gradients = torch.autograd.grad(loss * scale, features, retain_graph=True, allow_unused=True)
    # Widened before squaring: a half's largest value is 65504.
    norms = [
        torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
        for gradient in gradients
        if gradient is not None
    ]
    return torch.linalg.vector_norm(torch.stack(norms)) / scale if norms else loss.new_zeros((), dtype=torch.float32)


class Balance(nn.Module):
    """Scales parts of a distillation so that each pulls as hard at the student's pyramid as the student's own losses.

    For a part p the factor is the mean over the measured steps of |gradient of the student's losses' sum| /
    |gradient of p|, both at the pyramid. Which steps are measured follows from the step's number alone, and the means
    are buffers: a resumed run goes on as it would have. Several processes that train together take the means of their
    norms, and so have the same factors. Whatever weight a part came with makes no difference; one whose
    gradient does not reach the pyramid, or is 0, keeps the weight that it came with.

    Attributes:
        log_factor: (P,) natural logarithm of each part's factor.
        measured: (P,) bool, whether it was ever measured.
    """

    log_factor: Tensor
    measured: Tensor

    def __init__(self, parts: Sequence[str]) -> None:
        super().__init__()
        self.parts = list(parts)
        self.register_buffer("log_factor", torch.zeros(len(self.parts)))
        self.register_buffer("measured", torch.zeros(len(self.parts), dtype=torch.bool))

    def forward(self, student: TrainPass, losses: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return the losses, of which the balance's parts are scaled; `step` counts optimiser steps from 0."""
        if step < FIRST_STEPS or step % MEASURE_EVERY == 0:
            self._measure(student, losses)
        factors = dict(zip(self.parts, self.log_factor.exp().unbind(), strict=True))
        return {name: factors[name] * loss if name in factors else loss for name, loss in losses.items()}

    def _measure(self, student: TrainPass, losses: Mapping[str, Tensor]) -> None:
        own = torch.stack([loss.float() for loss in student.losses.values()]).sum()
        parts = {name: losses[name] for name in self.parts}
        norms = torch.stack(
            [norm.float() for norm in gradient_norms({"": own, **parts}, list(student.features.values())).values()]
        )
        norms, _ = mean_over_ranks(norms)
        ratio = (norms[0] / norms[1:]).float()
        # Neither a batch without objects nor a half-precision gradient that overflowed says anything of the balance.
        good = ratio.isfinite() & (ratio > 0)
        found = ratio.clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR).log()
        mean = torch.where(self.measured, self.log_factor.lerp(found, NEW_SHARE), found)
        self.log_factor.copy_(torch.where(good, mean, self.log_factor))
        self.measured.logical_or_(good)
