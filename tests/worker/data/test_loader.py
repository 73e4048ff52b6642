"""Training batches: what is in them follows from the seed alone, wherever they begin and whoever loads them."""

import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import vgg

from tests.worker.detectors.support_ssd import NARROW_VGG
from tests.worker.support_engine import CLASSES, TINY, shapes
from worker import detectors
from worker.data import loader
from worker.data.canonical import Box, Picture
from worker.data.loader import PictureReader, TrainingBatches, read_picture
from worker.data.masks import to_text
from worker.data.resize import InputSize
from worker.detectors import DETECTORS
from worker.engine.config import AugmentationConfig

SIZE = InputSize(min_size=64, max_size=96)
CPU = torch.device("cpu")
EVERYTHING = AugmentationConfig(
    mosaic=0.5, zoom_out=0.3, iou_crop=0.5, vertical_flip=0.5, scale_min=0.5, scale_max=1.2, hue=0.1
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    return PictureReader(root / "canonical", shapes(root, train=11, val=1).in_split("train"))


def batches(pictures, augmentation=None, **changes):
    augmentation = augmentation or AugmentationConfig()
    options = {"batch_size": 4, "size": SIZE, "augmentation": augmentation, "device": CPU, **changes}
    return TrainingBatches(pictures, **options)


def same(one, other):
    assert len(one) == len(other)
    for batch, twin in zip(one, other, strict=True):
        assert len(batch.images) == len(twin.images)
        assert all(map(torch.equal, batch.images, twin.images))
        for target, alike in zip(batch.targets, twin.targets, strict=True):
            assert torch.equal(target["boxes"], alike["boxes"])
            assert torch.equal(target["labels"], alike["labels"])
    return True


@pytest.mark.parametrize("augmentation", [AugmentationConfig(), EVERYTHING], ids=["mirrored", "everything"])
def test_an_epoch_follows_from_its_seed(pictures, augmentation):
    first = batches(pictures, augmentation)
    assert len(first) == 2  # the last three are left out
    epoch = list(first.epoch(7))
    assert same(epoch, list(first.epoch(7)))  # from memory now
    assert same(epoch, list(batches(pictures, augmentation, cache_bytes=0).epoch(7)))
    other = list(first.epoch(8))
    assert any(not torch.equal(a, b) for a, b in zip(epoch[0].images, other[0].images, strict=True))


def test_the_global_generator_is_left_alone(pictures):
    before = torch.get_rng_state()
    list(batches(pictures, EVERYTHING).epoch(7))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_start_leaves_batches_out_and_does_not_load_them(pictures, monkeypatch):
    whole = list(batches(pictures, batch_size=2).epoch(3))
    read = []
    original = loader.read_picture
    monkeypatch.setattr(loader, "read_picture", lambda path: read.append(path) or original(path))
    assert same(whole[3:], list(batches(pictures, batch_size=2).epoch(3, start=3)))
    assert len(read) == 4
    assert list(batches(pictures, batch_size=2).epoch(3, start=5)) == []


def test_batches_are_made_when_they_are_asked_for(pictures, monkeypatch):
    read = []
    original = loader.read_picture
    monkeypatch.setattr(loader, "read_picture", lambda path: read.append(path) or original(path))
    epoch = batches(pictures).epoch(0)
    assert read == []
    next(epoch)
    assert len(read) == 4


def test_ranks_share_each_batch(pictures):
    whole = list(batches(pictures, EVERYTHING).epoch(5))
    shares = [list(batches(pictures, EVERYTHING, rank=rank, world=2).epoch(5)) for rank in (0, 1)]
    for batch, left, right in zip(whole, *shares, strict=True):
        assert len(left.images) == len(right.images) == 2
        assert all(map(torch.equal, batch.images, [*left.images, *right.images]))


def test_processes_that_load_ahead_give_the_same(pictures):
    plain = batches(pictures, EVERYTHING)
    ahead = batches(pictures, EVERYTHING)
    ahead._loader = torch.utils.data.DataLoader(
        ahead._loader.dataset,
        batch_sampler=ahead._order,
        collate_fn=ahead._loader.collate_fn,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    abandoned = ahead.epoch(1)
    next(abandoned)
    del abandoned
    for seed in (4, 5):  # the second by the same processes, whose pictures this one sees
        assert same(list(plain.epoch(seed)), list(ahead.epoch(seed)))
    assert ahead.cache.kept > 0


def test_pictures_come_at_the_detectors_size_with_their_boxes(tmp_path):
    pixels = np.zeros((150, 200, 3), np.uint8)
    pixels[30:90, 40:100] = 255
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    file = f"images/{hashlib.sha256(data.getvalue()).hexdigest()}.png"
    (tmp_path / "images").mkdir()
    (tmp_path / file).write_bytes(data.getvalue())
    boxes = (Box(0, 40, 30, 100, 90), Box(1, 0, 0, 9, 9, crowd=True))
    reader = PictureReader(tmp_path, [Picture(1, file, "x.png", 200, 150, "train", boxes)])
    size = InputSize(min_size=50, max_size=80)
    (batch,) = batches(reader, AugmentationConfig(horizontal_flip=0), batch_size=1, size=size).epoch(0)
    assert batch.images[0].shape == (3, 50, 66)
    expected = torch.tensor([[40 * 66 / 200, 30 / 3, 100 * 66 / 200, 90 / 3]])
    torch.testing.assert_close(batch.targets[0]["boxes"], expected)
    rows, columns = torch.nonzero(batch.images[0][0] > 127, as_tuple=True)
    ends = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert (ends - expected[0]).abs().max() <= 1


# ---- masks ----


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    root = tmp_path_factory.mktemp("masked")
    return PictureReader(root / "canonical", shapes(root, train=8, val=1, masks=True).in_split("train"))


def test_masks_are_the_pictures_own(masked):
    for index, image in enumerate(masked.images):
        target = masked.target(index, masks=True)
        assert target["masks"].shape == (len(image.boxes), image.height, image.width)
        bright = masked.read(index)[0] == 230
        assert torch.equal(target["masks"].sum(dim=0).bool(), bright)
        for mask, box in zip(target["masks"], image.boxes, strict=True):
            assert mask.sum() == mask[int(box.y1) : int(box.y2), int(box.x1) : int(box.x2)].sum() > 0
        assert masked.target(index).keys() == {"boxes", "labels"}


def test_batches_have_masks_where_the_detector_wants_them_and_the_data_has_some(masked, pictures):
    plain = list(batches(masked, EVERYTHING).epoch(2))
    whole = list(batches(masked, EVERYTHING, masks=True).epoch(2))
    assert same(plain, whole)
    for batch in whole:
        for image, target in zip(batch.images, batch.targets, strict=True):
            assert target["masks"].shape == (len(target["boxes"]), *image.shape[-2:])
        moved = batch.targets_on(torch.device("meta"))
        assert all(target[name].is_meta for target in moved for name in ("boxes", "labels", "masks"))
        assert [target["masks"].shape for target in moved] == [target["masks"].shape for target in batch.targets]
    for batch in (*plain, *batches(pictures, EVERYTHING, masks=True).epoch(2)):
        assert all(target.keys() == {"boxes", "labels"} for target in batch.targets)


@pytest.mark.gpu
def test_masks_are_pinned_with_the_rest(masked):
    for batch in batches(masked, EVERYTHING, masks=True).epoch(2):
        pinned = batch.pin_memory()
        tensors = [*pinned.images, *(tensor for target in pinned.targets for tensor in target.values())]
        assert len(tensors) == 4 * len(pinned.images)
        assert all(tensor.is_pinned() for tensor in tensors)


def test_a_box_without_a_mask_has_an_empty_one_among_others(tmp_path):
    runs = to_text(np.array([2, 3, 7]))  # of a picture of 3x4: the lower half of the first column, and one more
    boxes = (Box(0, 0, 0, 2, 4, mask=runs), Box(0, 1, 1, 3, 4), Box(0, 0, 0, 3, 4, crowd=True))
    reader = PictureReader(tmp_path, [Picture(1, "images/x.png", "x.png", 3, 4, "train", boxes)])
    assert reader.has_masks
    first, second = reader.target(0, masks=True)["masks"]
    assert first.tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert not second.any()


def test_a_picture_is_read_as_it_is_stored(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter, which nobody does here
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    assert torch.equal(read_picture(tmp_path / "x.png"), torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("family", DETECTORS)
def test_every_detector_trains_on_pictures_without_boxes(family, monkeypatch):
    monkeypatch.setitem(vgg.cfgs, "D", NARROW_VGG)
    config = DETECTORS[family].config
    small = {**TINY, "pyramid_channels": 32, "architecture": family}
    # Families on one backbone have their own strides, too.
    fixed = set() if config.model_fields["backbone"].is_required() else {"backbone", "strides"}
    torch.manual_seed(0)
    detector = detectors.build(
        {key: small[key] for key in small if key in config.model_fields and key not in fixed}, CLASSES
    ).train()
    InputSize.taken_from(detector)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    passed = detector.train_pass([torch.rand(3, 64, 96), torch.rand(3, 64, 96)], [empty, empty])
    total = torch.stack(list(passed.losses.values())).sum()
    assert torch.isfinite(total)
    total.backward()
