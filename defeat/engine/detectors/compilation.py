"""Modules that a training step calls compiled by torch.compile, and uncompiled after that has failed."""

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

BACKEND = "inductor"
# Graphs of one module, its own: other modules of the same class have theirs.
RECOMPILE_LIMIT = 8
REASON_LENGTH = 200

# What torch raises while it compiles. What a compiled graph itself raises, as when memory runs out, is none of these.
# A wrong shape is one (`TorchRuntimeError`): then the module fails without compilation as well, by its own error.
_FAILURES = (
    TorchDynamoException,
    FailOnRecompileLimitHit,
    ConstraintViolationError,
    GuardOnDataDependentSymNode,
)


class Compiled:
    """Calls a module compiled, and uncompiled after that has failed. The module itself does not change.

    The whole module becomes one graph. Height and width of what it is given may differ from call to call, if `dynamic`;
    another batch size, number of channels, dtype or mode compiles it anew. The module's weights are put into
    channels_last order, and so is what it is given.

    Attributes:
        failure: why it is no longer called compiled, in one line; None while it is.
    """

    def __init__(self, module: nn.Module, *, dynamic: bool) -> None:
        self.failure: str | None = None
        # In any other order inductor compiles the backward pass of a convolution for one height and width alone.
        self._module = module.to(memory_format=torch.channels_last)
        self._dynamic = dynamic
        compile_module: Any = torch.compile  # whose overloads do not know all of its arguments
        self._compiled = compile_module(
            module, backend=BACKEND, fullgraph=True, recompile_limit=RECOMPILE_LIMIT, isolate_recompiles=True
        )

    def __call__(self, maps: Any) -> Any:
        """Return what the module makes of a tensor (B, C, H, W), or of several by name.

        Raises:
            Exception: whatever the module itself raises.
        """
        maps = {name: _ordered(one) for name, one in maps.items()} if isinstance(maps, Mapping) else _ordered(maps)
        if self.failure is not None:
            return self._module(maps)
        if self._dynamic:
            _mark(maps.values() if isinstance(maps, Mapping) else [maps])
        try:
            with (
                # DistributedDataParallel's buckets would cut the graph, a teacher's as well, at every one.
                torch._dynamo.config.patch(optimize_ddp=False),
                # Compile the graph of the backward pass now: else it would fail in the middle of a step.
                torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
                # Convolutions in channels_last order also where sizes are dynamic, see above.
                torch._inductor.config.patch(force_layout_optimization=True),
            ):
                return self._compiled(maps)
        except _FAILURES as error:
            failure = _line(error)
        # Outside the handler: else Python would report an error of the module as following from the compilation's.
        result = self._module(maps)
        self.failure = failure
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return one for the module's copy, which has its own parameters."""
        return type(self)(copy.deepcopy(self._module, memo), dynamic=self._dynamic)


def _ordered(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)


def _mark(maps: Iterable[Tensor]) -> None:
    for one in maps:
        # "Maybe": torch compiles a convolution of a single row or column for that size alone.
        torch._dynamo.maybe_mark_dynamic(one, 2)
        torch._dynamo.maybe_mark_dynamic(one, 3)


def _line(error: Exception) -> str:
    """Return kind and first line of an error, of what a backend raised rather than that it did; of paths the name."""
    cause = getattr(error, "inner_exception", None) or error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    reason = re.sub(r"(?<![\w.])/\S*/", "", lines[0] if lines else "")
    return f"{type(cause).__name__}: {reason}"[:REASON_LENGTH]
