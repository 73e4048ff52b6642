"""From a canonical dataset's files to training batches."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from worker.data.canonical import Picture
from worker.detectors.base import Target
from worker.report import RunError


def read_picture(path: Path) -> Tensor:
    """Decode a picture as it is stored (EXIF orientation is not applied) into (3, H, W) uint8, RGB."""
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))  # a copy: torch wants writable memory
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


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

    def target(self, index: int) -> Target:
        """Return its ground truth for training: crowd regions are left out, difficult boxes are not."""
        boxes = [box for box in self.images[index].boxes if not box.crowd]
        return Target(
            boxes=torch.tensor([[box.x1, box.y1, box.x2, box.y2] for box in boxes], dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor([box.class_index + 1 for box in boxes], dtype=torch.int64),
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A training batch: pictures (3, H_i, W_i) uint8 and their ground truth, on the CPU."""

    images: list[Tensor]
    targets: list[Target]

    def targets_on(self, device: torch.device) -> list[Target]:
        """Return the targets on a device."""
        return [
            Target(
                boxes=target["boxes"].to(device, non_blocking=True),
                labels=target["labels"].to(device, non_blocking=True),
            )
            for target in self.targets
        ]

    def pin_memory(self) -> "Batch":
        """Move to page-locked memory; the data loader calls it."""
        return Batch(
            images=[image.pin_memory() for image in self.images],
            targets=[
                Target(boxes=target["boxes"].pin_memory(), labels=target["labels"].pin_memory())
                for target in self.targets
            ],
        )


class _Augmented(Dataset[tuple[Tensor, Target]]):
    """Pictures with their random changes, which depend on seed and index alone, not on who loads them or when."""

    def __init__(self, pictures: PictureReader, *, horizontal_flip: float, seed: int) -> None:
        self.pictures = pictures
        self.horizontal_flip = horizontal_flip
        self.seed = seed

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image, target = self.pictures.read(index), self.pictures.target(index)
        generator = torch.Generator().manual_seed((self.seed + index) % 2**63)
        if torch.rand((), generator=generator).item() < self.horizontal_flip:
            image, target = flip(image, target)
        return image, target


def flip(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Mirror a picture (3, H, W) and its boxes left to right."""
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
    return image.flip(-1), Target(boxes=boxes, labels=target["labels"])


def _collate(samples: list[tuple[Tensor, Target]]) -> Batch:
    images, targets = zip(*samples, strict=True)
    return Batch(images=list(images), targets=list(targets))


def training_batches(
    pictures: PictureReader,
    *,
    batch_size: int,
    horizontal_flip: float,
    seed: int,
    device: torch.device,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
) -> DataLoader[Batch]:
    """Return one epoch of batches in an order that follows from `seed`; a last, smaller batch is left out.

    The first `start` batches are left out as well, and not read. Of `world` processes, number `rank` gets its equal,
    consecutive share of each batch.

    Raises:
        RunError: `too_few_images` if there is not one whole batch.
    """
    if len(pictures) < batch_size:
        raise RunError(
            "user",
            "too_few_images",
            f"the training split has {len(pictures)} pictures, schedule.batch_size is {batch_size}: "
            "lower it to that at most",
        )
    on_gpu = device.type == "cuda"
    share = batch_size // world
    order = RandomSampler(range(len(pictures)), generator=torch.Generator().manual_seed(seed))
    loader = DataLoader(
        _Augmented(pictures, horizontal_flip=horizontal_flip, seed=seed),
        batch_sampler=[
            indices[rank * share : (rank + 1) * share]
            for indices in list(BatchSampler(order, batch_size, drop_last=True))[start:]
        ],
        collate_fn=_collate,
        # On a CPU the training itself wants every core, and decoding is a small part of a step.
        num_workers=min(8, os.cpu_count() or 1) if on_gpu else 0,
        pin_memory=on_gpu,
        # The loader's own draw of a base seed must not come from the global generator, which training uses.
        generator=torch.Generator().manual_seed(seed),
    )
    return cast("DataLoader[Batch]", loader)
