"""What the record of waiting operations sees, and what it leaves alone."""

import pytest
import torch

from tests.support.device_waits import Waits, fake_cuda


@pytest.mark.parametrize(
    ("work", "found"),
    [
        (lambda cuda: torch.tensor([1.0, 2.0], device="cuda"), True),
        (lambda cuda: torch.ones(3).to("cuda"), True),
        (lambda cuda: torch.ones(3).to("cuda", non_blocking=True), False),
        (lambda cuda: torch.empty(3, device="cuda").copy_(torch.ones(3)), True),
        (lambda cuda: cuda.cpu(), True),
        (lambda cuda: cuda.to("cpu", non_blocking=True), True),
        (lambda cuda: torch.full((), 2.0, device="cuda"), False),
        (lambda cuda: torch.arange(3, device="cuda") + cuda.sum(), False),
        (lambda cuda: cuda.half(), False),
        (lambda cuda: cuda.masked_fill_(cuda > 0, 1.0), False),
        (lambda cuda: cuda.masked_fill_(cuda > 0, cuda.sum()), True),
    ],
)
def test_copies_between_devices_wait(work, found):
    with fake_cuda() as waits:
        work(torch.empty(3, device="cuda"))
    assert bool(waits.found) == found


@pytest.mark.parametrize(
    ("work", "found"),
    [
        (lambda x: x.sum().item(), ["aten::_local_scalar_dense"]),
        (lambda x: x[x > 0], ["aten::index"]),
        (lambda x: torch.where(x > 0)[0], ["aten::nonzero"]),
        (lambda x: x.clone().masked_fill_(x > 0, 1.0), []),
        (lambda x: x[torch.tensor([0, 1])], []),
        (lambda x: torch.where(x > 0, x, 0.0), []),
    ],
)
def test_shapes_and_values_from_the_device_wait(work, found):
    with Waits() as waits:
        work(torch.ones(3))
    assert waits.found == found
