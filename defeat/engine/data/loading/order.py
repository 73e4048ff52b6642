"""The order of images in a training's epochs, and which images share a batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

# Batches are cut from groups of images sorted by shape. A larger group needs less padding; with smaller groups the
# batches differ more from epoch to epoch.
MAX_GROUP_BATCHES = 32
MIN_GROUPS = 4  # per epoch


@dataclass(frozen=True)
class Request:
    """One batch to load.

    Attributes:
        slot: where to write it, see `prefetch.SharedSlots`.
        samples: seed and index of each image.
    """

    slot: int
    samples: tuple[tuple[int, int], ...]


class BatchOrder(Sampler[Request]):
    """One epoch's batches, this rank's share of each, as requests. They follow from `seed` alone.

    Every image is as likely to be in an epoch, and at any place in it, as without grouping. Images of a batch have
    similar shapes: a batch is padded to its largest height and its largest width, and with wide and tall images in one
    batch a quarter to a half of it would be padding.

    Attributes:
        seed: the epoch's seed.
        start: the number of batches to skip at the beginning.
    """

    def __init__(
        self, sizes: Sequence[tuple[int, int]], *, batch_size: int, rank: int, world_size: int, slots: int = 1
    ) -> None:
        """Prepare.

        Args:
            sizes: height and width in pixels of each image.
            batch_size: images of a whole batch, over all ranks; a multiple of `world_size`.
            rank: which consecutive share of each batch is this process's, from 0.
            world_size: how many shares there are.
            slots: how many slots the requests use, in turn.
        """
        self._shapes = torch.tensor([width / height for height, width in sizes], dtype=torch.float64)
        self._same_size = len(set(sizes)) < 2
        self.batch_size, self.share, self.rank, self.slots = batch_size, batch_size // world_size, rank, slots
        self.seed = self.start = 0

    def __len__(self) -> int:
        return len(self._shapes) // self.batch_size

    def batches(self) -> list[list[int]]:
        """Return the indices of the images of each batch of the epoch, all ranks' shares, in order."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self._shapes), generator=generator)
        batches = order[: len(self) * self.batch_size].view(-1, self.batch_size)
        if self._same_size:
            return batches.tolist()
        size = max(1, min(MAX_GROUP_BATCHES, len(self) // MIN_GROUPS))
        grouped = torch.cat([self._by_shape(group.flatten()) for group in batches.split(size)])
        return grouped.view_as(batches)[torch.randperm(len(batches), generator=generator)].tolist()

    def _by_shape(self, indices: torch.Tensor) -> torch.Tensor:
        # Stable: images of one shape stay in their random order.
        return indices[self._shapes[indices].argsort(stable=True)]

    def samples(self, number: int) -> tuple[tuple[int, int], ...]:
        """Return seed and index of this rank's share of the epoch's batch `number`."""
        return self._share_of(self.batches()[number])

    def _share_of(self, batch: Sequence[int]) -> tuple[tuple[int, int], ...]:
        first = self.rank * self.share
        return tuple((self.seed, index) for index in batch[first : first + self.share])

    def __iter__(self) -> Iterator[Request]:
        for number, batch in enumerate(self.batches()[self.start :]):
            yield Request(number % self.slots, self._share_of(batch))
