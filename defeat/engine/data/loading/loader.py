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
from defeat.engine.data.loading.batch import Batch, Sample, most_bytes
from defeat.engine.data.loading.cache import ImageCache, default_limit
from defeat.engine.data.loading.config import AugmentationConfig
from defeat.engine.data.loading.handover import Ahead, Parcel, Slots
from defeat.engine.data.loading.order import BatchOrder, Request
from defeat.engine.data.loading.resize import InputSize, resize, resize_target
from defeat.engine.data.masks import from_text, to_bitmap
from defeat.engine.detectors.base import Target

MOST_PROCESSES = 8
PREFETCH = 2  # batches that each process loads ahead
_PADDED = 32  # px: torchvision's transforms pad each side of a batch to a multiple of it


def read_image(path: Path) -> Tensor:
    """Decode an image as it is stored (EXIF orientation is not applied) into (3, H, W) uint8, RGB.

    Its planes are interleaved in memory, as the decoder leaves them: resizing wants them so.
    """
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))  # a copy: torch wants writable memory
    return torch.from_numpy(pixels).permute(2, 0, 1)


class Records:
    """What training needs to know of a split's images, in a few arrays.

    A forked process that touches a Python object copies the page that it lies on, for it counts its references there:
    each loader process would soon have all records of the split for itself. Arrays stay shared.
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
    def most_boxes(self) -> int:
        """The most boxes that an image has."""
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
        images: the records.
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
        """Yield images in this order; threads decode up to `ahead` of them before they are asked for."""
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
    def most_boxes(self) -> int:
        """The most boxes that an image's target has."""
        return self._records.most_boxes

    @property
    def has_masks(self) -> bool:
        """Whether any box has a mask."""
        return self._records.has_masks

    def target(self, index: int, *, masks: bool = False) -> Target:
        """Return its ground truth for training: crowd regions are left out, difficult boxes are not.

        With `masks`, the boxes' masks too, at the image's own size; all 0 for a box that has none.
        """
        return self._records.target(index, masks=masks)


def _processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Batches(Dataset[Batch | Parcel]):
    """Batches of augmented images. Seed and index alone decide how an image is changed."""

    def __init__(
        self,
        reader: ImageReader,
        augmentation: Augmentation,
        cache: ImageCache,
        slots: Slots | None,
        *,
        masks: bool,
    ) -> None:
        self.reader = reader
        self.augmentation = augmentation
        self.cache = cache
        self.slots = slots
        self.masks = masks

    def __getitems__(self, request: Request) -> Batch | Parcel:
        samples = [self.sample(seed, index) for seed, index in request.samples]
        return Batch.of(samples) if self.slots is None else self.slots.put(samples, request.slot)

    def sample(self, seed: int, index: int, *, anew: bool = False) -> Sample:
        """Return an image as it is trained on; with `anew` from files alone, whatever is kept in memory."""

        def _read(number: int) -> Sample:
            """Return an image at the detector's input size, and its boxes and masks."""
            size = self.cache.sizes[number]
            target = self.reader.target(number, masks=self.masks)
            image = make(number) if anew else self.cache.get(number, lambda: make(number))
            return image, resize_target(target, self.reader.size(number), size)

        def make(number: int) -> Tensor:
            return resize(self.reader.read(number), self.cache.sizes[number])

        return self.augmentation(_read, index, count=len(self.reader), seed=seed)


def _keeps_sizes(augmentation: AugmentationConfig, size: InputSize) -> bool:
    """Whether every image is trained on at the size that it has in memory."""
    same = augmentation.scale_min == augmentation.scale_max and not augmentation.iou_crop
    return size.fixed is not None or same


def _padded_shapes(sizes: Sequence[tuple[int, int]]) -> int:
    """Return how many shapes a batch of images of these sizes can have: any height beside any width."""
    heights, widths = ({-(-side // _PADDED) for side in sides} for sides in zip(*sizes, strict=True))
    return len(heights) * len(widths)


def _as_it_is(batch: Batch | Parcel) -> Batch | Parcel:
    return batch


def _leave_garbage(_: int) -> None:
    # To look for garbage touches every object, and so copies every page that the processes share.
    gc.freeze()


class TrainingBatches:
    """The batches of a training's epochs, whose images are at the size that the detector is to see.

    Images are decoded and resized once and then kept in memory, as far as they fit. On a GPU, processes that live as
    long as this object load ahead; on a CPU the training itself wants every core, and batches are made when asked for.

    Attributes:
        cache: what is kept.
        batch_bytes: the most that a batch of this process takes.
        ahead: how much is loaded ahead.
        wanted: how much would be if there were memory for it.
        padded_shapes: how many shapes a batch may have once it is padded to multiples of 32; None: nobody knows.
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
        """Prepare; nothing is loaded yet. For what `defeat.engine.training.trainable` lets pass.

        Args:
            images: the training split; a whole batch at least.
            batch_size: images of a whole batch, over all ranks: a multiple of `world_size`.
            size: the detector's, which was told not to resize: `InputSize.taken_from`.
            augmentation: random changes.
            device: where batches will go.
            masks: whether the detector trains on masks. Then each target has some (all 0 where the data has none for a
                box), in every batch and on every rank alike, unless the whole split has none.
            cache_bytes: memory for images; None: `cache.default_limit`.
            rank: which consecutive share of each batch this process gets, from 0.
            world_size: how many shares there are.
        """
        self.reader = reader
        masks = masks and reader.has_masks
        sizes = [size.of(*reader.size(index), scale=augmentation.scale_max) for index in range(len(reader))]
        self.padded_shapes = _padded_shapes(sizes) if _keeps_sizes(augmentation, size) else None
        self.cache = ImageCache(sizes, limit=default_limit(world_size) if cache_bytes is None else cache_bytes)
        self.batch_bytes = most_bytes(
            batch_size // world_size,
            pixels=size.most_pixels(scale=augmentation.scale_max),
            boxes=reader.most_boxes * (4 if augmentation.mosaic else 1),
            masks=masks,
        )
        on_gpu = device.type == "cuda"
        processes = min(MOST_PROCESSES, max(_processors() // world_size, 1)) if on_gpu else 0
        self.wanted = Ahead(processes=processes, batches=PREFETCH)
        self.ahead = self.wanted.within(default_limit(world_size), self.batch_bytes)
        slots = Slots(self.ahead.slots, self.batch_bytes) if self.ahead.processes else None
        self._order = BatchOrder(sizes, batch_size=batch_size, rank=rank, world_size=world_size, slots=self.ahead.slots)
        self._batches = _Batches(reader, Augmentation(augmentation, size), self.cache, slots, masks=masks)
        loads_ahead = self.ahead.processes > 0
        self._loader: DataLoader[Batch | Parcel] = DataLoader(
            self._batches,
            batch_sampler=cast("Sampler[list[Request]]", self._order),
            collate_fn=cast(Any, _as_it_is),
            num_workers=self.ahead.processes,
            # What they share with this process is shared by being inherited.
            multiprocessing_context="fork" if loads_ahead else None,
            prefetch_factor=self.ahead.batches if loads_ahead else None,
            persistent_workers=loads_ahead,
            worker_init_fn=_leave_garbage,
            pin_memory=on_gpu,
            # The loader's own draw of a base seed must not come from the global generator, which training uses.
            generator=torch.Generator().manual_seed(0),
        )

    def __len__(self) -> int:
        """Batches of an epoch; a last, smaller one is left out."""
        return len(self._order)

    def epoch(self, seed: int, *, start: int = 0) -> Iterator[Batch]:
        """Return one epoch's batches, in an order and with changes that follow from `seed`; one epoch at a time.

        Each batch owns its memory. `start` batches are left out at the beginning, without loading them: the rest are
        the same as without.
        """
        self._order.seed, self._order.start = seed, start
        # Without a GPU nothing was pinned, and so copied out of its slot, on the way.
        return (item.taken() if isinstance(item, Parcel) else item for item in self._loader)

    def made_anew(self, number: int) -> Iterator[tuple[int, Sample]]:
        """Yield batch `number` of the epoch in progress as it should be: each image's index, and it with its target.

        They are made from their files, in this process; nothing that is kept in memory is looked at.
        """
        for seed, index in self._order.samples(number):
            yield index, self._batches.sample(seed, index, anew=True)
