"""Loading training images from JPEG files: the engine against a plain torchvision dataset with the same transforms.

    python -m benchmarks.loader [--quick]

The images are synthetic photographs, 1280x960, JPEG quality 90, flipped half of the time and resized to a detector's
usual size, up to 800x1333. The baseline is the usual code: a `Dataset` that opens each file with Pillow, and
torchvision's v2 transforms on `tv_tensors`, in a `DataLoader`. Both return floats 0 to 1 in lists, in this process:
loader processes would speed up both alike. The two run in turn, epoch by epoch; the first epoch fills the engine's
cache.

`ratio` compares images per second over a whole training of the default length: one first epoch and the later ones.
`wait_…` is the share of a training step spent waiting for images, with a small detector on this machine's CPU.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from defeat.engine import detectors
from defeat.engine.data.canonical import AnnotatedImage, Box
from defeat.engine.data.loading.batch import Batch
from defeat.engine.data.loading.config import AugmentationConfig
from defeat.engine.data.loading.loader import ImageReader, TrainingBatches
from defeat.engine.data.loading.resize import InputSize, disable_training_resize
from defeat.engine.training.config import ScheduleConfig

GOAL = 2.0
HEIGHT, WIDTH = 960, 1280
SIZE = InputSize(min_size=800, max_size=1333)
BATCH = 4
CPU = torch.device("cpu")
STUDENT = {"architecture": "faster_rcnn", "backbone": "timm/mobilenetv3_small_050", "pyramid_channels": 64}


def photograph(rng: np.random.Generator, boxes: tuple[Box, ...]) -> Image.Image:
    """Return a smooth image with noise and a rectangle in each box: a JPEG about as large as a photograph's."""
    smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (WIDTH, HEIGHT), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(smooth).astype(np.int16)
    for box in boxes:
        pixels[int(box.y1) : int(box.y2), int(box.x1) : int(box.x2)] = rng.integers(0, 256, 3)
    pixels += rng.normal(0, 6, pixels.shape).astype(np.int16)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write(root: Path, count: int) -> ImageReader:
    """Write a training split under `root` and return its reader."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    images = []
    for number in range(1, count + 1):
        corners = rng.integers(0, (WIDTH - 400, HEIGHT - 400), (7, 2))
        sides = rng.integers(20, 400, (7, 2))
        boxes = tuple(
            Box(int(rng.integers(80)), float(x), float(y), float(x + w), float(y + h))
            for (x, y), (w, h) in zip(corners, sides, strict=True)
        )
        file = f"images/{number:064x}.jpg"
        photograph(rng, boxes).save(root / file, quality=90)
        images.append(AnnotatedImage(number, file, f"{number}.jpg", WIDTH, HEIGHT, "train", boxes))
    return ImageReader(root, images)


class Plain(Dataset[tuple[Tensor, dict[str, Any]]]):
    """The baseline: the usual dataset."""

    def __init__(self, images: ImageReader) -> None:
        self.images = images
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.RandomHorizontalFlip(0.5),
                v2.Resize(SIZE.min_size, max_size=SIZE.max_size),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        record = self.images.images[index]
        image = Image.open(self.images.root / record.file).convert("RGB")
        boxes = tv_tensors.BoundingBoxes(
            [[box.x1, box.y1, box.x2, box.y2] for box in record.boxes],
            format="XYXY",
            canvas_size=(record.height, record.width),
        )
        target = {"boxes": boxes, "labels": torch.tensor([box.class_index + 1 for box in record.boxes])}
        changed: tuple[Tensor, dict[str, Any]] = self.transform(image, target)
        return changed


def plain_epoch(loader: Iterable[tuple[tuple[Tensor, ...], Any]]) -> float:
    """Return the images per second of one epoch of the baseline."""
    start, count = time.perf_counter(), 0
    for images, _ in loader:
        count += len(images)
    return count / (time.perf_counter() - start)


def our_epoch(batches: TrainingBatches, seed: int) -> float:
    """Return the images per second of one epoch of the engine's batches, as floats like in training."""
    start, count = time.perf_counter(), 0
    for batch in batches.epoch(seed):
        count += len(batch.floats())
    return count / (time.perf_counter() - start)


def waiting(batches: TrainingBatches, steps: int) -> float:
    """Return the share of training steps (forward and backward) that is spent waiting for images."""
    torch.manual_seed(0)
    detector = detectors.build(STUDENT, [f"class {index}" for index in range(80)]).train()
    disable_training_resize(detector)
    epoch, waited, whole = batches.epoch(0), 0.0, 0.0
    for _ in range(steps):
        start = time.perf_counter()
        batch: Batch = next(epoch)
        waited += time.perf_counter() - start
        losses = detector.forward_train(batch.floats(), batch.targets).losses
        torch.stack(list(losses.values())).sum().backward()
        whole += time.perf_counter() - start
    return waited / whole


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and return the result."""
    parser = argparse.ArgumentParser(description="Loading training images.")
    parser.add_argument("--quick", action="store_true", help="32 images and three turns instead of 128 and five")
    quick = parser.parse_args(arguments).quick
    images, turns, later_epochs, steps = (32, 3, 2, 2) if quick else (128, 5, 3, 8)
    theirs: list[float] = []
    first: list[float] = []
    later: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        reader = write(Path(folder), images)
        loader = DataLoader(
            Plain(reader),
            batch_size=BATCH,
            shuffle=True,
            drop_last=True,
            collate_fn=lambda batch: tuple(zip(*batch, strict=True)),
        )
        for turn in range(turns):
            batches = TrainingBatches(
                reader, batch_size=BATCH, size=SIZE, augmentation=AugmentationConfig(), device=CPU
            )
            theirs.append(plain_epoch(loader))
            first.append(our_epoch(batches, seed=0))
            later.extend(our_epoch(batches, seed=epoch) for epoch in range(1, later_epochs + 1))
            print(
                f"turn {turn + 1}: plain {theirs[-1]:.1f} images/s, ours {first[-1]:.1f} in the first epoch, "
                f"{later[-1]:.1f} later",
                flush=True,
            )
        kept = batches.cache.kept
        fresh = TrainingBatches(reader, batch_size=BATCH, size=SIZE, augmentation=AugmentationConfig(), device=CPU)
        wait_first, wait_later = waiting(fresh, steps), waiting(batches, steps)
    plain_rate, first_rate, later_rate = map(statistics.median, (theirs, first, later))
    epochs = ScheduleConfig().epochs
    ratio = epochs / (1 / first_rate + (epochs - 1) / later_rate) / plain_rate
    result = {
        "benchmark": "loader",
        "ratio": round(ratio, 2),
        "goal": GOAL,
        "ok": ratio >= GOAL,
        "epochs": epochs,
        "plain_images_per_s": round(plain_rate, 1),
        "first_epoch_images_per_s": round(first_rate, 1),
        "later_epochs_images_per_s": round(later_rate, 1),
        "first_epoch_ratio": round(first_rate / plain_rate, 2),
        "later_epochs_ratio": round(later_rate / plain_rate, 2),
        "images": images,
        "kept": kept,
        "wait_first_epoch": round(wait_first, 3),
        "wait_later_epochs": round(wait_later, 3),
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    sys.exit(0 if main()["ok"] else 1)
