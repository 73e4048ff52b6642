"""What release 0.1 stored is still read: a dataset in canonical form, and a training's checkpoint, which resumes."""

import lzma
from pathlib import Path

import pytest

from defeat.engine.data import canonical
from tests.support.tiny import TINY
from tests.support.training import events, run, spec, write_run

STORED = Path(__file__).parents[2] / "data" / "stored"
SCHEDULE = {"batch_size": 2, "learning_rate": 0.01, "warmup_steps": 2}
DETECTOR = {**TINY, "pyramid_channels": 8}
# Of the release's own uninterrupted training, on another machine: the loss of the second epoch's three steps, the AP.
LOSS, AP = 3.2614, 0.0056
HASH = "sha256:9e084b4c3ea1af8d78b2d35d6bfb0e8a338b5a2f93c19e33aa3cccb1d4dab597"


def test_a_dataset_is_read(tmp_path):
    dataset = canonical.unpack(STORED / "dataset.tar", tmp_path / "dataset")
    assert (len(dataset.in_split("train")), len(dataset.in_split("val"))) == (6, 2)
    assert canonical.content_hash(dataset) == HASH


def test_a_training_goes_on_from_its_checkpoint(tmp_path):
    canonical.unpack(STORED / "dataset.tar", tmp_path / "dataset")
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(lzma.decompress((STORED / "training-checkpoint.pt.xz").read_bytes()))
    job = spec(
        teacher={
            "source": "train",
            "detector": DETECTOR,
            "initial_weights": "random",
            "schedule": {"epochs": 1, **SCHEDULE},
        },
        schedule={"epochs": 2, "ema_decay": 0.9, **SCHEDULE},
        evaluation={"every_epochs": 1, "gallery_images": 1},
    )
    directory = write_run(tmp_path / "run", tmp_path / "dataset", job, resume=str(checkpoint))
    assert run(directory)["status"] == "succeeded"
    (metrics,) = events(directory, "metrics")
    assert (metrics["subject"], metrics["step"], metrics["epoch"]) == ("student", 6, 2.0)
    assert metrics["values"]["loss/total"] == pytest.approx(LOSS, rel=1e-3)
    (evaluation,) = events(directory, "evaluation")
    assert (evaluation["subject"], evaluation["epoch"]) == ("student", 2)
    assert evaluation["metrics"]["ap"] == pytest.approx(AP, abs=0.01)
