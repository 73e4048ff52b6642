"""Small detectors and datasets that the engine's tests share."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from defeat.engine.data.canonical import AnnotatedImage, Box, CanonicalDataset, write
from defeat.engine.report import Reporter
from defeat.engine.run import main
from tests.support.tiny import TINY

CLASSES = ("square", "disc")


def shapes(directory: Path, *, train: int = 16, val: int = 6, seed: int = 0, masks: bool = False) -> CanonicalDataset:
    """Write a canonical dataset of bright squares and discs, 96x64, with their masks if wanted, and return it."""
    rng = np.random.default_rng(seed)
    records, sources = [], {}
    for number in range(train + val):
        pixels = rng.integers(0, 60, (64, 96, 3), dtype=np.uint8)
        boxes = []
        for index in range(2):
            size = int(rng.integers(14, 28))
            x, y = 4 + 46 * index + int(rng.integers(0, 16)), int(rng.integers(2, 62 - size))
            kind = int(rng.integers(2))
            rows, columns = np.mgrid[0:size, 0:size] - (size - 1) / 2
            inside = np.ones((size, size), bool) if kind == 0 else rows**2 + columns**2 <= (size / 2) ** 2
            pixels[y : y + size, x : x + size][inside] = (230, 220, 40 + 180 * kind)
            bitmap = np.zeros((64, 96), np.uint8)
            bitmap[y : y + size, x : x + size] = inside
            boxes.append(Box(kind, x, y, x + size, y + size, mask=text_of(bitmap) if masks else None))
        path = directory / "source" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        file = f"images/{hashlib.sha256(path.read_bytes()).hexdigest()}.png"
        sources[file] = path
        split = "train" if number < train else "val"
        records.append(AnnotatedImage(number + 1, file, path.name, 96, 64, split, tuple(boxes)))  # type: ignore[arg-type]
    dataset = CanonicalDataset(CLASSES, tuple(records))
    write(directory / "canonical", dataset, sources)
    return dataset


def text_of(bitmap: np.ndarray) -> str:
    """Return a mask (H, W) as the text that boxes keep."""
    return str(coco_mask.encode(np.asfortranarray(bitmap))["counts"].decode())


def images_and_targets(count: int = 3, seed: int = 0) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Return random images of unequal sizes with one to three boxes each."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for index in range(count):
        height, width = 64 - 7 * index, 80 + 5 * index
        images.append(torch.rand(3, height, width, generator=generator))
        corner = torch.rand(index + 1, 2, generator=generator) * 30
        size = torch.rand(index + 1, 2, generator=generator) * 20 + 5
        labels = torch.randint(1, len(CLASSES) + 1, (index + 1,), generator=generator)
        targets.append({"boxes": torch.cat([corner, corner + size], dim=1), "labels": labels})
    return images, targets


def spec(**changes: Any) -> dict[str, Any]:
    """Return a tiny job's spec; `changes` replace its top-level keys."""
    schedule = {"epochs": 2, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 2}
    return {
        "teacher": {"source": "train", "detector": TINY, "initial_weights": "random", "schedule": schedule},
        "student": {"detector": {**TINY, "pyramid_channels": 8}, "initial_weights": "random"},
        "distillation": {"method": "defeat", "warmup_steps": 2},
        "schedule": schedule,
        "evaluation": {"every_epochs": 1, "gallery_images": 2},
        "augmentation": {"horizontal_flip": 0.5},
        "seed": 3,
        **changes,
    }


def write_run(directory: Path, dataset: Path, job: dict[str, Any], **inputs: Any) -> Path:
    """Write a `distill` run directory."""
    directory.mkdir(parents=True)
    given = {"dataset": str(dataset), "teacher": None, "student": None, "teacher_initial": None, "resume": None}
    request = {
        "kind": "distill",
        "id": "job_x",
        "attempt": 1,
        "spec": job,
        "inputs": {**given, "device": "cpu", "image_memory_bytes": None, **inputs},
    }
    (directory / "run.json").write_text(json.dumps(request))
    return directory


def run(directory: Path) -> dict[str, Any]:
    """Carry out the run and return its result; in this process, for torch takes seconds to import."""
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        code = main(directory)
    finally:
        signal.signal(signal.SIGTERM, on_term)
    result = json.loads((directory / "result.json").read_text())
    assert code == {"succeeded": 0, "failed": 1, "cancelled": 3}[result["status"]]
    return dict(result)


def keep_checkpoints(patch: pytest.MonkeyPatch, directory: Path) -> list[Path]:
    """Return where copies stand, in `directory`, of each training checkpoint that a run here offers from now on."""
    kept: list[Path] = []

    def _keep(_reporter: Reporter, path: Path) -> None:
        kept.append(directory / f"kept-{len(kept)}.pt")
        shutil.copyfile(path, kept[-1])

    patch.setattr(Reporter, "checkpoint", _keep)
    return kept


def run_alone(directory: Path) -> dict[str, Any]:
    """Carry out the run as the worker does, by `python -m defeat.engine.run`, and return its result."""
    command = [sys.executable, "-m", "defeat.engine.run", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    result = json.loads((directory / "result.json").read_text())
    assert done.returncode == {"succeeded": 0, "failed": 1, "cancelled": 3}[result["status"]], done.stderr
    return dict(result)


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    """Return a run's events of one type."""
    lines = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["type"] == kind]
