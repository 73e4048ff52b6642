"""A training's images against their files: what differs or shows nothing is an error before much is trained."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from defeat.engine.data.loading.cache import ImageCache
from defeat.engine.data.loading.config import AugmentationConfig
from defeat.engine.data.loading.loader import ImageReader, TrainingBatches
from defeat.engine.data.loading.resize import InputSize
from defeat.engine.report import RunError
from defeat.engine.training.inspection import ImageCheck, check_images, require_intact
from tests.support.training import events, run, shapes, spec, write_run

EVERYTHING = AugmentationConfig(mosaic=0.3, zoom_out=0.3, iou_crop=0.3, scale_min=0.5, brightness=0.3, contrast=0.3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    shapes(root, train=8, val=2)
    return root / "canonical"


@pytest.fixture(scope="module")
def reader(dataset, tmp_path_factory):
    root = tmp_path_factory.mktemp("again")
    return ImageReader(root / "canonical", shapes(root, train=8, val=2).in_split("train"))


def batches(reader, augmentation):
    size = InputSize(min_size=64, max_size=96)
    return TrainingBatches(reader, batch_size=4, size=size, augmentation=augmentation, device=torch.device("cpu"))


@pytest.mark.parametrize("augmentation", [AugmentationConfig(), EVERYTHING], ids=["mirrored", "everything"])
def test_true_images_are_let_pass(reader, augmentation):
    made = batches(reader, augmentation)
    for seed in (1, 2):
        checks = [one for number, batch in enumerate(made.epoch(seed)) for one in check_images(batch, made, number)]
        assert len(checks) == 8
        assert not any(one.differs or one.constant for one in checks)
        require_intact(checks)


def test_images_that_differ_are_found_and_named(reader):
    made = batches(reader, AugmentationConfig())
    first, second = made.epoch(1)
    first.images[2].zero_()
    second.images[0].copy_(first.images[0])
    checks = [*check_images(first, made, 0), *check_images(second, made, 1)]
    assert [one.differs for one in checks] == [False, False, True, False, True, False, False, False]
    with pytest.raises(RunError, match="2 of the 8 first training images differ from their files, 1 of") as raised:
        require_intact(checks)
    assert (raised.value.failure_class, raised.value.code) == ("infra", "images_differ_from_files")
    assert checks[2].name in raised.value.detail
    assert checks[4].name in raised.value.detail


@pytest.mark.parametrize(
    ("constant", "count", "good"), [(0, 8, True), (4, 8, True), (5, 8, False), (8, 8, False), (7, 7, True)]
)
def test_images_that_show_nothing_are_an_error_if_most_do(constant, count, good):
    """Few images are not judged: a dataset may hold a black image, and a batch may be one image."""
    checks = [ImageCheck(f"{number}.png", differs=False, constant=number < constant) for number in range(count)]
    if good:
        require_intact(checks)
        return
    with pytest.raises(RunError, match=f"{constant} of the 8 first training images are of one colour") as raised:
        require_intact(checks)
    assert (raised.value.failure_class, raised.value.code) == ("data", "images_constant")


def test_the_number_of_checked_images_is_limited(reader):
    made = batches(reader, AugmentationConfig())
    batch = next(made.epoch(1))
    assert len(check_images(batch, made, 0, limit=3)) == 3
    assert len(check_images(batch, made, 0)) == 4


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_run_ends_when_its_images_turn_black(dataset, tmp_path, monkeypatch, epoch):
    """As they did when loader processes wrote into memory of their own: from the second epoch on."""
    plain, calls = ImageCache.get, []

    def _get(self, index, make):
        calls.append(index)
        image = plain(self, index, make)
        return image if len(calls) <= 8 * epoch else torch.zeros_like(image)

    monkeypatch.setattr(ImageCache, "get", _get)
    job = spec(teacher=None, distillation={"method": "baseline"})
    result = run(write_run(tmp_path / "run", dataset, job))
    assert result["status"] == "failed"
    assert result["failure"]["code"] == "images_differ_from_files"
    assert (
        "4 of the 4 first training images differ from their files, 4 of them of one colour"
        in (result["failure"]["detail"])
    )
    steps = [line["step"] for line in events(tmp_path / "run", "metrics")]
    assert steps == [2][:epoch]


def test_a_run_on_images_that_show_nothing_fails(tmp_path):
    data = shapes(tmp_path, train=8, val=2)
    for image in data.in_split("train"):
        Image.new("RGB", (96, 64)).save(Path(tmp_path, "canonical", image.file))
    job = spec(teacher=None, distillation={"method": "baseline"})
    result = run(write_run(tmp_path / "run", tmp_path / "canonical", job))
    assert result["failure"]["code"] == "images_constant"
