"""A batch in one tensor: its content survives on any device and in any split."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defeat.engine.data.loading.batch import Batch, max_bytes
from defeat.engine.data.loading.prefetch import SharedSlots
from tests.support.device_waits import fake_cuda


def sample(height, width, boxes, masks=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    target = {
        "boxes": torch.rand(boxes, 4, generator=generator),
        "labels": torch.randint(1, 9, (boxes,), generator=generator),
    }
    if masks:
        target["masks"] = torch.randint(0, 2, (boxes, height, width), generator=generator, dtype=torch.uint8)
    return image, target


def same(batch, samples):
    assert len(batch) == len(batch.images) == len(batch.targets) == len(samples)
    for image, values, target, (expected, truth) in zip(
        batch.images, batch.floats(), batch.targets, samples, strict=True
    ):
        assert torch.equal(image, expected)
        assert torch.equal(values, expected.float() / 255)
        assert target.keys() == truth.keys()
        for name, tensor in truth.items():
            assert target[name].dtype == tensor.dtype
            assert torch.equal(target[name], tensor)
    return True


samples = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 4), st.booleans()), min_size=1, max_size=5
)


@settings(max_examples=60, deadline=None)
@given(samples, st.integers(1, 3))
def test_what_is_put_in_comes_out(shapes, parts):
    whole = [sample(*shape, seed=number) for number, shape in enumerate(shapes)]
    batch = Batch.of(whole)
    assert same(batch, whole)
    assert batch.storage.untyped_storage().nbytes() == len(batch.storage)
    size = len(whole) // parts
    pieces = list(batch.split(parts)) if size else []
    for number, piece in enumerate(pieces):
        assert same(piece, whole[number * size : (number + 1) * size])
    height, width, boxes, _ = (max(values) for values in zip(*shapes, strict=True))
    assert len(batch.storage) <= max_bytes(len(whole), pixels=height * width, boxes=boxes, masks=True)


def test_an_interleaved_image_is_put_in_as_planes():
    image = torch.from_numpy(np.arange(60, dtype=np.uint8).reshape(4, 5, 3)).permute(2, 0, 1)
    assert same(Batch.of([(image, sample(4, 5, 1)[1])]), [(image, sample(4, 5, 1)[1])])


def test_a_batch_goes_to_a_gpu_by_one_copy():
    batch = Batch.of([sample(9, 7, 2, masks=True), sample(5, 5, 0)])
    with fake_cuda() as waits:
        moved = batch.to(torch.device("cuda"))
        for piece in moved.split(2):
            assert all(one.is_cuda for one in piece.floats())
            assert all(tensor.is_cuda for target in piece.targets for tensor in target.values())
    assert waits.found == []  # the copy itself is asynchronous


def test_a_slot_holds_a_batch_until_the_next_one():
    slots = SharedSlots(2, 1000)
    first, second, third = ([sample(9, 7, 2, seed=seed)] for seed in (1, 2, 3))
    shared = slots.write(first, 0), slots.write(second, 1)
    copies = [one.copy() for one in shared]
    slots.write(third, 0)
    assert same(copies[0], first)
    assert same(copies[1], second)
    assert same(shared[0].copy(), third)  # what was in the slot is gone


def test_a_batch_that_is_too_large_for_its_slot_is_an_error():
    with pytest.raises(ValueError, match=r"a batch of 1 images takes 4928 bytes, and 4864 were reserved for it"):
        SharedSlots(2, 4860).write([sample(40, 41, 0)], 0)
