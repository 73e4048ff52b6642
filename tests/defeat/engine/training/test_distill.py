"""Whole runs of a tiny teacher and student on shapes; the first as the worker starts it, in a process of its own."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from defeat.engine import detectors
from defeat.engine.data.loading import loader
from defeat.engine.data.loading.loader import ImageReader
from defeat.engine.detectors import compilation
from defeat.engine.evaluation.evaluate import coco_metrics, detect_split
from defeat.engine.report import Reporter
from defeat.engine.training import context
from defeat.engine.training.checkpoint import TrainingCheckpoint
from defeat.engine.training.step import Step
from tests.support.training import CLASSES, TINY, events, keep_checkpoints, run, run_alone, shapes, spec, write_run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    return shapes(root), root / "canonical"


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    directory = write_run(tmp_path_factory.mktemp("runs") / "whole", dataset[1], spec())
    return directory, run_alone(directory)


def artifact(directory, name):
    return directory / "artifacts" / name


def test_a_run_leaves_what_it_promises(finished):
    directory, result = finished
    assert result["status"] == "succeeded", result
    assert {(one["name"], one["kind"]) for one in result["artifacts"]} == {
        ("student-best.safetensors", "student"),
        ("student-last.safetensors", "student"),
        ("teacher.safetensors", "teacher"),
        ("metrics.json", "metrics"),
        ("gallery.json", "gallery"),
        ("gallery/0.png", "gallery"),
        ("gallery/1.png", "gallery"),
    }
    found = {(one["subject"], one["epoch"]) for one in events(directory, "evaluation")}
    assert found == {(subject, epoch) for subject in ("teacher", "student") for epoch in (1, 2)}
    phases = [one["phase"] for one in events(directory, "progress")]
    assert list(dict.fromkeys(phases)) == ["preparing", "teacher", "evaluation", "distillation", "finishing"]
    times = {kind: [one["time"] for one in events(directory, kind)] for kind in ("progress", "evaluation")}
    assert times["progress"][phases.index("evaluation")] < times["evaluation"][0], "the phase begins with the work"
    fractions = [one["fraction"] for one in events(directory, "progress")]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_every_part_of_the_loss_is_logged(finished):
    directory, _ = finished
    own = {"loss/total", "loss/classifier", "loss/box_reg", "loss/objectness", "loss/rpn_box_reg"}
    defeat = {"loss/neck_object", "loss/neck_background", "loss/head_object", "loss/head_background"}
    other = {"learning_rate", "images_per_s", "gradient_norm", "data_wait", "memory_bytes"}
    logged = events(directory, "metrics")
    for subject, losses in (("teacher", own), ("student", own | defeat)):
        shares = {name.replace("loss/", "gradient_share/") for name in losses - {"loss/total"}}
        lines = [one for one in logged if one["subject"] == subject]
        assert [one["step"] for one in lines] == [4, 8]
        # The student's adapters are clipped apart from it. The gradient is measured at the first step of each fifty.
        expected = losses | other | ({"adapter_gradient_norm"} if subject == "student" else set())
        assert lines[0]["values"].keys() == expected | shares
        assert lines[1]["values"].keys() == expected
        assert sum(lines[0]["values"][name] for name in shares) == pytest.approx(1)
        for one in lines:
            assert 0 <= one["values"]["data_wait"] <= 1
            assert one["values"]["memory_bytes"] > 1e8
            parts = sum(
                value for name, value in one["values"].items() if name.startswith("loss/") and "total" not in name
            )
            assert parts == pytest.approx(one["values"]["loss/total"], rel=1e-5)
    history = json.loads(artifact(directory, "metrics.json").read_text())
    assert [one["values"] for one in history["metrics"]] == [one["values"] for one in logged]


def test_the_student_loads_without_the_teacher_and_measures_the_same(finished, dataset):
    directory, result = finished
    student = detectors.load(artifact(directory, "student-best.safetensors"))
    assert student.classes == list(CLASSES)
    assert not [name for name in student.state_dict() if "adapter" in name or "teacher" in name]
    images = ImageReader(dataset[1], dataset[0].in_split("val"))
    found = detect_split(student, images, batch_size=8, device=torch.device("cpu"))
    again = coco_metrics(dataset[0], "val", found)
    assert {**again, "epoch": result["results"]["student"]["epoch"]} == result["results"]["student"]


def test_the_gallery_shows_truth_and_both_detectors(finished, dataset):
    directory, _ = finished
    gallery = json.loads(artifact(directory, "gallery.json").read_text())
    assert gallery["classes"] == list(CLASSES)
    images = dataset[0].in_split("val")
    for entry in gallery["images"]:
        record = next(one for one in images if one.name == entry["name"])
        assert entry["truth"] == [{"class": b.class_index, "box": [b.x1, b.y1, b.x2, b.y2]} for b in record.boxes]
        assert artifact(directory, entry["file"]).read_bytes() == (dataset[1] / record.file).read_bytes()
        assert entry.keys() >= {"teacher", "student"}


def test_the_same_seed_gives_the_same_student_byte_for_byte(finished, dataset, tmp_path):
    other = write_run(tmp_path / "again", dataset[1], spec())
    run(other)
    for name in ("student-best.safetensors", "student-last.safetensors", "teacher.safetensors"):
        assert artifact(other, name).read_bytes() == artifact(finished[0], name).read_bytes()


@pytest.mark.parametrize("subject", ["teacher", "student"])
def test_a_run_that_ends_early_goes_on_to_the_same_bytes(finished, dataset, tmp_path, subject):
    """Ended by SIGTERM after the subject's first epoch, resumed from its checkpoint by another run directory."""
    directory = write_run(tmp_path / "first", dataset[1], spec())
    process = subprocess.Popen([sys.executable, "-m", "defeat.engine.run", str(directory)])
    log = directory / "events.jsonl"
    deadline = time.monotonic() + 120
    saved = 1 if subject == "teacher" else 2
    while not (log.exists() and log.read_text().count('{"type": "checkpoint"') >= saved):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 3
    assert json.loads((directory / "result.json").read_text())["status"] == "cancelled"
    checkpoint = directory / "checkpoints" / "last.pt"
    state = TrainingCheckpoint.load(checkpoint)
    assert (state.subject, state.epoch) == (subject, 1)

    second = write_run(tmp_path / "second", dataset[1], spec(), resume=str(checkpoint))
    result = run(second)
    assert result["results"] == finished[1]["results"]
    assert events(second, "progress")[1]["fraction"] > 0.2  # the bar goes on where it was
    for name in ("student-best.safetensors", "student-last.safetensors", "teacher.safetensors"):
        assert artifact(second, name).read_bytes() == artifact(finished[0], name).read_bytes()
    # Nothing is logged twice by the two together, and nothing is missing.
    whole = json.loads(artifact(finished[0], "metrics.json").read_text())
    resumed = json.loads(artifact(second, "metrics.json").read_text())
    where = [(one["subject"], one["step"]) for one in resumed["metrics"]]
    assert where == [(one["subject"], one["step"]) for one in whole["metrics"]]
    assert resumed["evaluations"] == whole["evaluations"]


def test_a_teacher_from_a_checkpoint_and_its_classes(finished, dataset, tmp_path):
    weights = artifact(finished[0], "teacher.safetensors")
    teacher = {"source": "checkpoint", "id": "ckpt_x", "detector": TINY}
    good = write_run(tmp_path / "good", dataset[1], spec(teacher=teacher), teacher=str(weights))
    result = run(good)
    assert result["status"] == "succeeded", result
    assert result["results"]["teacher"] == finished[1]["results"]["teacher"]
    assert "teacher.safetensors" not in {one["name"] for one in result["artifacts"]}

    torch.manual_seed(0)
    detectors.save(detectors.build(TINY, ["disc", "cat"]), tmp_path / "other.safetensors")
    bad = write_run(tmp_path / "bad", dataset[1], spec(teacher=teacher), teacher=str(tmp_path / "other.safetensors"))
    failure = run(bad)["failure"]
    assert (failure["class"], failure["code"]) == ("user", "teacher_classes_differ")
    assert "square" in failure["detail"]
    assert "it has: 'disc', 'cat'" in failure["detail"]


def test_a_teacher_with_other_names_for_the_classes(finished, dataset, tmp_path):
    """The same weights under other names, mapped back: the same run, byte for byte."""
    weights = artifact(finished[0], "teacher.safetensors")
    renamed = detectors.load(weights)
    renamed.classes = ["Quadrat", "disc"]
    detectors.save(renamed, tmp_path / "renamed.safetensors")
    teacher = {"source": "checkpoint", "id": "ckpt_x", "detector": TINY}
    mapped = {**teacher, "class_map": {"square": "Quadrat"}}
    plain = write_run(tmp_path / "plain", dataset[1], spec(teacher=teacher), teacher=str(weights))
    other = write_run(
        tmp_path / "other", dataset[1], spec(teacher=mapped), teacher=str(tmp_path / "renamed.safetensors")
    )
    assert run(other)["results"] == run(plain)["results"]
    assert artifact(other, "student-last.safetensors").read_bytes() == (
        artifact(plain, "student-last.safetensors").read_bytes()
    )


@pytest.mark.parametrize(
    ("class_map", "code", "expected"),
    [
        ({"cat": "disc"}, "unknown_class", "it has: 'square', 'disc'"),
        ({"square": "disc"}, "class_map_not_one_to_one", "disc"),
        ({"square": "cat"}, "unknown_class", "the teacher has no class 'cat'"),
    ],
)
def test_impossible_class_maps_are_rejected_with_a_reason(finished, dataset, tmp_path, class_map, code, expected):
    teacher = {"source": "checkpoint", "id": "ckpt_x", "detector": TINY, "class_map": class_map}
    weights = artifact(finished[0], "teacher.safetensors")
    failure = run(write_run(tmp_path / "run", dataset[1], spec(teacher=teacher), teacher=str(weights)))["failure"]
    assert (failure["class"], failure["code"]) == ("user", code)
    assert expected in failure["detail"]
    trained = {**spec()["teacher"], "class_map": {"square": "disc"}}
    failure = run(write_run(tmp_path / "trained", dataset[1], spec(teacher=trained)))["failure"]
    assert failure["code"] == "bad_spec"


def test_the_baseline_needs_no_teacher(dataset, tmp_path):
    directory = write_run(tmp_path / "run", dataset[1], spec(teacher=None, distillation={"method": "baseline"}))
    result = run(directory)
    assert result["status"] == "succeeded", result
    assert result["results"]["teacher"] is None
    assert not any(name.startswith("loss/neck") for one in events(directory, "metrics") for name in one["values"])


@pytest.mark.parametrize(
    ("change", "code", "expected"),
    [
        ({"distillation": {"method": "magic"}}, "unknown_method", "baseline, defeat"),
        ({"distillation": {"method": "defeat", "neck_wieght": 1}}, "bad_spec", "neck_wieght"),
        ({"teacher": None}, "teacher_required", "needs a teacher"),
        ({"evaluation": {"split": "test"}}, "split_missing", "it has: train, val"),
        ({"schedule": {"epochs": 1, "batch_size": 64}}, "too_few_images", "16 images"),
        (
            {"schedule": {"epochs": 1, "learning_rate": 10, "gradient_clip": 0, "batch_size": 4, "warmup_steps": 0}},
            None,
            None,
        ),
        ({"student": {"detector": {**TINY, "strides": [32]}}}, "pyramids_do_not_pair", "[32]"),
    ],
)
def test_impossible_jobs_are_rejected_with_a_reason(finished, dataset, tmp_path, change, code, expected):
    weights = artifact(finished[0], "teacher.safetensors")
    teacher = {"source": "checkpoint", "id": "ckpt_x", "detector": TINY}
    directory = write_run(tmp_path / "run", dataset[1], spec(**{"teacher": teacher, **change}), teacher=str(weights))
    result = run(directory)
    if code is None:  # whether this rate leads to infinity is not ours to say: it ends in a clear answer either way
        assert result["status"] == "succeeded" or result["failure"]["code"] == "loss_not_finite"
        return
    assert (result["failure"]["class"], result["failure"]["code"]) == ("user", code)
    assert expected in result["failure"]["detail"]


def test_a_disk_that_fills_up_keeps_the_previous_checkpoint(dataset, tmp_path):
    """A limit on file size simulates the full disk: a checkpoint with a best model is larger than one without."""
    directory = write_run(tmp_path / "run", dataset[1], spec(teacher=None, distillation={"method": "baseline"}))
    first = run(directory)
    assert first["status"] == "succeeded"
    checkpoint = directory / "checkpoints" / "last.pt"
    before = checkpoint.read_bytes()
    script = (
        "import resource, signal, sys; from pathlib import Path; from defeat.engine.run import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2)\n"
        "sys.exit(main(Path(sys.argv[1])))\n"
    )
    (directory / "result.json").unlink()
    done = subprocess.run([sys.executable, "-c", script, str(directory)], capture_output=True, timeout=120, check=False)
    assert done.returncode == 1
    failure = json.loads((directory / "result.json").read_text())["failure"]
    assert (failure["class"], failure["code"]) == ("infra", "disk_full")
    assert "last.pt" in failure["detail"]
    assert checkpoint.read_bytes() == before
    TrainingCheckpoint.load(checkpoint)
    assert not list(directory.rglob("*.part"))


def test_it_stops_early_when_nothing_gets_better(dataset, tmp_path, monkeypatch):
    """The AP's course is given: best after the second epoch, so that two more without a better one end it."""
    course = {1: 0.1, 2: 0.3, 3: 0.2, 4: 0.3}
    schedule = {**spec()["schedule"], "epochs": 9, "patience": 2, "checkpoint_minutes": 60}
    job = spec(teacher=None, distillation={"method": "baseline"}, schedule=schedule)
    plain, measured = context.coco_metrics, []

    def _measure(*given):
        measured.append(len(measured) + 1)
        return {**plain(*given), "ap": course[measured[-1]]}

    monkeypatch.setattr(context, "coco_metrics", _measure)
    kept = keep_checkpoints(monkeypatch, tmp_path)
    directory = write_run(tmp_path / "run", dataset[1], job)
    result = run(directory)
    assert measured == [1, 2, 3, 4]
    assert (result["results"]["student"]["epoch"], result["results"]["student"]["ap"]) == (2, 0.3)
    (message,) = [one["message"] for one in events(directory, "message") if one["code"] == "stopped_early"]
    assert message == "no better AP of the student in 2 evaluations: ended at epoch 4"
    assert events(directory, "progress")[-1]["fraction"] == 1.0

    del measured[2:]  # and from the checkpoint of the second epoch, it ends where it did
    resumed = write_run(tmp_path / "resumed", dataset[1], job, resume=str(kept[1]))
    assert run(resumed)["results"] == result["results"]
    assert (
        artifact(resumed, "student-last.safetensors").read_bytes()
        == artifact(directory, "student-last.safetensors").read_bytes()
    )


def test_epochs_that_a_teacher_did_not_need_are_not_waited_for_after_a_resume(dataset, tmp_path, monkeypatch):
    """Its course is given: it gets worse at once, so that seven epochs of nine are left out."""
    course = iter([0.3, 0.2])
    job = spec(schedule={**spec()["schedule"], "checkpoint_minutes": 60})
    job["teacher"]["schedule"] = {**job["schedule"], "epochs": 9, "patience": 1}
    plain = context.coco_metrics
    monkeypatch.setattr(
        context, "coco_metrics", lambda *given: {**(found := plain(*given)), "ap": next(course, found["ap"])}
    )
    kept = keep_checkpoints(monkeypatch, tmp_path)
    directory = write_run(tmp_path / "run", dataset[1], job)
    assert run(directory)["status"] == "succeeded"
    assert len(kept) == 2  # after the teacher's first epoch and the student's
    resumed = write_run(tmp_path / "resumed", dataset[1], job, resume=str(kept[1]))
    assert run(resumed)["status"] == "succeeded"
    # The first progress of an epoch is always reported: here of the student's second, with or without a resume.
    begun, gone_on = (
        next(one["fraction"] for one in events(of, "progress") if (one["phase"], one["epoch"]) == ("distillation", 2))
        for of in (directory, resumed)
    )
    assert gone_on == begun > 0.8


@pytest.mark.parametrize("phase", ["teacher", "evaluation", "distillation"])
def test_a_failure_in_the_first_batch_is_attributed_to_its_phase(dataset, tmp_path, monkeypatch, phase):
    """The last progress event shows the phase in which memory ran out, also in a phase's first batch."""
    directory = write_run(tmp_path / "run", dataset[1], spec())
    begun = []
    plain = Reporter.progress

    def _progress(self, name, **given):
        plain(self, name, **given)
        begun.append(name)

    def _raise_in(name, call):
        def _call(*args, **given):
            if begun[-1] == phase and name in (phase, "step"):
                raise torch.OutOfMemoryError("tried to allocate 80 GiB")
            return call(*args, **given)

        return _call

    monkeypatch.setattr(Reporter, "progress", _progress)
    monkeypatch.setattr(context, "detect_split", _raise_in("evaluation", context.detect_split))
    monkeypatch.setattr(Step, "_backward", _raise_in("step", Step._backward))
    failure = run(directory)["failure"]
    assert (failure["class"], failure["code"]) == ("oom", "out_of_memory")
    assert events(directory, "progress")[-1]["phase"] == phase


def test_a_warmup_longer_than_the_training_is_reported(dataset, tmp_path):
    """Four steps: the teacher's ends with the last of them, the student's and the method's would need one more."""
    job = spec(schedule={**spec()["schedule"], "epochs": 1, "warmup_steps": 5})
    job["distillation"] = [{"method": "defeat", "warmup_steps": 5}, {"method": "fitnet"}]
    job["teacher"]["schedule"] = {**job["schedule"], "warmup_steps": 4}
    directory = write_run(tmp_path / "run", dataset[1], job)
    assert run(directory)["status"] == "succeeded"
    warnings = [one for one in events(directory, "message") if one["level"] == "warn"]
    assert [one["code"] for one in warnings] == ["warmup_longer_than_training"] * 2
    for name, one in zip(("learning rate", "distillation"), warnings, strict=True):
        assert f"the student's {name} warms up over 5 steps, and the whole training has 4" in one["message"]


def test_maps_in_another_order_leave_the_same_student(finished, dataset, tmp_path):
    """A detector in the order of `channels_last` is saved, too: it could not be, at the end of its training."""
    job = spec(schedule={**spec()["schedule"], "channels_last": True})
    directory = write_run(tmp_path / "run", dataset[1], job)
    assert run(directory)["status"] == "succeeded"
    ours, theirs = (
        detectors.load(artifact(one, "student-last.safetensors")).state_dict() for one in (directory, finished[0])
    )
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0.05, atol=0.01, msg=name)


def warnings_of(directory):
    return {one["code"]: one["message"] for one in events(directory, "message") if one["level"] == "warn"}


def test_a_trunk_that_cannot_be_compiled_is_warned_of(dataset, tmp_path, monkeypatch):
    def _backend(_graph, _inputs):
        raise NotImplementedError("no compiler here")

    monkeypatch.setattr(compilation, "BACKEND", _backend)
    job = spec(schedule={**spec()["schedule"], "epochs": 1, "compile": True})
    directory = write_run(tmp_path / "run", dataset[1], job)
    assert run(directory)["status"] == "succeeded"
    warnings = [one["message"] for one in events(directory, "message") if one["code"] == "not_compiled"]
    assert len(warnings) == 2  # the student's and the frozen teacher's; the teacher's own training has compile off
    assert {message.split("'s trunk runs without torch.compile: ")[0] for message in warnings} == {
        "the student",
        "the teacher",
    }
    assert all("no compiler here" in message for message in warnings)


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
def test_little_memory_for_loading_is_warned_of(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "_processors", lambda: 2)
    plain = loader.TrainingBatches.__init__

    def _as_on_a_gpu(self, images, *, device, **options):
        plain(self, images, device=torch.device("cuda"), **options)

    monkeypatch.setattr(loader.TrainingBatches, "__init__", _as_on_a_gpu)
    monkeypatch.setattr(loader, "default_limit", lambda _world: 3 * 4 * (3 * 64 * 96 + 256))
    directory = write_run(tmp_path / "run", dataset[1], spec(teacher=None, distillation={"method": "baseline"}))
    assert run(directory)["status"] == "succeeded"
    message = warnings_of(directory)["little_memory_for_loading"]
    assert "2 processes would prefetch batches, and need 0.371 MB for them" in message
    assert "allows 2, 1 batches each" in message
