"""A small data set to try the service with: scenes of handwritten digits, in COCO's layout, made in seconds.

    python -m examples.digits DIRECTORY [--train-scenes N] [--val-scenes N] [--width W] [--height H] [--seed S]

The digits are scikit-learn's 8x8 scans. No scan is in both splits, so `val` measures generalisation.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

CLASSES = tuple("0123456789")
SMALLEST, LARGEST = 20, 48  # pixels, the side that a scan's 8 cells are scaled to
FEWEST, MOST = 2, 6  # digits that are tried in one scene
_INK = 0.35  # share of full ink from which a pixel counts as the digit's
_OVERLAP = 0.1  # most that two boxes share, as a part of the smaller one
_VAL_SHARE = 0.25  # of the scans
_TRIES = 20  # positions that are tried for one digit before it is left out

Gray = NDArray[np.float32]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Scan:
    """One handwritten digit: `pixels` is (8, 8), ink from 0 to 1; `label` is 0 to 9."""

    pixels: Gray
    label: int


def build(
    directory: Path | str,
    *,
    train_scenes: int = 400,
    val_scenes: int = 100,
    width: int = 160,
    height: int = 128,
    seed: int = 0,
) -> Path:
    """Write the data set into `directory` and return it; the same arguments write the same bytes.

    It then holds `annotations/instances_{train,val}.json` and `images/{train,val}/NNNNNN.png` (greyscale), every scene
    `width` x `height` pixels with at least one digit, ten classes "0" to "9" with the category ids 1 to 10.

    Raises `ValueError` for a size too small for the largest digit or a count below 1, and `FileExistsError` if the
    directory already holds a data set: old scenes would mix with the new ones.
    """
    directory = Path(directory)
    if min(width, height) < LARGEST:
        raise ValueError(f"a scene of {width}x{height} pixels: both sides must be at least {LARGEST}")
    if min(train_scenes, val_scenes) < 1:
        raise ValueError(f"{train_scenes} train and {val_scenes} val scenes: at least 1 of each is needed")
    for name in ("annotations", "images"):
        if (directory / name).exists():
            raise FileExistsError(f"{directory / name} exists already: choose another directory or remove it")
    rng = np.random.default_rng(seed)
    train, val = _scans(rng)
    _write_split(directory, "train", _scenes(rng, train, train_scenes, width, height))
    _write_split(directory, "val", _scenes(rng, val, val_scenes, width, height))
    return directory


def _scans(rng: np.random.Generator) -> tuple[list[Scan], list[Scan]]:
    """Return the scans for train and for val: disjoint, shuffled by `rng`."""
    digits = load_digits()
    order = rng.permutation(len(digits.target))
    scans = [Scan((digits.images[i] / 16).astype(np.float32), int(digits.target[i])) for i in order]
    kept = int(len(scans) * _VAL_SHARE)
    return scans[kept:], scans[:kept]


def _scenes(
    rng: np.random.Generator, scans: list[Scan], count: int, width: int, height: int
) -> Iterator[tuple[Gray, list[tuple[int, Box]]]]:
    """Yield `count` scenes: an image (height, width), 0 to 255, and a label with a box for each digit."""
    for _ in range(count):
        image = _background(rng, width, height)
        objects: list[tuple[int, Box]] = []
        for _ in range(int(rng.integers(FEWEST, MOST + 1))):
            scan = scans[int(rng.integers(len(scans)))]
            ink = _scaled(scan, int(rng.integers(SMALLEST, LARGEST + 1)))
            box = _free_place(rng, ink, [other for _, other in objects], width, height)
            if box is not None:
                _draw(rng, image, ink, box)
                objects.append((scan.label, box))
        yield image, objects


def _background(rng: np.random.Generator, width: int, height: int) -> Gray:
    """Return a grey image (height, width) with a slope of light and noise."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    level, across, down = rng.uniform(30, 100), rng.uniform(-30, 30), rng.uniform(-30, 30)
    slope = across * (x / width - 0.5) + down * (y / height - 0.5)
    noise = rng.normal(0, rng.uniform(2, 8), (height, width))
    return (level + slope + noise).astype(np.float32)


def _scaled(scan: Scan, size: int) -> Gray:
    """Return the scan scaled to `size` x `size` pixels and cropped to its ink, 0 to 1."""
    image = Image.fromarray(scan.pixels).resize((size, size), Image.Resampling.BICUBIC)
    ink = np.clip(np.asarray(image, dtype=np.float32), 0, 1)
    rows, columns = np.nonzero(ink >= _INK)
    return ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def _free_place(rng: np.random.Generator, ink: Gray, taken: list[Box], width: int, height: int) -> Box | None:
    """Return a box of the ink's size that hardly overlaps the taken ones, or None if none was found."""
    tall, wide = ink.shape
    for _ in range(_TRIES):
        left, top = int(rng.integers(width - wide + 1)), int(rng.integers(height - tall + 1))
        box = (left, top, left + wide, top + tall)
        if all(_shared(box, other) <= _OVERLAP for other in taken):
            return box
    return None


def _shared(a: Box, b: Box) -> float:
    """Return the intersection's area over the smaller box's, 0 to 1."""
    wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(wide, 0) * max(tall, 0) / smaller


def _draw(rng: np.random.Generator, image: Gray, ink: Gray, box: Box) -> None:
    left, top, right, bottom = box
    region = image[top:bottom, left:right]
    # From the place's own grey up, so that every digit stands out from what is behind it.
    region += ink * rng.uniform(70, 130)


def _write_split(directory: Path, split: str, scenes: Iterator[tuple[Gray, list[tuple[int, Box]]]]) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (directory / "images" / split).mkdir(parents=True)
    for number, (image, objects) in enumerate(scenes, start=1):
        name = f"{number:06d}.png"
        pixels = Image.fromarray(np.clip(np.rint(image), 0, 255).astype(np.uint8))
        pixels.save(directory / "images" / split / name, compress_level=1)
        images.append({"id": number, "file_name": name, "width": pixels.width, "height": pixels.height})
        for label, (left, top, right, bottom) in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(CLASSES)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (directory / "annotations").mkdir(exist_ok=True)
    (directory / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))


def main(arguments: list[str] | None = None) -> int:
    """Build a data set as the command line says and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.digits", description="Scenes of digits in COCO's layout.")
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="where to write the data set")
    parser.add_argument("--train-scenes", type=int, default=400, help="images to train on (default: %(default)s)")
    parser.add_argument("--val-scenes", type=int, default=100, help="images to evaluate on (default: %(default)s)")
    parser.add_argument("--width", type=int, default=160, help="pixels (default: %(default)s)")
    parser.add_argument("--height", type=int, default=128, help="pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same images (default: 0)")
    options = parser.parse_args(arguments)
    try:
        directory = build(**vars(options))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.train_scenes} train and {options.val_scenes} val scenes in {directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
