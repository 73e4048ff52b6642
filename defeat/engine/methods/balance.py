"""The gradient norm of each loss at the features that the losses share, and loss weights that balance these norms.

This module decides at which steps gradients are measured, for the metrics (`is_measured`) and for the weights.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from defeat.engine.detectors.base import TrainPass
from defeat.engine.methods.losses import mean_over_ranks

# One step in so many is measured. It takes a sixth (ResNet-50) to a half (a tiny student) longer than others: 1 to 2 %
# of the time at this distance.
MEASURE_EVERY = 50
# The balance also measures each of the first steps: an adapter that starts near zero soon passes on gradients a hundred
# times as large.
FIRST_STEPS = 10
# Weight of a new measurement in the exponential moving average of their logarithms.
NEW_SHARE = 0.2
# A float16 gradient of 1e-8, the size of a neck's at full resolution, is 0, and one of 1e5 overflows: in float16 each
# is measured at all of these loss scales, and the first that does not overflow counts.
_HALF_SCALES = (2.0**16, 2.0**8, 1.0)
# The maximum factor: a part that would need a larger one hardly reaches the features at all.
MAX_FACTOR = 1e6


def is_measured(step: int) -> bool:
    """Return whether gradient norms are measured at optimiser step `step` (from 0)."""
    return step % MEASURE_EVERY == 0


def gradient_norms(losses: Mapping[str, Tensor], features: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the Euclidean norm of each loss's gradient over all values of all `features` together.

    The graph is kept and no `.grad` is written, so that the training step's backward pass does not change. It costs,
    for each loss, the part of a backward pass from the loss to the features.

    Args:
        losses: scalars by name. One that does not depend on the features, or on nothing that is trained, has norm 0.
        features: tensors inside the losses' graph, of any shapes. A gradient that reaches one through another counts in
            both; features that need no gradient, such as maps of frozen stages, are ignored.

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
    """Return the norm of the gradient, computed with a loss scale of `scale`."""
    gradients = torch.autograd.grad(loss * scale, features, retain_graph=True, allow_unused=True)
    # Converted to float32 before squaring: float16's largest value is 65504.
    norms = [
        torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
        for gradient in gradients
        if gradient is not None
    ]
    return torch.linalg.vector_norm(torch.stack(norms)) / scale if norms else loss.new_zeros((), dtype=torch.float32)


class Balance(nn.Module):
    """Scales parts of the distillation loss to the gradient norm of the student's own losses at its pyramid.

    The factor of a part p is the geometric moving average over the measured steps of |gradient of the sum of the
    student's own losses| / |gradient of p|, both at the pyramid. Which steps are measured follows from the step's
    number alone, and the averages are buffers, so that a resumed run continues exactly. Processes that train together
    average their norms, and so have the same factors. A part's own weight has no effect, unless its gradient does not
    reach the pyramid or is 0: it then keeps that weight.

    These norms are not those of the metrics (`gradient_share/…`), even at steps at which both are measured: here of the
    parts as they come and of the sum of the student's losses, there of the scaled parts and of each loss. One cannot be
    computed from the other without a change in the last digits.

    Attributes:
        log_factor: (P,) natural logarithm of each part's factor.
        measured: (P,) bool, whether each part was ever measured.
    """

    log_factor: Tensor
    measured: Tensor

    def __init__(self, parts: Sequence[str]) -> None:
        super().__init__()
        self.parts = list(parts)
        self.register_buffer("log_factor", torch.zeros(len(self.parts)))
        self.register_buffer("measured", torch.zeros(len(self.parts), dtype=torch.bool))

    def forward(self, student: TrainPass, losses: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return the losses, with the balanced parts scaled; `step` counts optimiser steps from 0."""
        if step < FIRST_STEPS or is_measured(step):
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
        # Batches without objects, and half-precision gradients that overflow, are not measurements.
        valid = ratio.isfinite() & (ratio > 0)
        log_ratio = ratio.clamp(1 / MAX_FACTOR, MAX_FACTOR).log()
        average = torch.where(self.measured, self.log_factor.lerp(log_ratio, NEW_SHARE), log_ratio)
        self.log_factor.copy_(torch.where(valid, average, self.log_factor))
        self.measured.logical_or_(valid)
