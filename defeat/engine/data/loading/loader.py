"""From a canonical dataset's files to training batches."""

import gc
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from defeat.engine.data.canonical import AnnotatedImage
from defeat.engine.data.loading.augment import Augmentation
from defeat.engine.data.loading.batch import Batch, Sample, max_bytes
from defeat.engine.data.loading.cache import ImageCache, default_limit
from defeat.engine.data.loading.config import AugmentationConfig
from defeat.engine.data.loading.order import BatchOrder, Request
from defeat.engine.data.loading.prefetch import Prefetch, SharedBatch, SharedSlots
from defeat.engine.data.loading.resize import InputSize, resize, resize_target
from defeat.engine.data.masks import from_text, to_bitmap
from defeat.engine.detectors.base import Target

MAX_PROCESSES = 8
PREFETCH_FACTOR = 2  # batches that each process prefetches
_PADDED = 32  # px: torchvision's transforms pad each side of a batch to a multiple of it


def read_image(path: Path) -> Tensor:
    """Decode an image as it is stored (EXIF orientation is not applied) into (3, H, W) uint8, RGB.

    In memory its channels are interleaved, as the decoder returns them: resizing is faster on that order.
    """
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))  # a copy: torch needs writable memory
    return torch.from_numpy(pixels).permute(2, 0, 1)


class Records:
    """A split's image sizes, files and ground truth in a few arrays.

    A forked process that reads a Python object changes its reference count, and so copies the memory page that it is
    on: each loader process would soon have its own copy of all records. Arrays stay shared.
    """

    def __init__(self, images: Sequence[AnnotatedImage]) -> None:
        # Crowd regions are not trained on.
        boxes = [[box for box in image.boxes if not box.crowd] for image in images]
        flat = [box for of_image in boxes for box in of_image]
        self.sizes = np.array([(image.height, image.width) for image in images], np.int64).reshape(-1, 2)
        self._files = np.array([image.file.encode() for image in images], np.bytes_)
        self._first = np.cumsum([0, *map(len, boxes)])
        corners = [(box.x1, box.y1, box.x2, box.y2) for box in flat]
        self._corners = torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)
        self._labels = torch.tensor([box.class_index + 1 for box in flat], dtype=torch.int64)
        masks = [(box.mask or "").encode() for box in flat]
        self._mask_ends = np.cumsum([0, *map(len, masks)])
        self._masks = b"".join(masks)

    def file(self, index: int) -> str:
        """Return the path of image `index`, relative to the dataset's directory."""
        return bytes(self._files[index]).decode()

    @property
    def max_boxes(self) -> int:
        """The maximum number of boxes of an image."""
        return int(np.diff(self._first).max(initial=0))

    @property
    def has_masks(self) -> bool:
        """Whether any box has a mask."""
        return bool(self._masks)

    def target(self, index: int, *, masks: bool = False) -> Target:
        """Return the ground truth of image `index`; see `ImageReader.target`."""
        first, end = int(self._first[index]), int(self._first[index + 1])
        target = Target(boxes=self._corners[first:end].clone(), labels=self._labels[first:end].clone())
        if masks:
            height, width = map(int, self.sizes[index])
            target["masks"] = bitmaps = torch.zeros(end - first, height, width, dtype=torch.uint8)
            for bitmap, box in zip(bitmaps, range(first, end), strict=True):
                if text := self._masks[self._mask_ends[box] : self._mask_ends[box + 1]]:
                    bitmap.copy_(torch.from_numpy(to_bitmap(from_text(text.decode()), height, width)))
        return target


class ImageReader:
    """The images of one split, in the dataset's order.

    Attributes:
        root: the dataset's directory.
        images: their records.
    """

    def __init__(self, root: Path, images: Sequence[AnnotatedImage]) -> None:
        self.root = root
        self.images = list(images)
        self._records = Records(self.images)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        """Return image `index` as (3, H, W) uint8."""
        return read_image(self.root / self._records.file(index))

    def read_all(self, indices: Sequence[int], *, ahead: int = 0) -> Iterator[Tensor]:
        """Yield images in this order; threads decode up to `ahead` of them before they are requested."""
        if not ahead:
            yield from map(self.read, indices)
            return
        with ThreadPoolExecutor(max_workers=min(ahead, _processors())) as pool:
            waiting: deque[Future[Tensor]] = deque()
            for index in indices:
                waiting.append(pool.submit(self.read, index))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of image `index`, px."""
        height, width = self._records.sizes[index]
        return int(height), int(width)

    @property
    def max_boxes(self) -> int:
        """The maximum number of boxes of an image's target."""
        return self._records.max_boxes

    @property
    def has_masks(self) -> bool:
        """Whether any box has a mask."""
        return self._records.has_masks

    def target(self, index: int, *, masks: bool = False) -> Target:
        """Return the ground truth of image `index` for training: without crowd regions, with difficult boxes.

        With `masks`, the boxes' masks as well, at the image's own size; all 0 for a box that has none.
        """
        return self._records.target(index, masks=masks)


def _processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Batches(Dataset[Batch | SharedBatch]):
    """Batches of augmented images. How an image is changed follows from seed and index alone."""

    def __init__(
        self,
        reader: ImageReader,
        augmentation: Augmentation,
        cache: ImageCache,
        slots: SharedSlots | None,
        *,
        masks: bool,
    ) -> None:
        self.reader = reader
        self.augmentation = augmentation
        self.cache = cache
        self.slots = slots
        self.masks = masks

    def __getitems__(self, request: Request) -> Batch | SharedBatch:
        samples = [self.sample(seed, index) for seed, index in request.samples]
        return Batch.of(samples) if self.slots is None else self.slots.write(samples, request.slot)

    def sample(self, seed: int, index: int, *, cached: bool = True) -> Sample:
        """Return an image as it is trained on; with `cached` False from its files alone."""

        def _read(number: int) -> Sample:
            """Return an image at the detector's input size, and its boxes and masks."""
            size = self.cache.sizes[number]
            target = self.reader.target(number, masks=self.masks)
            image = self.cache.get(number, lambda: make(number)) if cached else make(number)
            return image, resize_target(target, self.reader.size(number), size)

        def make(number: int) -> Tensor:
            return resize(self.reader.read(number), self.cache.sizes[number])

        return self.augmentation(_read, index, count=len(self.reader), seed=seed)


def _keeps_sizes(augmentation: AugmentationConfig, size: InputSize) -> bool:
    """Return whether every image is trained on at the size that it has in the cache."""
    same = augmentation.scale_min == augmentation.scale_max and not augmentation.iou_crop
    return size.fixed is not None or same


def _padded_shapes(sizes: Sequence[tuple[int, int]]) -> int:
    """Return how many shapes a padded batch of images of these sizes can have: any height with any width."""
    heights, widths = ({-(-side // _PADDED) for side in sides} for sides in zip(*sizes, strict=True))
    return len(heights) * len(widths)


def _identity(batch: Batch | SharedBatch) -> Batch | SharedBatch:
    return batch


def _freeze_garbage(_: int) -> None:
    # A garbage collection would write to every object, and so copy every memory page that the processes share.
    gc.freeze()


class TrainingBatches:
    """The batches of a training's epochs, with images at the detector's input size.

    Images are decoded and resized once, and then cached as far as memory allows. On a GPU, processes that live as long
    as this object prefetch batches. On a CPU the training itself uses every core, and batches are made when requested.

    Attributes:
        reader: the training split.
        cache: the decoded images.
        batch_bytes: the maximum bytes of a batch of this process.
        prefetch: how much is prefetched.
        wanted_prefetch: how much would be, given enough memory.
        padded_shapes: how many shapes a batch may have once it is padded to multiples of 32; None: unknown.
    """

    def __init__(
        self,
        reader: ImageReader,
        *,
        batch_size: int,
        size: InputSize,
        augmentation: AugmentationConfig,
        device: torch.device,
        masks: bool = False,
        cache_bytes: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Prepare; nothing is loaded yet. The arguments must have passed `defeat.engine.training.trainable`.

        Args:
            reader: the training split; one whole batch or more.
            batch_size: images of a whole batch, over all ranks: a multiple of `world_size`.
            size: the detector's input size; its own transform must not resize, see `resize.disable_training_resize`.
            augmentation: random changes.
            device: where batches will go.
            masks: whether the detector trains on masks. Each target then has masks (all 0 for a box without one), in
                every batch and on every rank, unless the whole split has none.
            cache_bytes: memory for images; None: `cache.default_limit`.
            rank: which consecutive share of each batch this process gets, from 0.
            world_size: how many shares there are.
        """
        self.reader = reader
        masks = masks and reader.has_masks
        sizes = [size.for_image(*reader.size(index), scale=augmentation.scale_max) for index in range(len(reader))]
        self.padded_shapes = _padded_shapes(sizes) if _keeps_sizes(augmentation, size) else None
        self.cache = ImageCache(sizes, limit=default_limit(world_size) if cache_bytes is None else cache_bytes)
        self.batch_bytes = max_bytes(
            batch_size // world_size,
            pixels=size.max_pixels(scale=augmentation.scale_max),
            boxes=reader.max_boxes * (4 if augmentation.mosaic else 1),
            masks=masks,
        )
        on_gpu = device.type == "cuda"
        processes = min(MAX_PROCESSES, max(_processors() // world_size, 1)) if on_gpu else 0
        self.wanted_prefetch = Prefetch(processes=processes, batches=PREFETCH_FACTOR)
        self.prefetch = prefetch = self.wanted_prefetch.within(default_limit(world_size), self.batch_bytes)
        slots = SharedSlots(prefetch.slots, self.batch_bytes) if prefetch.processes else None
        self._order = BatchOrder(sizes, batch_size=batch_size, rank=rank, world_size=world_size, slots=prefetch.slots)
        self._batches = _Batches(reader, Augmentation(augmentation, size), self.cache, slots, masks=masks)
        forks = prefetch.processes > 0
        self._loader: DataLoader[Batch | SharedBatch] = DataLoader(
            self._batches,
            batch_sampler=cast("Sampler[list[Request]]", self._order),
            collate_fn=cast(Any, _identity),
            num_workers=prefetch.processes,
            # The processes inherit the memory that they share with this one.
            multiprocessing_context="fork" if forks else None,
            prefetch_factor=prefetch.batches if forks else None,
            persistent_workers=forks,
            worker_init_fn=_freeze_garbage,
            pin_memory=on_gpu,
            # The loader draws a base seed, which must not come from the global generator that training uses.
            generator=torch.Generator().manual_seed(0),
        )

    def __len__(self) -> int:
        """Return the number of batches of an epoch; a last, smaller one is dropped."""
        return len(self._order)

    def epoch(self, seed: int, *, start: int = 0) -> Iterator[Batch]:
        """Return one epoch's batches, in an order and with changes that follow from `seed`; one epoch at a time.

        Each batch owns its memory. The first `start` batches are skipped without being loaded; the others do not
        depend on `start`.
        """
        self._order.seed, self._order.start = seed, start
        # On a GPU the loader has pinned each batch, and so copied it out of its slot already.
        return (item.copy() if isinstance(item, SharedBatch) else item for item in self._loader)

    def reload(self, number: int) -> Iterator[tuple[int, Sample]]:
        """Yield what batch `number` of the epoch in progress should hold: each image's index, image and target.

        They are made from their files, in this process and without the cache.
        """
        for seed, index in self._order.samples(number):
            yield index, self._batches.sample(seed, index, cached=False)
