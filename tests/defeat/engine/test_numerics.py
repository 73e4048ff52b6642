"""What CUDA is told while a step runs, and that it is told otherwise afterwards."""

import pytest
import torch

from defeat.engine.numerics import MAX_SHAPES, PRECISIONS, numerics

CUDA = torch.device("cuda")


def told():
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("shapes", "search"), [(1, True), (MAX_SHAPES, True), (MAX_SHAPES + 1, False), (None, False)])
def test_products_and_convolutions_follow_the_precision_and_the_shapes(precision, shapes, search):
    before, exact = told(), precision == "float32"
    with numerics(CUDA, precision, shapes=shapes):
        assert told() == ("highest" if exact else "high", not exact, search)
    assert told() == before


def test_a_cpu_is_told_nothing():
    before = told()
    with numerics(torch.device("cpu"), "float32", shapes=1):
        assert told() == before
