"""Frozen batch norm that keeps half precision: the statistics and the affine part are fixed.

torchvision's and timm's multiply the activations with float32 buffers. Under autocast their output is float32, and with
it every activation behind them, up to the next convolution.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d


class FrozenBatchNorm(FrozenBatchNorm2d):
    """torchvision's frozen batch norm, same buffers and names, whose output has the dtype of its input.

    It computes in float32 or wider and rounds once. Of the input it keeps nothing for the backward pass, which needs
    only the scale.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape and dtype."""
        arguments = (x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        if torch.is_grad_enabled() and x.requires_grad:
            return cast(Tensor, _Normalise.apply(*arguments))
        return _normalise(*arguments)


class FrozenBatchNormAct(FrozenBatchNorm):
    """The same for timm's layers that join batch norm with what follows it."""

    def __init__(self, num_features: int, eps: float, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(num_features, eps)
        self.drop = drop
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """See `FrozenBatchNorm.forward`."""
        return cast(Tensor, self.act(self.drop(super().forward(x))))


def freeze_batch_norm(module: nn.Module) -> nn.Module:
    """Return `module` with every batch norm inside it, or itself, replaced by its frozen form of the same values."""
    if isinstance(module, nn.BatchNorm2d):
        frozen = _frozen_form(module)
        frozen.load_state_dict(module.state_dict())
        return frozen
    for name, child in module.named_children():
        setattr(module, name, freeze_batch_norm(child))
    return module


def _frozen_form(norm: Any) -> FrozenBatchNorm:
    # timm's `BatchNormAct2d`, known by its parts: to import timm takes long, and few runs need it.
    if hasattr(norm, "act"):
        return FrozenBatchNormAct(norm.num_features, norm.eps, norm.drop, norm.act)
    return FrozenBatchNorm(norm.num_features, norm.eps)


def _normalise(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)


class _Normalise(torch.autograd.Function):
    """`_normalise`, differentiable by the input alone."""

    @staticmethod
    def forward(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return _normalise(x, mean, variance, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        _, _, variance, weight, _, eps = inputs
        ctx.save_for_backward(variance, weight)
        ctx.eps = eps

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        variance, weight = ctx.saved_tensors
        # The gradient times the scale, as a batch norm about zero: one pass and one rounding here as well. A plain
        # product with the float32 scale would be float32, one with the scale in half would round twice.
        scaled = _normalise(gradients[0], torch.zeros_like(variance), variance, weight, None, ctx.eps)
        return scaled, None, None, None, None, None
