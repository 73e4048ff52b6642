"""The parts of `benchmarks.gpu` that load images: whether batches are correct, and how long training waits for them."""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from benchmarks.gpu_setups import Found, Setting
from benchmarks.loader import write
from benchmarks.step_time import CASES, CLOCK, Bench
from defeat.engine.data.loading.batch import Batch
from defeat.engine.data.loading.config import AugmentationConfig
from defeat.engine.data.loading.loader import ImageReader, TrainingBatches
from defeat.engine.data.loading.resize import InputSize
from defeat.engine.numerics import numerics

EPOCHS = 3
WAIT_GOAL = 0.01  # of a step
FILES, COPIES = 48, 6  # images that are made, and records of each in the split
_CHANGES = AugmentationConfig(mosaic=0.3, zoom_out=0.2, iou_crop=0.3, scale_min=0.8, scale_max=1.1, hue=0.1)


@lru_cache(maxsize=1)
def _images(home: Path, count: int) -> ImageReader:
    """Return JPEG files of 1280x960, made in `home` once."""
    root = home / "images"
    root.mkdir()
    return write(root, count)


def loading(setting: Setting) -> Found:
    """Compare the device's batches, prefetched by loader processes on a GPU, with those that this process makes."""
    reader = _images(setting.home, 6 if setting.small else FILES)
    batch_size = 2 if setting.small else 8
    size = InputSize(min_size=64, max_size=96) if setting.small else InputSize(min_size=400, max_size=666)
    ours, plain = (
        TrainingBatches(reader, batch_size=batch_size, size=size, augmentation=_CHANGES, device=device)
        for device in (setting.device, torch.device("cpu"))
    )
    compared, unequal, pinned = 0, 0, 0
    for epoch in range(EPOCHS):
        for batch, twin in zip(ours.epoch(epoch), plain.epoch(epoch), strict=True):
            pinned += batch.storage.is_pinned()
            compared += 1
            unequal += not equal(batch.to(setting.device), twin)
    return Found(
        measured={
            "processes": ours.prefetch.processes,
            "batches": compared,
            "unequal": unequal,
            "pinned": pinned,
        },
        goal="processes load; all batches pinned and equal",
        met=ours.prefetch.processes > 0 and unequal == 0 and pinned == compared == EPOCHS * len(ours),
    )


def equal(batch: Batch, twin: Batch) -> bool:
    """Return whether two batches have the same images and targets to the byte, on whatever devices."""
    return len(batch) == len(twin) and all(
        torch.equal(image.cpu(), other)
        and target.keys() == alike.keys()
        and torch.equal(target["boxes"].cpu(), alike["boxes"])
        and torch.equal(target["labels"].cpu(), alike["labels"])
        for image, other, target, alike in zip(batch.images, twin.images, batch.targets, twin.targets, strict=True)
    )


def data_wait(setting: Setting) -> Found:
    """Train from JPEG files with DeFeat's step, and return the share of time spent waiting for a batch.

    Files of 1280x960 become images of 800x1066: less work for a step than 800x1333, and as much for the loader. Epoch 1
    decodes every image, epoch 2 reads them from the cache. `share` excludes an epoch's first batch, which cannot be
    prefetched, and `with_first` includes it. The files have just been written, so that no disk is measured.
    """
    reader = _images(setting.home, 6 if setting.small else FILES)
    copies = 2 if setting.small else COPIES
    records = [replace(image, id=copy * len(reader) + image.id) for copy in range(copies) for image in reader.images]
    bench = Bench(CASES["faster_rcnn, student's proposals"], setting.size, setting.device)
    batches = TrainingBatches(
        ImageReader(reader.root, records),
        batch_size=setting.size.images,
        size=InputSize.from_detector(bench.ours.losses.detector),
        augmentation=AugmentationConfig(),
        device=setting.device,
    )
    rows = {}
    with numerics(setting.device, bench.schedule.precision, shapes=batches.padded_shapes):
        for epoch in (1, 2):
            times = list(_trained(bench, batches.epoch(epoch), setting.device))
            rows[f"epoch_{epoch}"] = {
                "share": round(_share(times[1:]), 5),
                "with_first": round(_share(times), 5),
                "step_ms": round(1000 * sum(whole for _, whole in times[1:]) / len(times[1:]), 1),
            }
    return Found(
        measured={**rows, "processes": batches.prefetch.processes, "images": len(records)},
        goal={"share": WAIT_GOAL},
        met=all(row["share"] < WAIT_GOAL for row in rows.values()),
    )


def _trained(bench: Bench, batches: Iterator[Batch], device: torch.device) -> Iterator[tuple[float, float]]:
    """Take a step on each batch; yield the seconds waited for it, and those of the whole step with the wait."""
    while True:
        begun = time.perf_counter()
        batch = next(batches, None)
        waited = time.perf_counter() - begun
        if batch is None:
            return
        # It ends by copying its numbers: the device is then done, but for the update.
        bench.ours(batch.to(device), CLOCK)
        yield waited, time.perf_counter() - begun


def _share(times: list[tuple[float, float]]) -> float:
    return sum(waited for waited, _ in times) / sum(whole for _, whole in times)
