"""The program for a GPU: its clock, its lines, parts that fail, whose a wait is; and the whole of it in little."""

import json
import time
import warnings
from collections import Counter

import pytest
import torch

from benchmarks import gpu, gpu_runs, gpu_step_runs
from benchmarks.gpu_loader_runs import equal
from benchmarks.gpu_runs import CPU_AP, Run, RunFailed, in_spread
from benchmarks.gpu_setups import FULL, SMALL, TINY, Deadline, Found, Part, Setting, Skipped
from benchmarks.gpu_step_runs import by_group, distillations, kept_bytes, union_length, waits
from benchmarks.step_time import CASES, CLOCK, Bench, make_batch
from defeat.engine.training.config import JobConfig

CPU = torch.device("cpu")


def setting_for(tmp_path, *, minutes=10.0):
    """A rehearsal whose clock starts now."""
    return Setting(device=CPU, small=True, home=tmp_path, deadline=Deadline(minutes, started=time.time()))


@pytest.fixture
def judged(monkeypatch):
    monkeypatch.setattr(Setting, "judged", True)


def part(work, name="one", seconds=1.0):
    return Part(name=name, seconds=seconds, work=work)


def good(_setting):
    return Found(measured={"ratio": 1.0}, goal={"ratio": 1.05}, met=True)


def bad(_setting):
    return Found(measured={"ratio": 1.1}, goal={"ratio": 1.05}, met=False)


def broken(_setting):
    raise RuntimeError("no kernel image\nand more")


def test_the_clock_counts_from_the_start():
    deadline = Deadline(2, started=time.time() - 30)
    assert deadline.spent == pytest.approx(30, abs=5)
    assert deadline.left == pytest.approx(90, abs=5)
    assert 0 < Deadline(1).spent < 24 * 3600  # this process's own


def test_a_failing_part_ends_no_other_and_each_line_is_told_at_once(tmp_path, judged):
    said = []
    parts = [part(broken, "broken"), part(bad, "bad: x"), part(good, "good")]
    result = gpu.run(parts, setting_for(tmp_path), said.append)
    assert [line["ok"] for line in said] == [False, False, True]
    assert said[0]["error"] == "RuntimeError: no kernel image"
    assert said[1]["goal"] == {"ratio": 1.05}
    assert all(line["seconds"] >= 0 for line in said)
    assert (result["ok"], result["passed"], result["missed"], result["failed"]) == (False, 1, ["bad: x"], ["broken"])
    json.dumps([*said, result])


def test_nothing_is_judged_in_a_rehearsal_but_a_failure(tmp_path):
    said = []
    result = gpu.run([part(bad), part(good)], setting_for(tmp_path), said.append)
    assert [(line["ok"], line["goal"]) for line in said] == [(None, None)] * 2
    assert result["ok"]
    assert result["rehearsal"]
    assert not gpu.run([part(broken)], setting_for(tmp_path), said.append)["ok"]


def test_a_part_that_would_not_fit_is_skipped_and_a_shorter_one_is_not(tmp_path, judged):
    said = []
    parts = [part(good, "long", seconds=100), part(good, "short", seconds=10)]
    result = gpu.run(parts, setting_for(tmp_path, minutes=1), said.append)
    assert said[0]["ok"] is None
    assert said[0]["skipped"].endswith("s are left, and it takes about 100")
    assert said[1]["ok"] is True
    assert (result["skipped"], result["ok"]) == (["long"], True)


def test_a_part_with_nothing_to_measure_says_so(tmp_path, judged):
    def _skipped(_setting):
        raise Skipped("there are 1 GPUs, and two are needed")

    line = gpu.carry_out(part(_skipped), setting_for(tmp_path))
    assert (line["ok"], line["skipped"]) == (None, "there are 1 GPUs, and two are needed")


def test_a_part_that_takes_too_long_is_ended_whatever_it_catches(tmp_path):
    def _long(_setting):
        while True:
            try:
                time.sleep(0.05)
            except Exception:
                continue

    setting = setting_for(tmp_path, minutes=(gpu.RESERVE_S + 1) / 60)
    begun = time.monotonic()
    line = gpu.carry_out(part(_long), setting)
    assert time.monotonic() - begun < 4
    assert (line["ok"], line["error"]) == (False, "OutOfTime: the program's time is over")


def test_the_parts_have_names_of_their_own_and_fit_for_the_greater_part_into_eight_minutes():
    parts = gpu.parts()
    assert len({one.name for one in parts}) == len(parts)
    assert {one.group for one in parts} == {
        *("loader", "syncs", "step", "digits", "killed", "speeds", "wait", "kernel", "ranks", "compile")
    }
    assert sum(one.seconds for one in parts if one.group not in ("ranks", "compile")) <= 8 * 60


def test_an_ap_beyond_the_spread_of_the_seeds_is_none():
    assert all(map(in_spread, CPU_AP.values()))
    assert not in_spread(0.3)
    assert not in_spread(0.0)


@pytest.mark.parametrize("example", [FULL, TINY])
def test_the_example_is_a_job(example):
    spec = example.spec(seed=3)
    config = JobConfig.parse(spec, where="spec")
    assert config.seed == 3
    assert config.trains_teacher


def test_a_run_that_fails_says_why(tmp_path):
    run = Run(tmp_path / "one", "distill", TINY.spec(seed=0), {**gpu_runs.inputs(tmp_path / "nowhere", "cpu")})
    with pytest.raises(RunFailed, match=r"one: .*nowhere"):
        run.finish(timeout_s=120)


@pytest.mark.parametrize(
    ("file", "places"),
    [
        ("/x/defeat/engine/methods/defeat.py", {"method: defeat/engine/methods/defeat.py:2": 2}),
        ("/x/defeat/engine/detectors/faster_rcnn.py", {"detector: defeat/engine/detectors/faster_rcnn.py:2": 2}),
        ("/lib/torchvision/ops/poolers.py", {"detector: torchvision/ops/poolers.py:2": 2}),
        ("/lib/torch/autograd/__init__.py", {"backward": 2}),
        # Of neither: the caller's.
        (
            "/lib/torch/nn/functional.py",
            {"engine: defeat/engine/training/train.py:2": 1, "engine: defeat/engine/training/train.py:3": 1},
        ),
    ],
)
def test_a_wait_is_that_of_the_innermost_code(file, places):
    """As torch tells it: a warning, from the frame that called the operation."""
    space = {"warnings": warnings, "text": "called a synchronizing CUDA operation (Triggered internally)"}
    exec(compile("def work():\n    warnings.warn(text)\n    warnings.warn('else')\n", file, "exec"), space)
    outer = {"work": space["work"]}
    exec(compile("def outer():\n    work()\n    work()\n", "/x/defeat/engine/training/train.py", "exec"), outer)
    found = waits(outer["outer"], CPU)
    assert found == Counter(places)
    assert sum(by_group(found).values()) == 2


def test_every_method_with_a_teacher_is_counted():
    assert set(distillations("retinanet")) | {"defeat, student", "defeat, teacher", "defeat, both"} == set(
        distillations("faster_rcnn")
    ) | {"defeat"}


def test_what_a_gpu_is_busy_with_counts_once():
    assert union_length([]) == 0
    assert union_length([(5, 9), (0, 4), (2, 6), (20, 21), (20, 21), (3, 4)]) == 10


def test_what_autograd_keeps_grows_with_the_batch():
    bench = Bench(CASES["retinanet"], SMALL, CPU)
    one, two = (next(bench.batch.split(count)) for count in (2, 1))
    kept = [kept_bytes(bench.ours, bench.teacher, batch) for batch in (one, two)]
    assert kept[0] < kept[1] < 2.5 * kept[0]


def test_batches_differ_by_a_byte_or_not_at_all():
    batch, twin = (make_batch(SMALL) for _ in range(2))
    assert equal(batch, twin)
    twin.images[1][0, 0, 0] += 1
    assert not equal(batch, twin)


@pytest.mark.parametrize(
    ("family", "beyond", "met"),
    [
        ("retinanet", {}, True),
        ("retinanet", {"method: defeat/engine/methods/cwd.py:9": 1}, False),
        ("retinanet", {"detector: torchvision/ops/poolers.py:213": 4}, False),
        ("retinanet", {"engine: defeat/engine/training/step.py:150": 1}, False),
        ("retinanet", {"backward": 1}, False),
    ],
)
def test_a_step_that_waits_more_than_the_baseline_misses_the_goal(tmp_path, monkeypatch, family, beyond, met):
    alone = Counter(
        {"engine: defeat/engine/training/step.py:155": 1, "detector: torchvision/models/detection/x.py:1": 5}
    )
    counts = iter([alone, *[alone + Counter(beyond)] * 100])
    monkeypatch.setattr(gpu_step_runs, "_counted", lambda *_: ((found := next(counts)), found, True))
    found = gpu_step_runs.syncs(setting_for(tmp_path), family, "float32")
    assert found.met is met
    assert found.measured["baseline"] == {"engine": 1, "detector": 5}
    assert [one["ordinary"] for one in found.measured["beyond_baseline"].values()] == ([beyond] * 9 if beyond else [])


def test_what_torchvisions_heads_wait_for_is_allowed_to_defeat_alone(tmp_path, monkeypatch):
    alone, heads = (
        Counter({"engine: defeat/engine/training/step.py:155": 1}),
        Counter({"detector: torchvision/ops/x.py:2": 4}),
    )

    def _counted(step, _batch):
        found = alone + heads if type(step.losses.method).__name__ == "Defeat" else alone
        return found, found, True

    monkeypatch.setattr(gpu_step_runs, "_counted", _counted)
    found = gpu_step_runs.syncs(setting_for(tmp_path), "faster_rcnn", "float32")
    assert found.met
    assert set(found.measured["beyond_baseline"]) == {
        f"defeat, {kind}" for kind in ("student", "teacher", "both", "auto")
    }


def test_the_bench_takes_its_step_in_every_variant():
    for changes in gpu_step_runs.VARIANTS.values():
        assert Bench(CASES["retinanet"], SMALL.varied(**changes), CPU).ours.schedule.channels_last in (True, False)
    values = Bench(CASES["retinanet"], SMALL, CPU).ours(make_batch(SMALL), CLOCK).values
    assert values["loss/neck_object"] > 0


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_the_rehearsal_runs_every_part(device, capfd):
    code = gpu.main(["--device", device, "--quick", "--minutes", "30"])
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    first, *parts, last = lines
    assert first["part"] == "machine"
    assert [line["part"] for line in parts] == [one.name for one in gpu.parts()]
    assert [line for line in parts if "error" in line] == []
    assert {line["part"] for line in parts if "skipped" in line} <= ({"ranks"} if device == "cuda" else set())
    assert all(line["ok"] is None for line in parts)
    found = {line["part"]: line["measured"] for line in parts if "measured" in line}
    assert found["loader"]["unequal"] == 0
    assert found["compile"]["graphs_after_one_shape"] == found["compile"]["graphs_after_four"] > 0
    assert found["compile"]["failures"] == {"student": None, "teacher": None}
    if device == "cpu":
        assert found["killed"]["equal_bytes"] is True
        assert found["ranks"]["apart"] < gpu_runs.LOSS_TOLERANCE
    for name, one in found.items():
        if name.startswith("syncs") and device == "cpu":
            assert one["beyond_baseline"] == {}
    assert (code, last["ok"], last["rehearsal"]) == (0, True, True)
