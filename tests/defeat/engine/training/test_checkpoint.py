"""The file format of training checkpoints: which versions are read, and the error of an unreadable file."""

import pytest
import torch

from defeat.engine.report import RunError
from defeat.engine.training.checkpoint import Best, TrainingCheckpoint

# The keys of a file are promised to earlier and later releases, whatever the attributes are called.
KEYS = [
    "format_version",
    *("subject", "epoch", "step", "model", "method", "optimizer", "scaler", "average", "running", "quiet_steps"),
    *("best", "teacher", "teacher_metrics", "done", "history"),
]


def checkpoint():
    return TrainingCheckpoint(
        subject="student",
        epoch=1,
        step=2,
        model={"weight": torch.arange(3.0)},
        method={},
        optimizer={"state": {}, "param_groups": []},
        scaler={},
        average={"weight": torch.ones(3)},
        running={"sums": {"loss/total": 1.5}, "steps": {"loss/total": 2}},
        quiet_steps={"loss/total": 0},
        best=Best(epoch=1, metrics={"ap": 0.25}, model={"weight": torch.zeros(3)}),
        done=40.0,
        history={"metrics": [], "evaluations": [{"epoch": 1}]},
    )


def test_a_file_has_the_promised_keys_and_reads_as_it_was_written(tmp_path):
    written = checkpoint()
    written.save(tmp_path / "last.pt")
    document = torch.load(tmp_path / "last.pt", weights_only=True)
    assert list(document) == KEYS
    assert list(document["best"]) == ["epoch", "metrics", "model"]
    read = TrainingCheckpoint.load(tmp_path / "last.pt")
    assert torch.equal(read.model["weight"], written.model["weight"])
    assert torch.equal(read.best.model["weight"], written.best.model["weight"])
    assert (read.step, read.running, read.done, read.history) == (2, written.running, 40.0, written.history)


@pytest.mark.parametrize(("version", "readable"), [(1, False), (2, True), (3, True), (4, False)])
def test_versions_2_and_3_are_read(tmp_path, version, readable):
    checkpoint().save(tmp_path / "last.pt")
    torch.save({**torch.load(tmp_path / "last.pt", weights_only=True), "format_version": version}, tmp_path / "last.pt")
    if readable:
        assert TrainingCheckpoint.load(tmp_path / "last.pt").epoch == 1
        return
    with pytest.raises(RunError, match=f"format version {version}; this version reads 2 and 3") as raised:
        TrainingCheckpoint.load(tmp_path / "last.pt")
    assert raised.value.code == "checkpoint_unreadable"


def test_a_file_that_is_cut_off_is_unreadable(tmp_path):
    checkpoint().save(tmp_path / "last.pt")
    content = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match=r"last\.pt cannot be read") as raised:
        TrainingCheckpoint.load(tmp_path / "last.pt")
    assert raised.value.code == "checkpoint_unreadable"
