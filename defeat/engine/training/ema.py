"""An exponential moving average of a detector's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """The exponential moving average of a module's floating-point tensors, buffers included; other tensors are copied.

    Attributes:
        tensors: the averaged state, by the names of the module's state dict.
    """

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.tensors: dict[str, Tensor] = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, *, step: int) -> None:
        """Add the weights after optimiser step `step` (from 0), with decay `min(decay, (1 + step) / (10 + step))`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = module.state_dict()
        floating = [name for name, tensor in current.items() if tensor.is_floating_point()]
        averaged, updates = [self.tensors[name] for name in floating], [current[name] for name in floating]
        torch._foreach_lerp_(averaged, updates, 1 - decay)
        for name, tensor in current.items():
            if not tensor.is_floating_point():
                self.tensors[name].copy_(tensor)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Swap the averaged tensors into the module, and swap them back at the end; takes no further memory."""
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    def _swap(self, module: nn.Module) -> None:
        for name, tensor in module.state_dict(keep_vars=True).items():
            tensor.data, self.tensors[name] = self.tensors[name], tensor.data
