import json
import os
import pty
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from defeat.cli.main import app
from tests.support.service import metrics, progress, reach
from tests.support.waiting import until

COMMAND = [sys.executable, "-c", "from defeat.cli.main import main; main()"]
REPORT = {
    "format": "coco",
    "images": 4,
    "boxes": 9,
    "classes": [{"name": "RBC", "splits": {"train": {"images": 3, "boxes": 7}}}],
    "splits": {"train": {"images": 3, "boxes": 7}, "val": {"images": 1, "boxes": 2}},
    "problems": [
        {
            "code": "box_outside",
            "severity": "dropped",
            "count": 2,
            "summary": "boxes outside their image",
            "examples": [{"file": "a.png", "detail": "x2 is 700 of 640"}],
        }
    ],
    "dropped_fraction": 0.1,
    "max_dropped_fraction": 0.2,
}


def defeat(*arguments):
    """Run the command in this process; stdout and stderr are kept apart, as a pipe keeps them."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("name: cells-small\ndataset: ds_0000\nschedule: {learning_rate: 1e-2}\n")
    return path


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "cells.zip"
    path.write_bytes(b"images")
    return path


def succeed(service):
    """Let the next job go through a whole life, a step at each look."""

    def train(job):
        service.events[job["id"]] = [
            {"id": "evt_1", "level": "warn", "code": "slow", "message": "few workers", "created_at": ""}
        ]
        service.metrics[job["id"]] = [
            {"subject": "student", "step": 5, "epoch": 0.5, "values": {"loss/total": 1.25, "loss/neck": None}}
        ]
        reach("running", progress=progress("distillation", 0.5, epoch=1))(job)

    def end(job):
        service.evaluations[job["id"]] = [{"subject": "student", "epoch": 2, "metrics": metrics(0.31)}]
        results = {"teacher": metrics(0.5), "student": {**metrics(0.31), "epoch": 2}, "teacher_checkpoint_id": "ckpt_7"}
        reach("succeeded", progress=progress("finishing", 1.0), results=results)(job)

    service.script = [train, end]


FAILURE = {
    "class": "data",
    "code": "no_boxes",
    "detail": "the train split has no boxes",
    "log_tail": ["Traceback", "x"],
}


def test_submitting_without_waiting_ends_when_accepted(service, spec):
    result = defeat("jobs", "submit", spec)
    assert (result.exit_code, result.stdout) == (0, "job_0000 queued\n")
    assert service.jobs["job_0000"]["spec"]["schedule"] == {"learning_rate": 0.01}


def test_waiting_for_success_shows_it_all_in_plain_lines(service, spec):
    succeed(service)
    result = defeat("jobs", "submit", spec, "--wait")
    assert result.exit_code == 0
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert lines == [
        "job_0000 running",
        "warn: few workers (slow)",
        "50% distillation, epoch 1/2, step 5/10, loss total 1.25 neck -, 20.5 images/s, ETA 1m 15s",
        "job_0000 succeeded",
        "student after epoch 2: AP 0.310, AP50 0.510",
        "100% finishing, step 5/10, loss total 1.25 neck -, 20.5 images/s, ETA 1m 15s",
        "         AP     AP50   AP75",
        "teacher  0.500  0.700  0.450",
        "student  0.310  0.510  0.260",
        "the teacher is saved as ckpt_7",
    ]
    assert result.stderr == ""


def test_masks_that_were_measured_are_shown(service, spec):
    results = {"teacher": None, "student": {**metrics(0.31), "masks": metrics(0.2)}, "teacher_checkpoint_id": None}
    service.script = [reach("succeeded", results=results)]
    lines = defeat("jobs", "submit", spec, "--wait").stdout.splitlines()
    assert [line.split() for line in lines if line.startswith("student")][-2:] == [
        ["student", "0.310", "0.510", "0.260"],
        ["student's", "masks", "0.200", "0.400", "0.150"],
    ]


def test_json_is_alone_on_stdout_and_the_job_is_last(service, spec):
    succeed(service)
    result = defeat("jobs", "submit", spec, "--wait", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["object"] for line in lines] == ["update", "update", "job"]
    assert lines[-1]["status"] == "succeeded"
    assert lines[0]["metrics"][0]["values"]["loss/total"] == 1.25
    assert (result.exit_code, result.stderr) == (0, "")


@pytest.mark.parametrize("flags", [[], ["--json"]])
@pytest.mark.parametrize(("status", "failure"), [("failed", FAILURE), ("cancelled", None)])
def test_waiting_for_failure_says_why_and_exits_1(service, spec, status, failure, flags):
    service.script = [reach(status, failure=failure)]
    result = defeat("jobs", "submit", spec, "--wait", *flags)
    assert result.exit_code == 1
    assert f"job_0000 {status}" in result.stderr
    if failure:
        assert "data / no_boxes: the train split has no boxes" in result.stderr
        assert "  Traceback\n  x\n" in result.stderr
    if flags:
        assert json.loads(result.stdout.splitlines()[-1])["status"] == status


def test_changes_to_the_spec_are_typed(service, spec):
    changes = ["dataset=ds_0001", "schedule.epochs=3", "teacher=null", "labels.team=lab", "schedule.decay=1e-4"]
    arguments = [part for change in changes for part in ("--set", change)]
    assert defeat("jobs", "submit", spec, *arguments).exit_code == 0
    assert service.jobs["job_0000"]["spec"] == {
        "name": "cells-small",
        "dataset": "ds_0001",
        "schedule": {"learning_rate": 0.01, "epochs": 3, "decay": 0.0001},
        "teacher": None,
        "labels": {"team": "lab"},
    }


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("a: [", [], "is not YAML"),
        ("- a", [], "must be a mapping"),
        ("name: a\nname: b", [], "'name' occurs twice"),
        ("when: 2024-01-01", [], "when is datetime.date"),
        ("a: {b: [.nan]}", [], "a.b[0] is nan"),
        ("a: {1: x}", [], "the key 1 at a is not a string"),
        ("a: 1", ["a.b=1"], "a is 1, not a mapping"),
        ("a: 1", ["nonsense"], "must have the form key.path=value"),
        ("a: 1", ["b=["], "the value is not YAML"),
    ],
)
def test_a_spec_that_cannot_be_read_exits_2(server, spec, text, changes, message):
    spec.write_text(text)
    result = defeat("jobs", "submit", spec, *(part for change in changes for part in ("--set", change)))
    assert result.exit_code == 2
    assert message in result.stderr
    assert server.service.requests == []


@pytest.mark.parametrize("command", ["submit", "validate"])
def test_a_spec_that_the_service_refuses_exits_2(service, spec, command):
    spec.write_text("name: a")
    result = defeat("jobs", command, spec, "--json")
    assert result.exit_code == 2
    assert "/dataset: dataset is missing (missing_key)" in result.stderr
    assert json.loads(result.stdout)["error"]["errors"][0]["pointer"] == "/dataset"


def test_validating_shows_the_resolved_spec(service, spec):
    result = defeat("jobs", "validate", spec)
    assert (result.exit_code, service.jobs) == (0, {})
    assert result.stdout.splitlines()[-1] == "seed: 0"


def test_usage_errors_exit_2(server):
    assert defeat("jobs", "submit").exit_code == 2
    assert defeat("jobs", "submit", "missing.yaml").exit_code == 2
    assert defeat("jobs", "watch", "../x").exit_code == 2


def test_nobody_listening_exits_3(unreachable, spec):
    result = defeat("jobs", "submit", spec, "--json")
    assert result.exit_code == 3
    assert f"cannot reach the server at {unreachable}" in result.stderr
    assert "defeat up" in result.stderr
    assert json.loads(result.stdout)["error"]["code"] == "ConnectionFailed"


def test_a_wrong_key_and_a_missing_job_exit_1(service, monkeypatch):
    result = defeat("jobs", "show", "job_9")
    assert (result.exit_code, "no job job_9 (not_found, HTTP 404)" in result.stderr) == (1, True)
    monkeypatch.setenv("DEFEAT_API_KEY", "dk_wrong")
    result = defeat("catalog")
    assert (result.exit_code, "set DEFEAT_API_KEY" in result.stderr) == (1, True)


def test_jobs_are_listed_shown_cancelled(service):
    for name in ("a", "b", "c"):
        service.add_job({"name": name, "dataset": "ds_0000"})
    service.jobs["job_0002"].update(status="running", progress=progress("distillation", 0.5, epoch=1))
    service.add_artifact("job_0002", "log.txt", "log", b"x" * 2048)
    lines = defeat("jobs", "list").stdout.splitlines()
    assert lines[1].split()[:6] == ["job_0002", "c", "running", "50%", "1m", "15s"]
    assert len(lines) == 4
    assert len(json.loads(defeat("jobs", "list", "--limit", "2", "--json").stdout)) == 2
    shown = defeat("jobs", "show", "job_0002").stdout
    assert "distillation, 50%" in shown
    assert "2.0 KiB" in shown
    assert defeat("jobs", "cancel", "job_0002").stdout == "job_0002 cancelling\n"


def test_a_queued_job_says_where_it_stands_and_can_be_moved(service):
    job = service.add_job()
    place = {"position": 3, "jobs_ahead": 2, "waiting_for": "a worker with label x"}
    job["queue"] = place | {"eta_s": 200.0, "eta_low_s": 130.0, "eta_high_s": 300.0}
    told = "2 ahead, waits for a worker with label x, begins in 3m 20s (2m 10s to 5m 00s)"
    assert told in defeat("jobs", "show", job["id"]).stdout
    moved = defeat("jobs", "priority", job["id"], "-5").stdout.splitlines()
    assert moved == [f"{job['id']} queued priority -5", told]
    job["queue"] = {"position": None, "jobs_ahead": 200, "waiting_for": "2 GPUs", "eta_s": None} | dict.fromkeys(
        ("eta_low_s", "eta_high_s")
    )
    assert "200 or more ahead, waits for 2 GPUs\n" in defeat("jobs", "show", job["id"]).stdout
    assert json.loads(defeat("jobs", "priority", job["id"], "7", "--json").stdout)["priority"] == 7
    assert defeat("jobs", "priority", job["id"], "101").exit_code == 2


def test_workers_are_listed(service):
    row = {"name": "gpu@one", "status": "busy", "working_on": {"id": "job_1"}, "queues": ["jobs"], "labels": []}
    service.workers = [row | {"gpus": 2, "gpu_memory_gb": 80.0, "started_at": "2026-01-01T00:00:00Z"}]
    lines = defeat("workers").stdout.splitlines()
    assert lines[1].split() == ["gpu@one", "busy", "job_1", "jobs", "-", "2", "80", "GB", "2026-01-01T00:00:00Z"]
    assert json.loads(defeat("workers", "--json").stdout) == service.workers


def test_jobs_are_paused_resumed_and_tried_again(service):
    service.add_job()
    assert defeat("jobs", "pause", "job_0000").stdout == "job_0000 pausing\n"
    assert defeat("jobs", "resume", "job_0000").stdout == "job_0000 queued\n"
    assert json.loads(defeat("jobs", "retry", "job_0000", "--json").stdout)["id"] == "job_0000"
    assert defeat("jobs", "retry", "job_0000", "--from", "beginning").exit_code == 0
    assert [json.loads(body)["from"] for body in service.bodies[2:]] == [None, "beginning"]
    wrong = defeat("jobs", "retry", "job_0000", "--from", "start")
    assert (wrong.exit_code, "checkpoint or beginning" in wrong.stderr) == (2, True)


def test_what_a_job_waits_for_and_what_was_adjusted_is_shown(service):
    service.add_job().update(not_before="2026-01-01T00:01:00Z", adjustments={"schedule": {"accumulation": 2}})
    shown = defeat("jobs", "show", "job_0000").stdout
    assert "2026-01-01T00:01:00Z" in shown
    assert "accumulation: 2" in shown


def test_the_best_student_is_downloaded_unless_others_are_named(service, tmp_path):
    job = service.add_job()["id"]
    service.add_artifact(job, "student-last.safetensors", "student", b"last")
    service.add_artifact(job, "student-best.safetensors", "student", b"best")
    service.add_artifact(job, "gallery/0.jpg", "gallery", b"jpg")
    assert defeat("jobs", "download", job, "--output", tmp_path / "out").exit_code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["student-best.safetensors"]
    result = defeat(
        "jobs", "download", job, "gallery/0.jpg", "student-last.safetensors", "--output", tmp_path, "--json"
    )
    assert [file["name"] for file in json.loads(result.stdout)["files"]] == [
        "gallery/0.jpg",
        "student-last.safetensors",
    ]
    assert (tmp_path / "gallery" / "0.jpg").read_bytes() == b"jpg"


def test_downloads_that_cannot_be(service, tmp_path):
    job = service.add_job()["id"]
    result = defeat("jobs", "download", job)
    assert (result.exit_code, "has no student yet" in result.stderr) == (2, True)
    service.add_artifact(job, "../student-best", "student", b"best")
    result = defeat("jobs", "download", job, "--output", tmp_path / "out")
    assert (result.exit_code, "points outside" in result.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_told(service, tmp_path):
    job = service.add_job()["id"]
    service.add_artifact(job, "student-best", "student", b"best")
    (tmp_path / "file").touch()
    result = defeat("jobs", "download", job, "--output", tmp_path / "file")
    assert (result.exit_code, "error: [Errno" in result.stderr) == (1, True)


def test_a_dataset_is_added_and_its_report_shown(service, archive):
    service.outcome = {"status": "ready", "format": "coco", "splits": REPORT["splits"], "report": REPORT}
    result = defeat("datasets", "add", archive, "--name", "cells")
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, "ds_0000 ready")
    assert "coco: 4 images, 9 boxes, 10% dropped (limit 20%)" in result.stdout
    assert "dropped: boxes outside their image (box_outside, 2 times)" in result.stdout
    assert "    a.png: x2 is 700 of 640" in result.stdout
    [row] = json.loads(defeat("datasets", "list", "--json").stdout)
    assert (row["name"], row["status"]) == ("cells", "ready")
    assert "3 images, 7 boxes" in defeat("datasets", "show", "ds_0000").stdout
    assert "RBC" in defeat("datasets", "report", "ds_0000").stdout
    assert defeat("datasets", "delete", "ds_0000").stdout == "ds_0000 deleted\n"


def test_adding_without_waiting_ends_when_sent(service, archive):
    service.outcome = {}
    for kind, asset_id in (("datasets", "ds_0000"), ("checkpoints", "ckpt_0000")):
        result = defeat(kind, "add", archive, "--no-wait")
        assert (result.exit_code, result.stdout) == (0, f"{asset_id} queued\n")


@pytest.mark.parametrize("report", [None, {**REPORT, "images": None, "boxes": None, "dropped_fraction": None}])
def test_a_dataset_that_is_invalid_exits_1(service, archive, report):
    service.outcome = {"status": "invalid", "failure": FAILURE, "report": report}
    result = defeat("datasets", "add", archive, "--json")
    assert result.exit_code == 1
    assert "ds_0000 is invalid\ndata / no_boxes" in result.stderr
    assert json.loads(result.stdout)["status"] == "invalid"
    shown = defeat("datasets", "report", "ds_0000")
    assert (shown.exit_code, "box_outside" in shown.stdout) == ((0, True) if report else (1, False))


def test_an_upload_that_failed_names_what_is_left(service, archive):
    service.faults = [("PUT .*", "damage")] * 3
    result = defeat("datasets", "add", archive)
    assert result.exit_code == 1
    assert "ds_0000 was created and awaits its content" in result.stderr


def test_checkpoints_are_added_listed_downloaded(service, archive, tmp_path):
    (tmp_path / "detector.yaml").write_text("{architecture: faster_rcnn, backbone: timm/resnet10t}")
    (tmp_path / "classes.txt").write_text("RBC\nWBC\n")
    service.outcome = {
        "status": "ready",
        "sha256": "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9",
        "size_bytes": 11,
        "coverage": {"loaded": 3, "total": 4, "missing": ["x"], "unexpected": []},
    }
    service.files["/v1/checkpoints/ckpt_0000/content"] = b"hello world"
    options = ["--detector", tmp_path / "detector.yaml", "--classes", tmp_path / "classes.txt"]
    result = defeat("checkpoints", "add", archive, *options)
    assert (result.exit_code, "3/4 tensors loaded" in result.stdout) == (0, True)
    assert service.checkpoints["ckpt_0000"]["classes"] == ["RBC", "WBC"]
    assert "timm/resnet10t" in defeat("checkpoints", "list").stdout
    assert "RBC, WBC" in defeat("checkpoints", "show", "ckpt_0000").stdout
    assert defeat("checkpoints", "download", "ckpt_0000", "--output", tmp_path / "t").exit_code == 0
    assert (tmp_path / "t").read_bytes() == b"hello world"
    assert defeat("checkpoints", "delete", "ckpt_0000").exit_code == 0


def test_the_catalog_is_shown(server):
    shown = defeat("catalog").stdout
    for name in ("faster_rcnn", "defeat", "coco", "COCO_V1", "4.90 M"):
        assert name in shown


def test_text_of_others_does_nothing_to_a_terminal(service):
    service.add_job({"name": "[bold red]\x1b]0;owned\x07\u202egnp[/]", "dataset": "ds_0000"})
    shown = defeat("jobs", "list").stdout
    assert "[bold red]\\x1b]0;owned\\x07\\u202egnp[/]" in shown


def test_a_terminal_gets_a_bar_and_the_same_words(server, service, spec):
    succeed(service)
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen([*COMMAND, "jobs", "submit", str(spec), "--wait"], stdout=follower, env=environment) as child:
        os.close(follower)
        shown = b""
        while chunk := _read(leader):
            shown += chunk
    os.close(leader)
    assert child.returncode == 0
    assert b"distillation, epoch 1/2" in shown
    assert "━".encode() in shown
    assert b"student after epoch 2: AP 0.310" in shown


def _read(leader):
    try:
        return os.read(leader, 65536)
    except OSError:  # the other side is closed
        return b""


def test_interrupting_a_wait_leaves_the_job_and_says_so(server, service, spec):
    child = subprocess.Popen(
        [*COMMAND, "jobs", "submit", str(spec), "--wait", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until(lambda: service.requested("GET .*/evaluations"), within_s=20, what="the wait")
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=20)
    assert child.returncode == 130
    assert b"defeat jobs watch job_0000" in stderr
    assert b"defeat jobs cancel job_0000" in stderr
    assert all(json.loads(line)["object"] == "update" for line in stdout.splitlines())
    assert service.jobs["job_0000"]["status"] == "queued"


def test_up_starts_the_stack_in_its_place(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    assert defeat("up", "--port", "0", "--json", "--new-key", "--home", tmp_path).exit_code == 0
    [(program, command, environment)] = calls
    assert program == sys.executable
    stack = ["-m", "app.stack", "--host", "127.0.0.1", "--port", "0", "--json", "--new-key"]
    assert command == [sys.executable, "-P", *stack]
    assert environment["DEFEAT_HOME"] == str(tmp_path)


def test_up_without_the_server_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else object())
    result = defeat("up")
    assert result.exit_code == 2
    assert "torch missing" in result.stderr
    assert "pip install --editable '.[app,worker]'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "module", "passed"),
    [
        (["doctor", "--json"], "app.ops.doctor", ["--json"]),
        (["admin"], "app.ops.admin", []),
        (["admin", "--help"], "app.ops.admin", ["--help"]),
        (["admin", "keys", "--help"], "app.ops.admin", ["keys", "--help"]),
        (
            ["admin", "usage", "--tenant", "a b", "--set", "x=1"],
            "app.ops.admin",
            ["usage", "--tenant", "a b", "--set", "x=1"],
        ),
    ],
)
def test_the_operators_commands_take_the_commands_place(monkeypatch, arguments, module, passed):
    calls = []
    monkeypatch.setattr(os, "execve", lambda path, command, environment: calls.append((path, command)))
    assert defeat(*arguments).exit_code == 0
    assert calls == [(sys.executable, [sys.executable, "-P", "-m", module, *passed])]


@pytest.mark.parametrize("command", ["doctor", "admin"])
def test_the_operators_commands_without_the_service(monkeypatch, command):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    result = defeat(command)
    assert result.exit_code == 2
    assert "run this command where an API or a worker runs" in result.stderr
