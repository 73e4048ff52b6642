"""Training batches: what is in them follows from the seed alone, wherever they begin and whoever loads them."""

import hashlib
import io
import itertools
import subprocess
import sys
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import vgg

from defeat.engine import detectors
from defeat.engine.data.canonical import AnnotatedImage, Box
from defeat.engine.data.loading import loader
from defeat.engine.data.loading.config import AugmentationConfig
from defeat.engine.data.loading.loader import ImageReader, TrainingBatches, read_image
from defeat.engine.data.loading.resize import InputSize, disable_training_resize
from defeat.engine.data.masks import to_text
from defeat.engine.detectors import DETECTORS
from tests.support.ssd import NARROW_VGG
from tests.support.training import CLASSES, TINY, shapes

# Of a machine without a GPU and with few processors, where loader processes are tried all the same.
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning", "ignore:This DataLoader will:UserWarning")
SIZE = InputSize(min_size=64, max_size=96)
CPU = torch.device("cpu")
CUDA = torch.device("cuda")
EVERYTHING = AugmentationConfig(
    mosaic=0.5, zoom_out=0.3, iou_crop=0.5, vertical_flip=0.5, scale_min=0.5, scale_max=1.2, hue=0.1
)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    return ImageReader(root / "canonical", shapes(root, train=11, val=1).in_split("train"))


def batches(reader, augmentation=None, **changes):
    augmentation = augmentation or AugmentationConfig()
    options = {"batch_size": 4, "size": SIZE, "augmentation": augmentation, "device": CPU, **changes}
    return TrainingBatches(reader, **options)


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
def test_an_epoch_follows_from_its_seed(reader, augmentation):
    first = batches(reader, augmentation)
    assert len(first) == 2  # the last three are left out
    epoch = list(first.epoch(7))
    assert same(epoch, list(first.epoch(7)))  # from memory now
    assert same(epoch, list(batches(reader, augmentation, cache_bytes=0).epoch(7)))
    other = list(first.epoch(8))
    assert any(not torch.equal(a, b) for a, b in zip(epoch[0].images, other[0].images, strict=True))


def test_the_global_generator_is_left_alone(reader):
    before = torch.get_rng_state()
    list(batches(reader, EVERYTHING).epoch(7))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_start_leaves_batches_out_and_does_not_load_them(reader, monkeypatch):
    whole = list(batches(reader, batch_size=2).epoch(3))
    read = []
    original = loader.read_image
    monkeypatch.setattr(loader, "read_image", lambda path: read.append(path) or original(path))
    assert same(whole[3:], list(batches(reader, batch_size=2).epoch(3, start=3)))
    assert len(read) == 4
    assert list(batches(reader, batch_size=2).epoch(3, start=5)) == []


def test_batches_are_made_when_they_are_asked_for(reader, monkeypatch):
    read = []
    original = loader.read_image
    monkeypatch.setattr(loader, "read_image", lambda path: read.append(path) or original(path))
    epoch = batches(reader).epoch(0)
    assert read == []
    next(epoch)
    assert len(read) == 4


def test_ranks_share_each_batch(reader):
    whole = list(batches(reader, EVERYTHING).epoch(5))
    shares = [list(batches(reader, EVERYTHING, rank=rank, world_size=2).epoch(5)) for rank in (0, 1)]
    for batch, left, right in zip(whole, *shares, strict=True):
        assert len(left.images) == len(right.images) == 2
        assert all(map(torch.equal, batch.images, [*left.images, *right.images]))


SINGLE = {
    "as it is": {"horizontal_flip": 0.0},
    "mirrored": {},
    "vertical_flip": {"vertical_flip": 0.5},
    "mosaic": {"mosaic": 0.5},
    "zoom_out": {"zoom_out": 0.5},
    "iou_crop": {"iou_crop": 0.5},
    "scale": {"scale_min": 0.5, "scale_max": 1.2},
    "hue": {"hue": 0.1},
}


def prefetch_by(monkeypatch, processes):
    """Let trainings on a GPU have so many loader processes, whatever this machine has; there is no GPU to pin for."""
    monkeypatch.setattr(loader, "_processors", lambda: processes)


def refuse(tensor):
    raise AssertionError(f"a tensor of {tuple(tensor.shape)} is sent to another process")


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("changes", [EVERYTHING, *(AugmentationConfig(**changes) for changes in SINGLE.values())])
def test_loader_processes_give_the_images_of_one_process(reader, monkeypatch, processes, changes):
    """Three epochs: in the later ones, images come from memory that the processes share."""
    prefetch_by(monkeypatch, processes)
    # In the children, too, which are forked.
    monkeypatch.setitem(ForkingPickler._extra_reducers, torch.Tensor, refuse)
    plain, ahead = batches(reader, changes, batch_size=2), batches(reader, changes, batch_size=2, device=CUDA)
    assert (plain.prefetch.processes, ahead.prefetch.processes) == (0, processes)
    abandoned = ahead.epoch(1)
    next(abandoned)
    del abandoned
    for seed in (4, 5, 6):
        expected, found = list(plain.epoch(seed)), list(ahead.epoch(seed))
        assert same(expected, found)
        for batch in found:
            # Images are views of their batch, which has exactly their bytes for itself.
            assert batch.storage.untyped_storage().nbytes() == len(batch.storage)
            assert all(image.untyped_storage().data_ptr() == batch.storage.data_ptr() for image in batch.images)
    assert ahead.cache.kept == plain.cache.kept > 0


def test_loader_processes_hand_masks_over(masked, monkeypatch):
    prefetch_by(monkeypatch, 2)
    plain, ahead = (batches(masked, EVERYTHING, masks=True, device=device) for device in (CPU, CUDA))
    for seed in (4, 5):
        for one, other in zip(plain.epoch(seed), ahead.epoch(seed), strict=True):
            for target, alike in zip(one.targets, other.targets, strict=True):
                assert torch.equal(target["masks"], alike["masks"])


def test_a_batch_stays_what_it_is_when_later_ones_are_loaded(reader, monkeypatch):
    prefetch_by(monkeypatch, 2)
    ahead = batches(reader, batch_size=1, device=CUDA)
    kept, copies = [], []
    for batch in ahead.epoch(3):
        kept.append(batch)
        copies.append(batch.storage.clone())
    assert len(kept) == 11 > ahead.prefetch.slots
    assert all(map(torch.equal, (batch.storage for batch in kept), copies))


def test_what_is_loaded_ahead_fits_into_memory(reader, monkeypatch):
    prefetch_by(monkeypatch, 8)
    size = batches(reader).batch_bytes
    for limit, processes, ahead in (
        (17 * size, 8, 2),
        (17 * size - 1, 8, 1),
        (8 * size, 7, 1),
        (2 * size, 1, 1),
        (2 * size - 1, 0, 0),
    ):
        monkeypatch.setattr(loader, "default_limit", lambda world_size, limit=limit: limit)
        found = batches(reader, device=CUDA)
        assert (found.prefetch.processes, found.prefetch.batches) == (processes, ahead)
        assert found.wanted_prefetch.slots == 17
    assert same(list(found.epoch(3)), list(batches(reader).epoch(3)))


@pytest.mark.parametrize("changes", [*SINGLE.values(), {"mosaic": 1.0, "iou_crop": 1.0, "scale_max": 3.0}])
def test_no_batch_is_larger_than_what_is_set_aside(reader, masked, changes):
    for split in (reader, masked):
        found = batches(split, AugmentationConfig(**changes), masks=True)
        for batch in found.epoch(1):
            assert len(batch.storage) <= found.batch_bytes


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux reports how much a process shares")
def test_loader_processes_share_the_records(reader):
    """Records as Python objects would be copied page by page, 90 MB of them here, as each is read.

    In a process of its own: what else a process holds decides which pages its children copy.
    """
    code = f"from tests.defeat.engine.data.loading.test_loader import grown; grown({str(reader.root)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert max(map(int, done.stdout.split())) < 12e6


def grown(root):
    """Print by how many bytes that they do not share two loader processes grow over 20,000 records each."""
    image = AnnotatedImage(1, f"images/{0:064x}.png", "x.png", 96, 64, "train", ())
    boxes = [[Box(0, 1.0 + n, 2.0, 30.0 + n, 40.0) for n in range(8)] for _ in range(60_000)]
    many = [replace(image, id=number, boxes=tuple(its)) for number, its in enumerate(boxes)]
    ImageReader.read = lambda self, index: torch.zeros(3, 64, 96, dtype=torch.uint8)
    loader._processors = lambda: 2
    ahead = batches(ImageReader(Path(root), many), batch_size=100, cache_bytes=0, device=CUDA)
    epoch = ahead.epoch(0)
    next(epoch)
    workers = [process.pid for process in ahead._loader._iterator._workers]
    before = [private_bytes(pid) for pid in workers]
    for _ in itertools.islice(epoch, 400):
        pass
    print(*(private_bytes(pid) - first for pid, first in zip(workers, before, strict=True)))


def private_bytes(pid):
    lines = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if ":" in line[:30]
    )
    return sum(int(lines[name].split()[0]) * 1024 for name in ("Private_Dirty", "Private_Clean"))


def test_the_shapes_of_a_batch_are_counted(reader, tmp_path):
    assert batches(reader).padded_shapes == 1
    assert batches(reader, AugmentationConfig(scale_max=1.5)).padded_shapes is None
    assert batches(reader, AugmentationConfig(iou_crop=0.5)).padded_shapes is None
    tall = replace(reader.images[0], height=96, width=64)
    mixed = ImageReader(tmp_path, [tall, *reader.images])
    assert batches(mixed).padded_shapes == 4


def test_images_come_at_the_detectors_size_with_their_boxes(tmp_path):
    pixels = np.zeros((150, 200, 3), np.uint8)
    pixels[30:90, 40:100] = 255
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    file = f"images/{hashlib.sha256(data.getvalue()).hexdigest()}.png"
    (tmp_path / "images").mkdir()
    (tmp_path / file).write_bytes(data.getvalue())
    boxes = (Box(0, 40, 30, 100, 90), Box(1, 0, 0, 9, 9, crowd=True))
    reader = ImageReader(tmp_path, [AnnotatedImage(1, file, "x.png", 200, 150, "train", boxes)])
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
    return ImageReader(root / "canonical", shapes(root, train=8, val=1, masks=True).in_split("train"))


def test_masks_are_the_images_own(masked):
    for index, image in enumerate(masked.images):
        target = masked.target(index, masks=True)
        assert target["masks"].shape == (len(image.boxes), image.height, image.width)
        bright = masked.read(index)[0] == 230
        assert torch.equal(target["masks"].sum(dim=0).bool(), bright)
        for mask, box in zip(target["masks"], image.boxes, strict=True):
            assert mask.sum() == mask[int(box.y1) : int(box.y2), int(box.x1) : int(box.x2)].sum() > 0
        assert masked.target(index).keys() == {"boxes", "labels"}


def test_batches_have_masks_where_the_detector_wants_them_and_the_data_has_some(masked, reader):
    plain = list(batches(masked, EVERYTHING).epoch(2))
    whole = list(batches(masked, EVERYTHING, masks=True).epoch(2))
    assert same(plain, whole)
    for batch in whole:
        for image, target in zip(batch.images, batch.targets, strict=True):
            assert target["masks"].shape == (len(target["boxes"]), *image.shape[-2:])
        moved = batch.to(torch.device("meta")).targets
        assert all(target[name].is_meta for target in moved for name in ("boxes", "labels", "masks"))
        assert [target["masks"].shape for target in moved] == [target["masks"].shape for target in batch.targets]
    for batch in (*plain, *batches(reader, EVERYTHING, masks=True).epoch(2)):
        assert all(target.keys() == {"boxes", "labels"} for target in batch.targets)


@pytest.mark.gpu
def test_batches_for_a_gpu_are_pinned(masked):
    for batch in batches(masked, EVERYTHING, masks=True, device=CUDA).epoch(2):
        assert batch.storage.is_pinned()
        assert torch.equal(batch.to(CUDA).storage.cpu(), batch.storage)


def test_a_box_without_a_mask_has_an_empty_one_among_others(tmp_path):
    runs = to_text(np.array([2, 3, 7]))  # of an image of 3x4: the lower half of the first column, and one more
    boxes = (Box(0, 0, 0, 2, 4, mask=runs), Box(0, 1, 1, 3, 4), Box(0, 0, 0, 3, 4, crowd=True))
    reader = ImageReader(tmp_path, [AnnotatedImage(1, "images/x.png", "x.png", 3, 4, "train", boxes)])
    assert reader.has_masks
    first, second = reader.target(0, masks=True)["masks"]
    assert first.tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert not second.any()


def test_a_image_is_read_as_it_is_stored(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn, which must not be applied
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "x.png"), torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("family", DETECTORS)
def test_every_detector_trains_on_images_without_boxes(family, monkeypatch):
    monkeypatch.setitem(vgg.cfgs, "D", NARROW_VGG)
    config = DETECTORS[family].config
    small = {**TINY, "pyramid_channels": 32, "architecture": family}
    # Families on one backbone have their own strides, too.
    fixed = set() if config.model_fields["backbone"].is_required() else {"backbone", "strides"}
    torch.manual_seed(0)
    detector = detectors.build(
        {key: small[key] for key in small if key in config.model_fields and key not in fixed}, CLASSES
    ).train()
    disable_training_resize(detector)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    passed = detector.forward_train([torch.rand(3, 64, 96), torch.rand(3, 64, 96)], [empty, empty])
    total = torch.stack(list(passed.losses.values())).sum()
    assert torch.isfinite(total)
    total.backward()
