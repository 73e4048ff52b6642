"""From a canonical dataset's files to training batches."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from worker.data.augment import Augmentation, Sample
from worker.data.cache import PictureCache, default_limit
from worker.data.canonical import Box, Picture
from worker.data.masks import from_text, to_bitmap
from worker.data.resize import InputSize, resize, resize_target
from worker.detectors.base import Target
from worker.engine.config import AugmentationConfig


def read_picture(path: Path) -> Tensor:
    """Decode a picture as it is stored (EXIF orientation is not applied) into (3, H, W) uint8, RGB.

    Its planes are interleaved in memory, as the decoder leaves them: resizing wants them so.
    """
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))  # a copy: torch wants writable memory
    return torch.from_numpy(pixels).permute(2, 0, 1)


class PictureReader:
    """The pictures of one split, in the dataset's order.

    Attributes:
        images: the records.
    """

    def __init__(self, root: Path, images: Sequence[Picture]) -> None:
        self.root = root
        self.images = list(images)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        """Return picture `index` as (3, H, W) uint8."""
        return read_picture(self.root / self.images[index].file)

    def read_all(self, indices: Sequence[int], *, ahead: int = 0) -> Iterator[Tensor]:
        """Yield pictures in this order; threads decode up to `ahead` of them before they are asked for."""
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

    @property
    def has_masks(self) -> bool:
        """Whether any box has a mask."""
        return any(box.mask is not None for image in self.images for box in image.boxes)

    def target(self, index: int, *, masks: bool = False) -> Target:
        """Return its ground truth for training: crowd regions are left out, difficult boxes are not.

        With `masks`, the boxes' masks too, at the picture's own size; all 0 for a box that has none.
        """
        image = self.images[index]
        boxes = [box for box in image.boxes if not box.crowd]
        target = Target(
            boxes=torch.tensor([[box.x1, box.y1, box.x2, box.y2] for box in boxes], dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor([box.class_index + 1 for box in boxes], dtype=torch.int64),
        )
        if masks:
            target["masks"] = _masks(boxes, image.height, image.width)
        return target


def _masks(boxes: Sequence[Box], height: int, width: int) -> Tensor:
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, box in zip(masks, boxes, strict=True):
        if box.mask is not None:
            mask.copy_(torch.from_numpy(to_bitmap(from_text(box.mask), height, width)))
    return masks


def _processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A training batch: pictures (3, H_i, W_i) uint8 and their ground truth, on the CPU."""

    images: list[Tensor]
    targets: list[Target]

    def targets_on(self, device: torch.device) -> list[Target]:
        """Return the targets on a device."""
        return [_each(target, lambda tensor: tensor.to(device, non_blocking=True)) for target in self.targets]

    def pin_memory(self) -> "Batch":
        """Move to page-locked memory; the data loader calls it."""
        return Batch(
            images=[image.pin_memory() for image in self.images],
            targets=[_each(target, Tensor.pin_memory) for target in self.targets],
        )


def _each(target: Target, change: Callable[[Tensor], Tensor]) -> Target:
    return cast(Target, {name: change(tensor) for name, tensor in cast(dict[str, Tensor], target).items()})


class _Samples(Dataset[Sample]):
    """Augmented pictures, asked for by (seed, index), which alone decide how they are changed."""

    def __init__(
        self, pictures: PictureReader, augmentation: Augmentation, cache: PictureCache, *, masks: bool
    ) -> None:
        self.pictures = pictures
        self.augmentation = augmentation
        self.cache = cache
        self.masks = masks

    def __getitem__(self, seed_and_index: tuple[int, int]) -> Sample:
        seed, index = seed_and_index
        return self.augmentation(self._read, index, count=len(self.pictures), seed=seed)

    def _read(self, index: int) -> Sample:
        """Return a picture as it is kept, and its boxes and masks: at the detector's input size."""
        size = self.cache.sizes[index]
        record, target = self.pictures.images[index], self.pictures.target(index, masks=self.masks)
        image = self.cache.get(index, lambda: resize(self.pictures.read(index), size))
        return image, resize_target(target, (record.height, record.width), size)


class _Order(Sampler[list[tuple[int, int]]]):
    """The (seed, index) of one epoch's batches, this rank's share of each."""

    def __init__(self, count: int, *, batch_size: int, rank: int, world: int) -> None:
        self.count, self.batch_size, self.share, self.rank = count, batch_size, batch_size // world, rank
        self.seed = self.start = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed)).tolist()
        for batch in range(self.start, self.count // self.batch_size):
            first = batch * self.batch_size + self.rank * self.share
            yield [(self.seed, index) for index in order[first : first + self.share]]


def _collate(samples: list[Sample]) -> Batch:
    images, targets = zip(*samples, strict=True)
    return Batch(images=list(images), targets=list(targets))


class TrainingBatches:
    """The batches of a training's epochs, whose pictures are at the size that the detector is to see.

    Pictures are decoded and resized once and then kept in memory, as far as they fit. On a GPU, processes that live as
    long as this object load ahead; on a CPU the training itself wants every core, and batches are made when asked for.

    Attributes:
        cache: what is kept.
    """

    def __init__(
        self,
        pictures: PictureReader,
        *,
        batch_size: int,
        size: InputSize,
        augmentation: AugmentationConfig,
        device: torch.device,
        masks: bool = False,
        cache_bytes: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Prepare; nothing is loaded yet. For what `worker.engine.trainable` lets pass.

        Args:
            pictures: the training split; a whole batch at least.
            batch_size: pictures of a whole batch, over all ranks: a multiple of `world`.
            size: the detector's, which was told not to resize: `InputSize.taken_from`.
            augmentation: random changes.
            device: where batches will go.
            masks: whether the detector trains on masks. Then each target has some (all 0 where the data has none for a
                box), in every batch and on every rank alike, unless the whole split has none.
            cache_bytes: memory for pictures; None: `cache.default_limit`.
            rank: which consecutive share of each batch this process gets, from 0.
            world: how many shares there are.
        """
        self.batch_size, self._pictures = batch_size, len(pictures)
        sizes = [size.of(image.height, image.width, scale=augmentation.scale_max) for image in pictures.images]
        self.cache = PictureCache(sizes, limit=default_limit(world) if cache_bytes is None else cache_bytes)
        self._order = _Order(len(pictures), batch_size=batch_size, rank=rank, world=world)
        samples = _Samples(pictures, Augmentation(augmentation, size), self.cache, masks=masks and pictures.has_masks)
        on_gpu = device.type == "cuda"
        workers = min(8, max(_processors() // world, 1)) if on_gpu else 0
        self._loader: DataLoader[Batch] = DataLoader(
            cast("Dataset[Batch]", samples),
            batch_sampler=self._order,
            collate_fn=_collate,
            num_workers=workers,
            # The cache's memory is shared by being inherited.
            multiprocessing_context="fork" if workers else None,
            persistent_workers=workers > 0,
            pin_memory=on_gpu,
            # The loader's own draw of a base seed must not come from the global generator, which training uses.
            generator=torch.Generator().manual_seed(0),
        )

    def __len__(self) -> int:
        """Batches of an epoch; a last, smaller one is left out."""
        return self._pictures // self.batch_size

    def epoch(self, seed: int, *, start: int = 0) -> Iterator[Batch]:
        """Return one epoch's batches, in an order and with changes that follow from `seed`; one epoch at a time.

        `start` batches are left out at the beginning, without loading them: the rest are the same as without.
        """
        self._order.seed, self._order.start = seed, start
        return iter(self._loader)
