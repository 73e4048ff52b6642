"""How hard each loss pulls at the features it shares with the others."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def gradient_norms(losses: Mapping[str, Tensor], features: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the Euclidean norm of each loss's gradient over all values of all `features` together.

    The graph is kept and no `.grad` is written: a training step's backward pass after it is what it would have been
    without. It costs the part of a backward pass that lies behind the features, for each loss.

    Args:
        losses: scalars by name. One that does not depend on the features, or on nothing that is trained, has norm 0.
        features: tensors inside the losses' graph, of any shapes. What reaches one through another counts in both.

    Returns:
        For each loss a float32 (float64 for float64 features) scalar on its device, without a graph.
    """
    return {name: _gradient_norm(loss, features) for name, loss in losses.items()}


def _gradient_norm(loss: Tensor, features: Sequence[Tensor]) -> Tensor:
    if not loss.requires_grad:
        return torch.zeros((), dtype=torch.float32, device=loss.device)
    gradients = torch.autograd.grad(loss, list(features), retain_graph=True, allow_unused=True)
    # Widened before squaring: a half's largest value is 65504.
    norms = [
        torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
        for gradient in gradients
        if gradient is not None
    ]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else loss.new_zeros((), dtype=torch.float32)
