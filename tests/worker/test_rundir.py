"""What the supervisor reads from a run's directory, whose content may be hostile."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from app.db import utcnow
from app.models import JobEvent
from defeat.engine.events import CheckpointOffer, Evaluation, Metrics, Progress, Result, ResultArtifact
from defeat.engine.report import Reporter, RunError
from tests.support.worker_world import World
from worker.rundir import RecordedMessage, RunDirectory

SUCCEED = ["finish", "succeeded", {}]


def test_an_artifact_that_is_a_link_is_refused(world: World) -> None:
    job = world.job(["link", "passwd", "/etc/passwd"], ["finish", "succeeded", {}])
    world.work(job)
    assert world.now(job).failure["code"] == "bad_result"
    assert set(world.artifacts(job)) == {"log.txt"}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"status": "done"}', '{"status": "succeeded", "results": {"x": NaN}}', "[" * 100_000]
)
def test_an_unreadable_result(world: World, text: str) -> None:
    job = world.job(["write", "result.json", text])
    world.work(job)
    assert world.now(job).failure["code"] == "bad_result"


@pytest.mark.timeout(30)  # the next read is at once, not at the renewal of the lease
def test_unreadable_events_are_warnings(each_world: World) -> None:
    world = each_world
    world.settings.lease_s = 300.0
    bad = [
        "{not json}",
        "[]",
        '{"type": "dance"}',
        '{"type": "metrics", "subject": "student", "step": 99999999999, "epoch": 1, "values": {}}',
        '{"type": "metrics", "subject": "student", "step": 1, "epoch": 1, "values": {"x": NaN}}',
        "[" * 50_000,
        "x" * 3_000_000,
        "<NUL>",
    ]
    good = '{"type": "message", "level": "info", "code": "nul", "message": "a\\u0000b\\ud800c"}'
    job = world.job(["raw", "\n".join([*bad, good]) + "\n"], ["finish", "succeeded", {}])

    world.work(job)

    assert world.now(job).status == "succeeded"
    assert world.codes(job) == ["claimed", *["malformed_event"] * len(bad), "nul", "succeeded"]
    assert (
        next(event.message for event in world.all(JobEvent) if event.code == "nul") == "a\N{REPLACEMENT CHARACTER}b?c"
    )


def test_what_dead_workers_left_is_removed(world: World) -> None:
    runs = world.settings.scratch / "runs"
    (runs / "job_dead-1").mkdir(parents=True)
    (runs / "job_dead-1" / "big").touch()
    (runs / "job_dead-1.lock").touch()
    world.work(world.job(["finish", "succeeded", {}]))
    assert world.scratch_left() == []


def test_a_run_cannot_choose_a_messages_origin(world: World) -> None:
    line = '{"type": "message", "level": "info", "code": "said", "message": "x", "origin": "0"}\n'
    job = world.job(["raw", line * 3], SUCCEED)
    world.work(job)
    assert world.codes(job) == ["claimed", "said", "said", "said", "succeeded"]
    assert len({event.origin for event in world.all(JobEvent) if event.code == "said"}) == 3


def test_what_a_run_reports_is_what_its_supervisor_reads(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path)
    begun = utcnow()
    reporter.progress("teacher", fraction=0.25, epoch=1, epochs=4, step=2, steps=8, eta_s=9.04, images_per_s=3.0)
    reporter.message("warn", "slow_disk", "the disk is slow")
    reporter.metrics("student", step=2, epoch=0.25, values={"loss/total": 1.5, "loss/x": math.inf})
    reporter.evaluation("teacher", epoch=1, metrics={"ap": 0.5, "by_class": {"RBC": None}})
    reporter.checkpoint(tmp_path / "checkpoints" / "a.pt")
    reporter.artifact("a.txt", kind="log", content_type="text/plain", details={"epoch": 1}).write_text("a")
    reporter.artifact("never-written.txt", kind="log", content_type="text/plain")
    reporter.finish("failed", results={"x": 1}, failure=RunError("oom", "out_of_memory", "too big"))

    directory = RunDirectory(tmp_path)
    events = directory.events.read()
    offsets = [0]
    for line in (tmp_path / "events.jsonl").read_bytes().splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))

    assert all(begun <= event.time <= utcnow() for event in events)
    assert [replace(event, time=None) for event in events] == [
        Progress(phase="teacher", fraction=0.25, epoch=1, epochs=4, step=2, steps=8, eta_s=9.0, images_per_s=3.0),
        RecordedMessage(level="warn", code="slow_disk", message="the disk is slow", origin=str(offsets[1])),
        Metrics(subject="student", step=2, epoch=0.25, values={"loss/total": 1.5, "loss/x": None}),
        Evaluation(subject="teacher", epoch=1, metrics={"ap": 0.5, "by_class": {"RBC": None}}),
        CheckpointOffer(path="checkpoints/a.pt"),
    ]
    assert directory.result() == Result(
        status="failed",
        results={"x": 1},
        failure={"class": "oom", "code": "out_of_memory", "detail": "too big"},
        artifacts=[ResultArtifact(name="a.txt", kind="log", content_type="text/plain", details={"epoch": 1})],
    )


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"type": "progress", "phase": "x" * 41, "fraction": 0.5}, "progress.phase"),
        ({"type": "progress", "phase": "teacher", "fraction": 1.5}, "progress.fraction"),
        ({"type": "message", "level": "loud", "code": "x", "message": "x"}, "message.level"),
        ({"type": "message", "level": "info", "code": "x", "message": "x", "time": "2026-01-01"}, "message.time"),
        ({"type": "metrics", "subject": "student", "step": -1, "epoch": 1, "values": {}}, "metrics.step"),
        ({"type": "evaluation", "subject": "nobody", "epoch": 1, "metrics": {}}, "evaluation.subject"),
        ({"type": "checkpoint"}, "checkpoint.path"),
    ],
)
def test_an_event_beyond_a_limit_is_a_warning_that_names_the_member(tmp_path: Path, members: dict, reason: str) -> None:
    (tmp_path / "events.jsonl").write_text(json.dumps(members) + "\n")
    (warning,) = RunDirectory(tmp_path).events.read()
    assert (warning.level, warning.code, warning.origin) == ("warn", "malformed_event", "0")
    assert f"({reason}: " in warning.message


def test_a_failure_that_says_too_much_is_cut(tmp_path: Path) -> None:
    Reporter(tmp_path).finish("failed", failure=RunError("data", "bad", "x" * 50_000))
    result = RunDirectory(tmp_path).result()
    assert result.failure == {"class": "data", "code": "bad", "detail": "x" * 20_000}
