"""An exponential moving average of a detector's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The average of a module's tensors, buffers too; what is not floating point is the newest.

    Attributes:
        tensors: the average, by the names of the module's state.
    """

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.tensors: dict[str, Tensor] = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, *, step: int) -> None:
        """Take in the weights after optimiser step `step` (from 0), with `min(decay, (1 + step) / (10 + step))`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        fresh = module.state_dict()
        floating = [name for name, tensor in fresh.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.tensors[name] for name in floating], [fresh[name] for name in floating], 1 - decay)
        for name, tensor in fresh.items():
            if not tensor.is_floating_point():
                self.tensors[name].copy_(tensor)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Let the module use the average's tensors for a while, in place of its own: no memory is taken."""
        self._exchange(module)
        try:
            yield
        finally:
            self._exchange(module)

    def _exchange(self, module: nn.Module) -> None:
        for name, own in module.state_dict(keep_vars=True).items():
            own.data, self.tensors[name] = self.tensors[name], own.data
