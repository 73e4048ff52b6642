"""How a loader process hands a batch over: in memory that both processes have, by the number of a slot.

torch's own way to send a tensor to another process moves the tensor's whole storage into `/dev/shm`. For a view of a
larger one, such as an image in the cache, that is all of it, and the sender's other views then write where nobody
reads. Here no tensor is sent: the memory is anonymous, shared by being inherited, and not bound by the size of
`/dev/shm`, which is 64 MiB in a container.
"""

import itertools
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from defeat.engine.data.loading.batch import Batch, Part, Sample, aligned

_numbers = itertools.count()
_by_number: "WeakValueDictionary[int, Slots]" = WeakValueDictionary()


def _slots(number: int) -> "Slots":
    return _by_number[number]


@dataclass(frozen=True)
class Ahead:
    """How much is loaded before it is asked for.

    Attributes:
        processes: loader processes; 0: the training loads by itself.
        batches: how many batches each of them loads ahead.
    """

    processes: int
    batches: int

    @property
    def slots(self) -> int:
        """Places for batches: for those that are loaded or wait, and for the one that is being taken out."""
        return self.processes * self.batches + 1

    def within(self, limit: int, size: int) -> "Ahead":
        """Return as much of this as `limit` bytes hold if a batch takes `size`: first fewer batches, then processes."""
        less = [self, *(Ahead(processes, 1) for processes in range(self.processes, 0, -1))]
        return next((one for one in less if not one.processes or one.slots * size <= limit), Ahead(0, 0))


class Slots:
    """Places for batches, which processes that are forked later share. Memory is taken when a place is first written.

    Attributes:
        size: bytes of each.
    """

    def __init__(self, count: int, size: int) -> None:
        self.size = aligned(size)
        self._memory = torch.frombuffer(mmap.mmap(-1, max(count * self.size, 1)), dtype=torch.uint8)
        self._number = next(_numbers)
        _by_number[self._number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        """Go to another process as a number: a forked one has the same memory under it."""
        return _slots, (self._number,)

    def __getitem__(self, slot: int) -> Tensor:
        return self._memory[slot * self.size : (slot + 1) * self.size]

    def put(self, samples: Sequence[Sample], slot: int) -> "Parcel":
        """Write a batch into a place.

        Raises:
            ValueError: the batch is larger than a place.
        """
        batch = Batch.of(samples, into=self[slot])
        return Parcel(self, slot, batch.parts, len(batch.storage))


@dataclass(frozen=True)
class Parcel:
    """A batch that waits in a slot.

    Attributes:
        slots: where.
        slot: which.
        parts: see `Batch`.
        size: bytes of the batch.
    """

    slots: Slots
    slot: int
    parts: tuple[Part, ...]
    size: int

    def taken(self, *, pinned: bool = False) -> Batch:
        """Return the batch in memory of its own, page-locked if wanted; the slot is free then."""
        storage = torch.empty(self.size, dtype=torch.uint8, pin_memory=pinned)
        return Batch(storage=storage.copy_(self.slots[self.slot][: self.size]), parts=self.parts)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; the data loader calls it, in a thread of its own."""
        return self.taken(pinned=True)
