"""Checks the images that a training is fed: the first ones of its first epochs, against their files.

A fault on the way from a file to the network (a cache, memory shared between processes, a copy to a device) leaves
images that are black, outdated or those of another file. Losses decrease all the same, and nothing else shows why the
detector is poor.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from defeat.engine.data.loading.batch import Batch
from defeat.engine.data.loading.loader import TrainingBatches
from defeat.engine.report import RunError

# So many of the first images are checked in each of so many of the first epochs that a process trains. In later epochs
# images come from memory, and from processes that have run for a while.
IMAGES = 16
EPOCHS = 3
# A process that changes colours on another number of threads may round a value differently.
TOLERANCE = 1  # of 255
MAX_DIFFERING = 0.01  # share of an image's values
MAX_CONSTANT = 0.5  # share of the checked images, once there are enough: a dataset may hold a black image or two
ENOUGH = 8


class ImageCheck(NamedTuple):
    """The result for one image.

    Attributes:
        name: the file's name in the source of the dataset.
        differs: whether it is another image than its file holds.
        constant: whether all of its values are equal.
    """

    name: str
    differs: bool
    constant: bool


class Inspection:
    """Checks the first images of the first epochs of one training.

    Args:
        batches: where the training's batches come from.
    """

    def __init__(self, batches: TrainingBatches) -> None:
        self._batches = batches
        self._epochs = 0
        self._checks: list[ImageCheck] = []

    def start_epoch(self) -> None:
        """Start over with the images of another epoch."""
        self._epochs += 1
        self._checks = []

    def check(self, batch: Batch, number: int) -> None:
        """Check images of the epoch's batch `number`, as it is on the device, if they are among the first.

        Raises:
            RunError: see `require_intact`.
        """
        if self._epochs <= EPOCHS and len(self._checks) < IMAGES:
            self._checks += check_images(batch, self._batches, number, limit=IMAGES - len(self._checks))
            require_intact(self._checks)


def check_images(batch: Batch, batches: TrainingBatches, number: int, *, limit: int = IMAGES) -> list[ImageCheck]:
    """Compare the first images of a batch, as the network will see them, with the files that they were made from.

    Args:
        batch: on any device.
        batches: where it comes from.
        number: the batch's number in the epoch in progress.
        limit: the maximum number of images to check.
    """
    checks = []
    for image, (index, (expected, _)) in zip(batch.images[:limit], batches.reload(number), strict=False):
        pixels = image.cpu()
        name = batches.reader.images[index].name
        checks.append(ImageCheck(name, _differs(pixels, expected), bool(pixels.amin() == pixels.amax())))
    return checks


def _differs(image: Tensor, expected: Tensor) -> bool:
    if image.shape != expected.shape:
        return True
    differing = (image.short() - expected.short()).abs() > TOLERANCE
    return differing.float().mean().item() > MAX_DIFFERING


def require_intact(checks: Sequence[ImageCheck]) -> None:
    """Raise unless the images are those of their files, and most of them are not of one colour.

    Raises:
        RunError: `images_differ_from_files` (infra: another machine may do better); `images_constant` (data).
    """
    different = [one for one in checks if one.differs]
    if different:
        plain = sum(one.constant for one in different)
        raise RunError(
            "infra",
            "images_differ_from_files",
            f"{len(different)} of the {len(checks)} first training images differ from their files, {plain} of them of "
            f"one colour: {_names(different)}; the worker's memory, disk or GPU is faulty, or the dataset changed "
            "while it was read",
        )
    constant = [one for one in checks if one.constant]
    if len(checks) >= ENOUGH and len(constant) > MAX_CONSTANT * len(checks):
        raise RunError(
            "data",
            "images_constant",
            f"{len(constant)} of the {len(checks)} first training images are of one colour in their files as well: "
            f"{_names(constant)}; check the dataset's images",
        )


def _names(checks: Sequence[ImageCheck]) -> str:
    return ", ".join(one.name for one in checks[:5]) + (", …" if len(checks) > 5 else "")
