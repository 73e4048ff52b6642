"""How loader processes prefetch batches: through shared memory, of which only a slot's number is sent.

torch's own way to send a tensor to another process moves the tensor's whole storage into `/dev/shm`. For a view of a
larger tensor, such as an image in the cache, that is the whole cache, and the sender's other views then write to memory
that no other process reads. Here no tensor is sent: forked processes inherit the memory. It is anonymous, so that the
size of `/dev/shm`, 64 MiB in a container, does not limit it.
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
_by_number: "WeakValueDictionary[int, SharedSlots]" = WeakValueDictionary()


def _slots(number: int) -> "SharedSlots":
    return _by_number[number]


@dataclass(frozen=True)
class Prefetch:
    """How much is loaded before it is requested.

    Attributes:
        processes: the number of loader processes; 0: the training loads its batches itself.
        batches: how many batches each of them prefetches.
    """

    processes: int
    batches: int

    @property
    def slots(self) -> int:
        """The number of batches in memory at a time: those being loaded or waiting, and the one being copied out."""
        return self.processes * self.batches + 1

    def within(self, limit: int, batch_bytes: int) -> "Prefetch":
        """Return as much of this as fits into `limit` bytes: first with fewer batches, then with fewer processes."""
        smaller = [self, *(Prefetch(processes, 1) for processes in range(self.processes, 0, -1))]
        fitting = (one for one in smaller if not one.processes or one.slots * batch_bytes <= limit)
        return next(fitting, Prefetch(0, 0))


class SharedSlots:
    """Slots for batches in memory that processes forked later share. A slot takes memory when it is first written.

    Attributes:
        size: bytes of each slot.
    """

    def __init__(self, count: int, size: int) -> None:
        self.size = aligned(size)
        self._memory = torch.frombuffer(mmap.mmap(-1, max(count * self.size, 1)), dtype=torch.uint8)
        self._number = next(_numbers)
        _by_number[self._number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a number: a forked process has the same memory under it."""
        return _slots, (self._number,)

    def __getitem__(self, slot: int) -> Tensor:
        return self._memory[slot * self.size : (slot + 1) * self.size]

    def write(self, samples: Sequence[Sample], slot: int) -> "SharedBatch":
        """Write a batch into a slot.

        Raises:
            ValueError: the batch is larger than a slot.
        """
        batch = Batch.of(samples, into=self[slot])
        return SharedBatch(self, slot, batch.parts, len(batch.storage))


@dataclass(frozen=True)
class SharedBatch:
    """A batch in a slot of shared memory.

    Attributes:
        slots: the shared memory.
        slot: the number of its slot.
        parts: see `Batch`.
        size: bytes of the batch.
    """

    slots: SharedSlots
    slot: int
    parts: tuple[Part, ...]
    size: int

    def copy(self, *, pinned: bool = False) -> Batch:
        """Return the batch in memory of its own, page-locked if `pinned`; the slot may then be written again."""
        storage = torch.empty(self.size, dtype=torch.uint8, pin_memory=pinned)
        return Batch(storage=storage.copy_(self.slots[self.slot][: self.size]), parts=self.parts)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; the data loader calls it, in a thread of its own."""
        return self.copy(pinned=True)
