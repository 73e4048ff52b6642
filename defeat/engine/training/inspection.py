"""A training looks at what it is fed: its first images against their files.

A fault on the way from a file to the network (a cache, memory between processes, a copy to a device) leaves images that
are black, old or somebody else's. Losses fall all the same, and nobody sees why the detector is poor.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from defeat.engine.data.loading.batch import Batch
from defeat.engine.data.loading.loader import TrainingBatches
from defeat.engine.report import RunError

# Looked at: so many of the first images in each of so many of the first epochs that a process trains. In later epochs
# images come from memory, and from processes that have run for a while.
IMAGES = 16
EPOCHS = 3
# A process that changes colours on another number of threads may round a value otherwise.
TOLERANCE = 1  # of 255
STRANGE_SHARE = 0.01  # of an image's values
CONSTANT_SHARE = 0.5  # of the images looked at, once they are enough: a dataset may hold a black image or two
ENOUGH = 8


class Look(NamedTuple):
    """What is found of one image.

    Attributes:
        name: the file's, in the source of the dataset.
        differs: whether it is another image than its file holds.
        constant: whether all of its values are equal.
    """

    name: str
    differs: bool
    constant: bool


def look(batch: Batch, batches: TrainingBatches, number: int, *, most: int = IMAGES) -> list[Look]:
    """Compare the first images of a batch, as the network will see them, with the files that they were made from.

    Args:
        batch: on any device.
        batches: where it comes from.
        number: which batch of the epoch in progress it is.
        most: how many images to look at.
    """
    found = []
    for image, (index, (expected, _)) in zip(batch.images[:most], batches.made_anew(number), strict=False):
        pixels = image.cpu()
        name = batches.reader.images[index].name
        found.append(Look(name, _differs(pixels, expected), bool(pixels.amin() == pixels.amax())))
    return found


def _differs(image: Tensor, expected: Tensor) -> bool:
    if image.shape != expected.shape:
        return True
    strange = (image.short() - expected.short()).abs() > TOLERANCE
    return strange.float().mean().item() > STRANGE_SHARE


def require_true_images(looks: Sequence[Look]) -> None:
    """Raise unless the images are their files', and most of them show something.

    Raises:
        RunError: `images_differ_from_files` (infra): another machine may do better; `images_constant` (data).
    """
    different = [one for one in looks if one.differs]
    if different:
        plain = sum(one.constant for one in different)
        raise RunError(
            "infra",
            "images_differ_from_files",
            f"{len(different)} of the {len(looks)} first training images are not what their files hold, {plain} of "
            f"them of one colour: {_names(different)}; the worker's memory, disk or GPU is at fault, or the dataset "
            "changed while it was read",
        )
    constant = [one for one in looks if one.constant]
    if len(looks) >= ENOUGH and len(constant) > CONSTANT_SHARE * len(looks):
        raise RunError(
            "data",
            "images_constant",
            f"{len(constant)} of the {len(looks)} first training images are of one colour in their files, too: "
            f"{_names(constant)}; look at the dataset's images",
        )


def _names(looks: Sequence[Look]) -> str:
    return ", ".join(one.name for one in looks[:5]) + (", …" if len(looks) > 5 else "")
