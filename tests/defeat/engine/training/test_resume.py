"""A run killed after any step goes on to the same bytes."""

import json
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from defeat.engine.report import Reporter
from defeat.engine.training.checkpoint import TrainingCheckpoint
from tests.support.training import events, keep_checkpoints, run, shapes, spec, write_run

NAMES = ("student-best.safetensors", "student-last.safetensors", "teacher.safetensors")
# Whatever has a state of its own is on: momentum twice, the average, draws of proposals, a rate that moves, part
# weights that are measured. Float16's scaler has a test of its own.
SCHEDULE = {
    "epochs": 2,
    "batch_size": 4,
    "accumulation": 2,
    "optimizer": "adamw",
    "learning_rate": 0.002,
    "decay": "one_cycle",
    "ema_decay": 0.9,
    "checkpoint_minutes": 1e-9,
}
JOB = spec(
    teacher={**spec()["teacher"], "schedule": {**SCHEDULE, "epochs": 1}},
    schedule=SCHEDULE,
    distillation={"method": "defeat", "proposals": "both", "weights": "auto", "warmup_steps": 3},
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    shapes(root)
    return root / "canonical"


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """An uninterrupted run, and every training checkpoint that it offered."""
    directory = write_run(tmp_path_factory.mktemp("runs") / "whole", dataset, JOB)
    with pytest.MonkeyPatch.context() as patch:
        kept = keep_checkpoints(patch, directory)
        assert run(directory)["status"] == "succeeded"
    return directory, kept


def the_same(one, other, names=NAMES):
    for name in names:
        assert (one / "artifacts" / name).read_bytes() == (other / "artifacts" / name).read_bytes(), name
    first, second = (json.loads((run / "artifacts" / "metrics.json").read_text()) for run in (one, other))
    assert first["evaluations"] == second["evaluations"]
    timed = ("images_per_s", "data_wait", "memory_bytes")
    for document in (first, second):
        for line in document["metrics"]:
            line["values"] = {name: value for name, value in line["values"].items() if name not in timed}
    assert first["metrics"] == second["metrics"]


def test_there_is_a_checkpoint_after_every_step(whole):
    states = [TrainingCheckpoint.load(path) for path in whole[1]]
    where = [(state.subject, state.epoch, state.step) for state in states]
    steps = [("teacher", 0, step) for step in (1, 2, 3, 4)]
    steps += [("student", 0, step) for step in (1, 2, 3, 4)]
    steps += [("student", 1, step) for step in (0, 1, 2, 3, 4)]
    assert where == steps


@pytest.mark.parametrize("number", [0, 2, 3, 4, 6, 7, 8, 10, 12])
def test_it_goes_on_after_any_step_to_the_same_bytes(whole, dataset, tmp_path, number):
    directory, kept = whole
    resumed = write_run(tmp_path / "resumed", dataset, JOB, resume=str(kept[number]))
    assert run(resumed)["status"] == "succeeded"
    the_same(directory, resumed)
    messages = [one["message"] for one in events(resumed, "message") if one["code"] == "resumed"]
    assert len(messages) == 1


def test_killed_twice_without_warning(whole, dataset, tmp_path):
    """SIGKILL in mid-step, as a machine that goes away; what the run had written is all there is."""
    resume = None
    for attempt, steps in enumerate((3, 4)):
        directory = write_run(tmp_path / str(attempt), dataset, JOB, resume=resume)
        process = subprocess.Popen([sys.executable, "-m", "defeat.engine.run", str(directory)])
        log, deadline = directory / "events.jsonl", time.monotonic() + 120
        while not (log.exists() and log.read_text().count('"type": "checkpoint"') >= steps):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        resume = str(directory / "checkpoints" / "last.pt")
    last = write_run(tmp_path / "last", dataset, JOB, resume=resume)
    assert run(last)["status"] == "succeeded"
    the_same(whole[0], last)


def test_in_float16_the_scale_goes_on_as_well(dataset, tmp_path):
    """It starts too large: the first steps are left out and halve it, and others double it again."""
    job = {
        **JOB,
        "teacher": None,
        "distillation": {"method": "baseline"},
        "schedule": {**SCHEDULE, "precision": "float16"},
    }
    whole = write_run(tmp_path / "whole", dataset, job)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**20, growth_interval=2))
        kept = keep_checkpoints(patch, tmp_path)
        assert run(whole)["status"] == "succeeded"
        scales = [TrainingCheckpoint.load(path).scaler["scale"] for path in kept]
        assert min(scales) < scales[0]
        assert scales[4] != scales[-1]
        resumed = write_run(tmp_path / "resumed", dataset, job, resume=str(kept[4]))
        assert run(resumed)["status"] == "succeeded"
    the_same(whole, resumed, names=NAMES[:2])
    # What others read is JSON to the letter, although some steps have no gradient.
    json.loads((whole / "artifacts" / "metrics.json").read_text(), parse_constant=pytest.fail)


def test_the_average_is_what_is_measured_and_kept(whole):
    directory, kept = whole
    measured, last = TrainingCheckpoint.load(kept[8]), TrainingCheckpoint.load(kept[12])
    assert (measured.epoch, measured.step, last.epoch, last.step) == (1, 0, 1, 4)
    assert all(torch.equal(measured.best.model[name], one) for name, one in measured.average.items())
    student = load_file(directory / "artifacts" / "student-last.safetensors")
    assert all(torch.equal(student[name], last.average[name]) for name in student)
    assert any(not torch.equal(student[name], last.model[name]) for name in student)


@pytest.mark.parametrize(
    ("when", "at"),
    [
        # Seen after the third step, so that the fourth is the last.
        (lambda phase, given: phase == "distillation" and given["step"] == 3, ("student", 0, 4)),
        # While the last epoch is being measured: its steps are kept, and measured again.
        (lambda phase, given: phase == "distillation" and given["step"] == 8, ("student", 1, 4)),
    ],
    ids=["in_an_epoch", "while_measuring"],
)
def test_asked_to_end_it_saves_the_step_it_is_in(whole, dataset, tmp_path, when, at):
    job = {**JOB, "schedule": {**SCHEDULE, "checkpoint_minutes": 60}}
    directory = write_run(tmp_path / "first", dataset, job)
    with pytest.MonkeyPatch.context() as patch:
        plain = Reporter.progress

        def _progress(self, phase, **given):
            plain(self, phase, **given)
            self.cancelled |= when(phase, given)

        patch.setattr(Reporter, "progress", _progress)
        assert run(directory)["status"] == "cancelled"
    checkpoint = directory / "checkpoints" / "last.pt"
    state = TrainingCheckpoint.load(checkpoint)
    assert (state.subject, state.epoch, state.step) == at
    resumed = write_run(tmp_path / "second", dataset, job, resume=str(checkpoint))
    assert run(resumed)["status"] == "succeeded"
    the_same(whole[0], resumed)
