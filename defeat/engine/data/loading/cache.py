"""Decoded, resized images, kept in memory from the first epoch on."""

import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from defeat.engine.data.loading.batch import aligned

# At most this much of memory, and at most this share of what is free when a training starts.
DEFAULT_LIMIT = 2 * 1024**3
FREE_SHARE = 0.25


def default_limit(processes: int = 1) -> int:
    """Return the bytes that the images of one training process may take: 2 GiB, or a quarter of what is free.

    Args:
        processes: trainings on this machine that share it, one per GPU.
    """
    return int(min(DEFAULT_LIMIT, FREE_SHARE * _free_memory()) / processes)


def _free_memory() -> int:
    """Bytes that may be taken without swapping, by the kernel's estimate and by this container's bound."""
    info = Path("/proc/meminfo")
    if not info.exists():  # not Linux: all there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    values = dict(line.split(":", 1) for line in info.read_text().splitlines())
    free = int(values["MemAvailable"].split()[0]) * 1024
    bound, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if bound.exists() and (text := bound.read_text().strip()) != "max":
        free = min(free, max(int(text) - int(used.read_text()), 0))
    return free


class ImageCache:
    """Images by index, as bytes, in memory that processes forked later share.

    As many images as fit under the limit have a place, the first ones of the dataset; the others are made anew each
    time. Memory is taken when an image is first put in, not before.

    Attributes:
        sizes: height and width of each image.
        places: how many images have a place.
        size: bytes of all places.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], *, limit: int) -> None:
        """Lay out places.

        Args:
            sizes: height and width of each image.
            limit: bytes for all of them; 0 keeps nothing.
        """
        self.sizes = list(sizes)
        self._starts: list[int] = []
        end = 0
        for height, width in self.sizes:
            start, end = end, end + aligned(3 * height * width)
            if end > limit:
                end = start
                break
            self._starts.append(start)
        self.places, self.size = len(self._starts), end
        # Anonymous and shared: not bound by the size of /dev/shm, which is 64 MiB in a container.
        self._memory = torch.frombuffer(mmap.mmap(-1, max(end, 1)), dtype=torch.uint8)
        self._filled = torch.frombuffer(mmap.mmap(-1, max(self.places, 1)), dtype=torch.bool)

    def get(self, index: int, make: Callable[[], Tensor]) -> Tensor:
        """Return image `index`, (3, H, W) uint8, by `make` if it is not kept; nobody may change what is returned."""
        if index >= self.places:
            return make()
        height, width = self.sizes[index]
        start = self._starts[index]
        place = self._memory[start : start + 3 * height * width].view(3, height, width)
        if not self._filled[index]:
            place.copy_(make())
            # Last: two processes may make the same image at once, and then write the same bytes.
            self._filled[index] = True
        return place

    @property
    def kept(self) -> int:
        """How many images are in it now."""
        return int(self._filled[: self.places].sum())
