"""Selects outputs of a head's last layer."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def select_outputs(layer: Layer, rows: Tensor) -> Layer:
    """Return a linear layer or convolution with only these of the outputs, in this order; `layer` stays as it is.

    Args:
        layer: with a bias; a convolution in one group.
        rows: (N,) int64, indices of its outputs.
    """
    selected = copy.deepcopy(layer)
    assert layer.bias is not None
    with torch.no_grad():
        rows = rows.to(layer.weight.device)
        selected.weight = nn.Parameter(layer.weight[rows], requires_grad=layer.weight.requires_grad)
        selected.bias = nn.Parameter(layer.bias[rows], requires_grad=layer.bias.requires_grad)
    if isinstance(selected, nn.Conv2d):
        selected.out_channels = len(rows)
    else:
        selected.out_features = len(rows)
    return selected
