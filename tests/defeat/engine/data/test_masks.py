"""Masks against loops over pixels and against COCO's own tool, and what strangers may send as one."""

from array import array

import numpy as np
import pytest
from pycocotools import mask as coco

from defeat.engine.data import masks
from defeat.engine.data.importing.segmentation import MAX_POINTS, Polygons, RunLengths, read_segmentation, runs_of
from defeat.engine.data.masks import MAX_RUNS, BadMask, area, check_runs, from_text, rasterise, to_bitmap, to_text


def inside(polygon, x, y):
    """The even-odd rule, by a ray upwards."""
    crossings = 0
    for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if min(x1, x2) <= x < max(x1, x2):
            crossings += y1 + (x - x1) * (y2 - y1) / (x2 - x1) <= y
    return crossings % 2 == 1


def drawn(polygons, height, width):
    bitmap = np.zeros((height, width), np.uint8)
    for row in range(height):
        for column in range(width):
            bitmap[row, column] = any(inside(polygon, column + 0.5, row + 0.5) for polygon in polygons)
    return bitmap


@pytest.mark.parametrize("seed", range(30))
def test_a_pixel_belongs_to_a_polygon_that_holds_its_centre(seed):
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(3, 24, 2))
    polygons = [rng.uniform(-6, 30, (int(rng.integers(3, 9)), 2)) for _ in range(int(rng.integers(1, 4)))]
    if seed % 2:  # corners and edges on centres and on borders
        polygons = [np.round(2 * polygon) / 2 for polygon in polygons]
    runs = rasterise(polygons, height, width)
    assert np.array_equal(to_bitmap(runs, height, width), drawn(polygons, height, width))
    assert np.array_equal(check_runs(runs, height * width), runs)


def distance(points, polygon):
    """From each point to the nearest edge."""
    start, along = polygon, np.roll(polygon, -1, axis=0) - polygon
    share = ((points[:, None] - start) * along).sum(axis=2) / (along**2).sum(axis=1)
    nearest = start + share.clip(0, 1)[..., None] * along
    return np.linalg.norm(points[:, None] - nearest, axis=2).min(axis=1)


def test_cocos_own_tool_draws_other_pixels_only_at_edges():
    rng = np.random.default_rng(0)
    other = together = 0
    for _ in range(200):
        height, width = (int(side) for side in rng.integers(20, 160, 2))
        polygon = rng.uniform(0, (width, height), (int(rng.integers(3, 12)), 2))
        ours = to_bitmap(rasterise([polygon], height, width), height, width)
        theirs = coco.decode(coco.frPyObjects([polygon.ravel().tolist()], height, width))[..., 0]
        rows, columns = np.nonzero(ours != theirs)
        assert not len(rows) or distance(np.stack([columns, rows], axis=1) + 0.5, polygon).max() < 0.2
        other, together = other + len(rows), together + int((ours | theirs).sum())
    assert other < 0.02 * together


def test_rectangles_on_whole_pixels_are_exact_in_both():
    polygon = np.array([[3, 2], [9, 2], [9, 7], [3, 7]], float)
    ours = to_bitmap(rasterise([polygon], 10, 12), 10, 12)
    assert np.array_equal(ours, coco.decode(coco.frPyObjects([polygon.ravel().tolist()], 10, 12))[..., 0])
    assert ours.sum() == ours[2:7, 3:9].sum() == 30


@pytest.mark.parametrize("seed", range(20))
def test_text_and_bitmaps_are_cocos(seed):
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(1, 300, 2))
    bitmap = (rng.random((height, width)) < rng.choice([0, 0.001, 0.5, 0.999, 1])).astype(np.uint8)
    bitmap[: height // 3] = seed % 2
    theirs = coco.encode(np.asfortranarray(bitmap))
    runs = from_text(theirs["counts"].decode())
    assert np.array_equal(to_bitmap(runs, height, width), bitmap)
    assert to_text(runs) == theirs["counts"].decode()
    assert area(runs) == coco.area(theirs) == bitmap.sum()


def test_numbers_of_any_size_survive_as_text():
    runs = np.array([0, 1, 2**31, 15, 16, 2**31, 0, 31, 32, 2**20, 1, 1], np.int64)
    assert np.array_equal(from_text(to_text(runs)), runs)


def test_runs_of_nothing_are_taken_together():
    assert check_runs(np.array([2, 0, 3, 4, 0, 1, 2]), 12).tolist() == [5, 5, 2]
    assert check_runs(np.array([0, 12, 0]), 12).tolist() == [0, 12]
    assert check_runs(np.array([12]), 12).tolist() == [12]


def test_a_bitmap_of_another_size_is_refused():
    with pytest.raises(ValueError, match="12 pixels are no mask of 5x2"):
        to_bitmap(np.array([3, 9]), 2, 5)


# ---- what strangers send ----


def test_what_is_empty_is_none():
    assert [read_segmentation(value) for value in (None, [], {})] == [None, None, None]


def test_each_form_is_the_same_mask():
    corners = [3, 2, 9, 2, 9, 7.0, 3, 7]
    runs = rasterise([np.array(corners, float).reshape(-1, 2)], 10, 12)
    forms = [
        [corners],
        [corners[:6], [*corners[4:], 3, 2]],  # two triangles
        {"size": [10, 12], "counts": runs.tolist()},
        {"size": [10, 12], "counts": to_text(runs)},
    ]
    for form in forms:
        assert np.array_equal(runs_of(read_segmentation(form), 10, 12), runs)


SIZE = {"size": [4, 3]}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("polygon", "is neither polygons nor runs"),
        (5, "is neither"),
        ([1, 2, 3, 4, 5, 6], "needs polygons"),
        ([[1, 2, 3, 4]], "of 3 points or more"),
        ([[1, 2, 3, 4, 5, 6, 7]], "needs polygons"),
        ([[]], "needs polygons"),
        ([[[[[]]]]], "needs polygons"),
        ([[1, 2, 3, 4, 5, "6"]], "has the coordinate 6;"),
        ([[1, 2, 3, 4, 5, True]], "has the coordinate True"),
        ([[1, 2, 3, 4, 5, None]], "has the coordinate None"),
        ([[1, 2, 3, 4, 5, float("nan")]], "has the coordinate nan"),
        ([[1, 2, 3, 4, 5, float("-inf")]], "has the coordinate -inf"),
        ([[1, 2, 3, 4, 5, 10**400]], "has the coordinate 1000"),
        ([[0.0, 1.0] * MAX_POINTS, [1, 2, 3, 4, 5, 6]], f"has more than {MAX_POINTS} points"),
        ({"counts": [12]}, r"needs a size \[height, width\], not None"),
        ({"size": [4, 3, 1], "counts": [12]}, "needs a size"),
        ({"size": [-4, -3], "counts": [12]}, "needs a size"),
        ({"size": [4.0, 3], "counts": [12]}, "needs a size"),
        ({"size": ["4", 3], "counts": [12]}, "needs a size"),
        ({"size": [10**400, 3], "counts": [12]}, "needs a size"),
        (SIZE, "needs counts"),
        ({**SIZE, "counts": {}}, "needs counts"),
        ({**SIZE, "counts": [1] * (MAX_RUNS + 1)}, "needs counts"),
        ({**SIZE, "counts": "0" * (7 * MAX_RUNS + 1)}, "needs counts"),
        ({**SIZE, "counts": [6, -1, 7]}, "has the count -1"),
        ({**SIZE, "counts": [6, 6.0]}, "has the count 6.0"),
        ({**SIZE, "counts": [10**400]}, "has the count 1000"),
    ],
)
def test_an_outline_of_another_form_is_refused(value, says):
    with pytest.raises(BadMask, match=says) as caught:
        read_segmentation(value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ([], "counts that are not its 12 pixels together"),
        ([6, 5], "counts that are not its 12"),
        ([6, 7], "counts that are not its 12"),
        ([2**31] * 100, "counts that are not its 12"),
        ("", "not COCO's compressed counts"),
        ("\0", "not COCO's"),
        ("é", "not COCO's"),
        ("\ud800", "not COCO's"),
        ("P", "not COCO's"),  # a first group that promises another
        ("6P", "not COCO's"),
        ("P" * 9 + "0", "a number that is too large"),
        ("6O7", "counts that are not its 12"),  # a negative one
        ("06" * 20, "counts that are not its 12"),
    ],
)
def test_counts_that_are_no_mask_are_refused(counts, says):
    with pytest.raises(BadMask, match=says):
        runs_of(read_segmentation({**SIZE, "counts": counts}), 4, 3)


def test_too_many_runs_as_text_are_refused():
    text = to_text(np.ones(MAX_RUNS + 1, np.int64))
    with pytest.raises(BadMask, match=f"has {MAX_RUNS + 1} runs"):
        runs_of(RunLengths(text, (MAX_RUNS + 1, 1)), MAX_RUNS + 1, 1)


def test_runs_of_another_size_are_refused():
    with pytest.raises(BadMask, match="is of an image of 3x4, and this is one of 4x3"):
        runs_of(RunLengths(array("q", [12]), (4, 3)), 3, 4)


def test_an_outline_that_crosses_a_wide_image_too_often_is_refused(monkeypatch):
    monkeypatch.setattr(masks, "MAX_CROSSINGS", 1000)
    zigzag = array("d", [number for index in range(60) for number in (50 * (index % 2), index)])
    with pytest.raises(BadMask, match="crosses columns of pixels 3000 times; at most 1000"):
        runs_of(Polygons((zigzag,)), 50, 50)


def test_the_farthest_coordinates_are_drawn():
    runs = runs_of(read_segmentation([[-1e7, -1e7, 1e7, -1e7, 1e7, 1e7, -1e7, 1e7]]), 30, 40)
    assert runs.tolist() == [0, 1200]
    runs = runs_of(read_segmentation([[-1e7, 10, 1e7, 10, 1e7, 20, -1e7, 20]]), 30, 40)
    assert to_bitmap(runs, 30, 40).sum() == 400
