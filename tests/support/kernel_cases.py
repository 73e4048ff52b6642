"""The kernels of the neck loss under Triton's interpreter, which runs them on a CPU.

    TRITON_INTERPRET=1 python -m tests.support.kernel_cases EVERY

EVERY is 1 for all cases, 5 for a fifth of them.
The variable must be set before Triton is imported: this is a program of its own, and `test_kernels.py` runs it.
"""

import itertools
import os
import random
import sys
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from defeat.engine.methods import kernels, losses
from defeat.engine.methods.losses import decoupled_feature_loss
from defeat.engine.methods.masks import BACKGROUND, OBJECT, PADDING

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda one: one.contiguous(),
    "channels_last": lambda one: one.contiguous(memory_format=torch.channels_last),
    "cut_out": lambda one: torch.cat([one, one], dim=3)[..., : one.shape[3]],
}
# Within a tile, beyond one in each direction, and sides of one.
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 4), (1, 17, 13, 11), (2, 130, 3, 7), (3, 8, 1, 33), (2, 5, 150, 1), (2, 65, 6, 11)]
KINDS = ("mixed", "objects", "background", "padding")


def kinds_of(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Kinds of the cells of maps of this shape (B, C, H, W)."""
    batch, _, height, width = shape
    if name == "mixed":
        return torch.randint(0, 3, (batch, height, width), generator=generator).byte()
    kind = {"objects": OBJECT, "background": BACKGROUND, "padding": PADDING}[name]
    return torch.full((batch, height, width), kind, dtype=torch.uint8)


def plainly(student: Tensor, teacher: Tensor, kinds: Tensor) -> list[Tensor]:
    """`1 / max(1, 2 C n) * sum((S - T)^2)` over the cells of either kind, of float64 maps."""
    squares, channels = (student - teacher).square().sum(dim=1), student.shape[1]
    chosen = [squares[kinds == kind] for kind in (OBJECT, BACKGROUND)]
    return [values.sum() / max(1, 2 * channels * len(values)) for values in chosen]


def check(shape: tuple[int, ...], formats: tuple[str, str], dtypes: tuple[torch.dtype, torch.dtype], name: str) -> None:
    """Hold both kernels to the formula in float64, and to the block-wise form."""
    generator = torch.Generator().manual_seed(sum(shape))
    student, teacher = (
        FORMATS[layout](torch.randn(shape, generator=generator).to(dtype))
        for layout, dtype in zip(formats, dtypes, strict=True)
    )
    kinds = kinds_of(name, shape, generator)
    student.requires_grad_()
    with mock.patch.object(losses, "kernels_for", return_value=kernels):
        ours = decoupled_feature_loss([student], [teacher], [kinds])
        gradient = torch.autograd.grad(4 * ours[0] + 16 * ours[1], student)[0]
        again = decoupled_feature_loss([student], [teacher], [kinds])
    assert all(one.dtype == torch.float32 for one in ours)
    assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True))
    assert gradient.dtype == student.dtype
    if formats[0] != "cut_out":
        assert gradient.stride() == student.stride()

    wide = student.detach().double().requires_grad_()
    plain = plainly(wide, teacher.double(), kinds)
    for mine, other in zip(ours, plain, strict=True):
        assert abs(mine.item() - other.item()) <= 2e-6 * abs(other.item())
    expected = torch.autograd.grad(4 * plain[0] + 16 * plain[1], wide)[0]
    # Difference, weight and product are rounded, and the smallest numbers of a half lie far apart.
    step = torch.finfo(student.dtype)
    allowed = 2 * step.eps * expected.abs() + step.smallest_normal * step.eps
    assert ((gradient.double() - expected).abs() <= allowed).all()

    blocks = decoupled_feature_loss([student], [teacher], [kinds])
    others = torch.autograd.grad(4 * blocks[0] + 16 * blocks[1], student)[0]
    # The interpreter cuts bfloat16 off where a GPU rounds it: `cvt.rn`, see `test_kernels.py`.
    assert student.dtype == torch.bfloat16 or torch.equal(gradient, others)
    assert torch.equal((gradient == 0).all(dim=1) | (kinds != PADDING), torch.ones_like(kinds, dtype=torch.bool))


def main(every: int) -> None:
    """Check shapes, and pairs of formats and dtypes, one case in `every`; raise at the first that is off."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    kernels.check(torch.device("cpu"))
    rng, count = random.Random(0), 0
    pairs = list(itertools.product(itertools.product(FORMATS, FORMATS), itertools.product(DTYPES, DTYPES)))
    cases = [(rng.choice(SHAPES), *pair, "mixed") for pair in pairs]
    cases += [(shape, layout, (torch.float32,) * 2, "mixed") for shape in SHAPES for layout, _ in pairs[::9]]
    cases += [((2, 65, 6, 11), layout, (torch.float32,) * 2, name) for name in KINDS for layout, _ in pairs[::9]]
    rng.shuffle(cases)
    cases = cases[::every]
    for limit, some in ((2**31, cases), (1, cases[::5])):  # the latter with 64-bit offsets
        with mock.patch.object(kernels, "_WIDE", limit):
            for case in some:
                try:
                    check(*case)
                except Exception as error:
                    raise AssertionError(f"limit {limit}, {case}") from error
                count += 1
    print(count, "cases")


if __name__ == "__main__":
    main(int(sys.argv[1]))
