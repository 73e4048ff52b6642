"""Detectors built without values, for weights that are loaded next."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_DRAWS = frozenset({Tensor.normal_, Tensor.uniform_})


class Unset(TorchFunctionMode):
    """While it is entered, modules are made with their parameters at zero, and no random number is drawn.

    Drawing them takes longer than reading a weights file. Call a strict `load_state_dict` right afterwards: it
    overwrites every parameter and buffer. Everything else was computed as usual.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Leave initial values out, and call anything else."""
        del types
        # Functions of `nn.init` that can be overridden come here whole; the others draw by the tensor's methods.
        initial = getattr(func, "__module__", None) == torch.nn.init.__name__ and func.__name__.endswith("_")
        if initial or func in _DRAWS:
            tensor: Tensor = args[0] if args else (kwargs or {})["tensor"]
            # Not uninitialised: `trunc_normal_` draws again until all values lie in its bounds, which garbage
            # may never.
            with torch.no_grad():
                return tensor.zero_()
        return func(*args, **(kwargs or {}))
