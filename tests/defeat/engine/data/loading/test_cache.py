"""Images kept in memory: the same bytes, made once, within the limit, for all processes."""

import multiprocessing

import pytest
import torch

from defeat.engine.data.loading import cache
from defeat.engine.data.loading.cache import ImageCache, default_limit

SIZES = [(4, 6), (5, 3), (8, 8)]


def image(index):
    return torch.full((3, *SIZES[index]), index + 1, dtype=torch.uint8)


def never():
    raise AssertionError("made again")


def test_a_image_is_made_once():
    kept = ImageCache(SIZES, limit=10_000)
    assert (kept.places, kept.kept) == (3, 0)
    for index in (2, 0, 1):
        assert torch.equal(kept.get(index, lambda index=index: image(index)), image(index))
    assert kept.kept == 3
    for index in range(3):
        assert torch.equal(kept.get(index, never), image(index))


@pytest.mark.parametrize(("limit", "places"), [(0, 0), (127, 0), (128, 1), (192, 2), (383, 2), (384, 3)])
def test_what_does_not_fit_is_made_each_time(limit, places):
    kept = ImageCache(SIZES, limit=limit)
    assert kept.places == places
    assert kept.size <= limit
    for _ in range(2):
        for index in range(3):
            assert torch.equal(kept.get(index, lambda index=index: image(index)), image(index))
    assert kept.kept == places


def test_forked_processes_share_it():
    kept = ImageCache(SIZES, limit=10_000)
    child = multiprocessing.get_context("fork").Process(target=kept.get, args=(1, lambda: image(1)))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert torch.equal(kept.get(1, never), image(1))


def test_the_limit_follows_free_memory(monkeypatch):
    monkeypatch.setattr(cache, "_free_memory", lambda: 400)
    assert default_limit() == 100
    assert default_limit(processes=4) == 25
    monkeypatch.setattr(cache, "_free_memory", lambda: 1 << 50)
    assert default_limit() == 2 * 1024**3
    monkeypatch.undo()
    assert 0 < default_limit() <= 2 * 1024**3
