"""A cache of decoded, resized images, filled during the first epoch."""

import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from defeat.engine.data.loading.batch import aligned

# The maximum memory, bytes, and the maximum share of the memory that is free when a training starts.
DEFAULT_LIMIT = 2 * 1024**3
FREE_SHARE = 0.25


def default_limit(processes: int = 1) -> int:
    """Return the bytes for the images of one training process: its share of 2 GiB, or of a quarter of free memory.

    Args:
        processes: training processes on this machine that share the memory, one per GPU.
    """
    return int(min(DEFAULT_LIMIT, FREE_SHARE * _free_memory()) / processes)


def _free_memory() -> int:
    """Return the bytes that can be allocated without swapping, by the kernel's estimate and this container's limit."""
    info = Path("/proc/meminfo")
    if not info.exists():  # not Linux: the whole memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    values = dict(line.split(":", 1) for line in info.read_text().splitlines())
    free = int(values["MemAvailable"].split()[0]) * 1024
    bound, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if bound.exists() and (text := bound.read_text().strip()) != "max":
        free = min(free, max(int(text) - int(used.read_text()), 0))
    return free


class ImageCache:
    """Images by index, as bytes, in memory that processes forked later share.

    As many images as the limit allows have a place, the first ones of the dataset; the others are decoded each time.
    A place takes memory when its image is first stored.

    Attributes:
        sizes: height and width of each image.
        places: how many images have a place.
        size: bytes of all places.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], *, limit: int) -> None:
        """Lay out places.

        Args:
            sizes: height and width of each image.
            limit: bytes for all of them; 0: no cache.
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
        """Return image `index`, (3, H, W) uint8, made by `make` if it is not cached; callers must not modify it."""
        if index >= self.places:
            return make()
        height, width = self.sizes[index]
        start = self._starts[index]
        place = self._memory[start : start + 3 * height * width].view(3, height, width)
        if not self._filled[index]:
            place.copy_(make())
            # Set last: two processes may make the same image at once, and then write the same bytes.
            self._filled[index] = True
        return place

    @property
    def kept(self) -> int:
        """The number of images in the cache now."""
        return int(self._filled[: self.places].sum())
