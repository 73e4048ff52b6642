"""Which images share a batch: similar shapes, in an order that follows from the seed, and every image as often."""

import itertools
from collections import Counter

import numpy as np
import pytest

from benchmarks.padding import coco_like, padded_share
from defeat.engine.data.loading.order import BatchOrder


def order(sizes, batch_size, seed=0, **options):
    made = BatchOrder(sizes, batch_size=batch_size, **{"rank": 0, "world_size": 1, **options})
    made.seed = seed
    return made


@pytest.mark.parametrize("batch_size", [2, 4, 8, 16])
def test_a_batch_is_hardly_padded(batch_size):
    sizes = coco_like(5000)
    batches = order(sizes, batch_size).batches()
    mixed = np.random.default_rng(1).permutation(5000)[: len(batches) * batch_size].reshape(-1, batch_size)
    assert padded_share(sizes, mixed) > 1.15
    assert padded_share(sizes, batches) < 1.06


def test_a_small_dataset_is_grouped_too_and_its_batches_differ_from_epoch_to_epoch():
    sizes = coco_like(200)
    epochs = [order(sizes, 8, seed=seed).batches() for seed in range(20)]
    assert max(padded_share(sizes, batches) for batches in epochs) < 1.2
    partners = Counter(
        pair for batches in epochs for batch in batches for pair in itertools.combinations(sorted(batch), 2)
    )
    assert max(partners.values()) <= 12  # no two are together in nearly every epoch


def test_every_image_comes_as_often_and_anywhere():
    sizes = coco_like(50)
    places = np.zeros((50, 12))
    for seed in range(400):
        batches = order(sizes, 4, seed=seed).batches()
        flat = list(itertools.chain(*batches))
        assert len(set(flat)) == len(flat) == 48
        for place, batch in enumerate(batches):
            places[batch, place] += 1
    # 32 times each on average: within five deviations.
    assert places.min() > 4
    assert places.max() < 61


def test_images_of_one_shape_come_in_the_plain_random_order():
    batches = order([(64, 96)] * 11, 4, seed=7).batches()
    flat = list(itertools.chain(*batches))
    assert len(batches) == 2
    assert flat != sorted(flat)
    assert batches == order([(64, 96)] * 11, 4, seed=7).batches() != order([(64, 96)] * 11, 4, seed=8).batches()


def test_requests_are_the_batches_of_this_rank_with_slots_in_turn():
    sizes = coco_like(40)
    whole = order(sizes, 8, seed=3).batches()
    for rank in (0, 1):
        mine = order(sizes, 8, seed=3, rank=rank, world_size=2, slots=3)
        requests = list(mine)
        assert [request.slot for request in requests] == [0, 1, 2, 0, 1]
        assert [[index for _, index in request.samples] for request in requests] == [
            batch[4 * rank : 4 * rank + 4] for batch in whole
        ]
        assert all(seed == 3 for request in requests for seed, _ in request.samples)
        assert mine.samples(2) == requests[2].samples
        mine.start = 2
        assert [request.samples for request in mine] == [request.samples for request in requests[2:]]
