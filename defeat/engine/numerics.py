"""Numerical precision: the precisions of the forward passes, and how CUDA multiplies float32 during a step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["float32", "tf32", "bfloat16", "float16"]

# The dtype of the forward passes under autocast; see `ScheduleConfig.precision`.
PRECISIONS: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# cuDNN benchmarks its algorithms for each new shape of a batch, about a second each time: worth it for so many shapes.
MAX_SHAPES = 8


@contextmanager
def numerics(device: torch.device, precision: Precision, *, shapes: int | None = None) -> Iterator[None]:
    """Set how CUDA multiplies float32 numbers and chooses convolution algorithms, and restore both afterwards.

    With "float32", products have full float32 precision. Otherwise what autocast leaves in float32 uses TF32, with 10
    bits of mantissa, on GPUs that have it. PyTorch's default is TF32 for convolutions and float32 for matrices. Does
    nothing on a CPU.

    Args:
        device: the tensors' device.
        precision: of the forward passes.
        shapes: how many shapes a batch can have; up to `MAX_SHAPES`, cuDNN searches the fastest algorithm for each.
            None: unknown.
    """
    if device.type != "cuda":
        yield
        return
    # Not the newer `fp32_precision`: torch's compiler reads these settings, and raises where both are in use.
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    _set(
        "highest" if precision == "float32" else "high",
        precision != "float32",
        (shapes or MAX_SHAPES + 1) <= MAX_SHAPES,
    )
    try:
        yield
    finally:
        _set(*before)


def _set(matrices: str, convolutions: bool, search: bool) -> None:
    torch.set_float32_matmul_precision(matrices)
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cudnn.benchmark = search
