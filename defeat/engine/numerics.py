"""How a GPU multiplies: which precisions there are, and which of its libraries' choices hold while a step runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["float32", "tf32", "bfloat16", "float16"]

# What the forward passes compute in, by autocast; see `ScheduleConfig.precision`.
PRECISIONS: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# cuDNN tries its algorithms out for each new shape of a batch, a second or so each time: worth it for so many shapes.
MOST_SHAPES = 8


@contextmanager
def numerics(device: torch.device, precision: Precision, *, shapes: int | None = None) -> Iterator[None]:
    """Set how CUDA multiplies float32 numbers and chooses convolutions, and set it back afterwards.

    With "float32" products are exact to float32. Otherwise what autocast leaves in float32 goes through TF32, with 10
    bits of mantissa, where the GPU has it. PyTorch's own default is TF32 for convolutions and float32 for matrices.
    Does nothing on a CPU.

    Args:
        device: where tensors are.
        precision: of the forward passes.
        shapes: how many shapes a batch can have; cuDNN looks for the fastest algorithm of each if they are few. None:
            many.
    """
    if device.type != "cuda":
        yield
        return
    # Not the newer `fp32_precision`: torch's compiler asks for these, and refuses to answer where both are used.
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    _set(
        "highest" if precision == "float32" else "high",
        precision != "float32",
        (shapes or MOST_SHAPES + 1) <= MOST_SHAPES,
    )
    try:
        yield
    finally:
        _set(*before)


def _set(matrices: str, convolutions: bool, search: bool) -> None:
    torch.set_float32_matmul_precision(matrices)
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cudnn.benchmark = search
