"""Does it help? The arithmetic of the table, what is run again and what is not, and the whole program in little."""

import json
from typing import get_args

import pytest

from benchmarks import gain, gain_runs
from benchmarks.gain_runs import RunFailed, carry_out, prepare_data
from benchmarks.gain_setups import Architecture, Data, methods, quick, setup
from defeat.engine import detectors
from defeat.engine import methods as engine_methods
from defeat.engine.data import canonical

BASELINE = gain.Summary(mean=0.2, lowest=0.18, highest=0.22, deviation=0.02)
BETTER = gain.Summary(mean=0.3, lowest=0.27, highest=0.32, deviation=0.026)
SETUPS = [(data, architecture) for data in get_args(Data) for architecture in get_args(Architecture)]


def test_a_summary_is_of_the_sample():
    one = gain.Summary.of([0.1, 0.4, 0.25])
    assert (one.mean, one.lowest, one.highest) == (0.25, 0.1, 0.4)
    assert one.deviation == pytest.approx((2 * 0.15**2 / 2) ** 0.5)
    assert one.spread == pytest.approx(0.3)
    assert gain.Summary.of([0.1]).deviation == 0.0


def test_the_gap_and_the_spread_are_those_of_the_means_and_of_the_wider_method():
    assert gain.recovered(BETTER, BASELINE, 0.6) == pytest.approx(0.25)
    assert gain.recovered(BASELINE, BETTER, 0.8) == pytest.approx(-0.2)
    assert gain.recovered(BETTER, BASELINE, 0.2) is None
    assert gain.gain_over_spread(BETTER, BASELINE) == pytest.approx(0.1 / 0.05)
    single = gain.Summary.of([0.3])
    assert gain.gain_over_spread(single, gain.Summary.of([0.2])) is None


def test_the_table_has_a_row_for_each_method_and_the_teacher():
    assert gain.table(0.6, {"baseline": BASELINE, "mine": BETTER}).splitlines() == [
        "| | AP, mean | lowest to highest | standard deviation | of the gap |",
        "|---|---|---|---|---|",
        "| baseline | 0.200 | 0.180 to 0.220 | 0.020 |  |",
        "| mine | 0.300 | 0.270 to 0.320 | 0.026 | 25% |",
        "| teacher | 0.600 | | | |",
    ]


@pytest.mark.parametrize(("data", "architecture"), SETUPS)
def test_every_method_by_name_can_be_built_for_its_setup(data, architecture):
    full = setup(data, architecture)
    student, teacher = (detectors.build(spec, ["a", "b"]) for spec in (full.student, full.teacher))
    for section in methods(full).values():
        engine_methods.build(section, student, teacher)
    small = quick(full)
    assert small.student_schedule["epochs"] == 1
    assert methods(small) == methods(full)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["nothing"], "no method 'nothing'; known: baseline, defeat, "),
        (["defeat={}"], "'defeat' cannot name a method of your own"),
        (["my/own={}"], "'my/own' cannot name a method of your own"),
        (["mine={"], "Expecting property name"),
    ],
)
def test_a_method_that_cannot_be_is_refused(asked, message, tmp_path, capsys):
    assert gain.main(["--out", str(tmp_path), "--methods", *asked]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_data_is_made_once_and_the_students_have_a_part_of_it(tmp_path):
    whole, part = prepare_data(tmp_path, "digits", student_images=5, tiny=True)
    counts = [canonical.read(directory).counts() for directory in (whole, part)]
    assert [count["train"]["images"] for count in counts] == [16, 5]
    assert counts[0]["val"] == counts[1]["val"]
    written = (part / "dataset.json").stat().st_mtime_ns
    assert prepare_data(tmp_path, "digits", student_images=5, tiny=True) == (whole, part)
    assert (part / "dataset.json").stat().st_mtime_ns == written
    assert prepare_data(tmp_path, "digits", student_images=None, tiny=True) == (whole, whole)


def test_a_finished_run_is_kept_and_another_takes_its_place(tmp_path):
    whole, _ = prepare_data(tmp_path, "digits", student_images=None, tiny=True)
    imported = tmp_path / "import"
    request = json.loads((imported / "run.json").read_text())
    before = (imported / "result.json").stat().st_mtime_ns
    results = carry_out(imported, request["kind"], request["spec"], request["inputs"])
    assert results["splits"]["train"]["images"] == 16
    assert (imported / "result.json").stat().st_mtime_ns == before
    other = {**request["spec"], "max_dropped_fraction": 0.5}
    assert carry_out(imported, request["kind"], other, request["inputs"])["report"]["max_dropped_fraction"] == 0.5
    assert whole.exists()


def test_students_of_a_retrained_teacher_are_trained_again(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(gain_runs, "carry_out", lambda *given: asked.append(given) or {"student": {"ap": 0.5}})
    full, weights = setup("digits", "retinanet"), tmp_path / "teacher.safetensors"
    for content in (b"one", b"one", b"another"):
        weights.write_bytes(content)
        gain_runs.train_student(tmp_path, full, tmp_path, weights, name="mine", method=methods(full)["defeat"], seed=0)
    assert asked[0] == asked[1] != asked[2]


def test_a_run_that_fails_says_why_and_is_tried_again(tmp_path):
    spec = {"max_dropped_fraction": 0.05, "max_unpacked_bytes": 1, "max_unpacked_files": 1}
    inputs = {"archive": None, "directory": str(tmp_path / "nowhere")}
    for _ in range(2):
        with pytest.raises(RunFailed, match="nowhere is not a directory"):
            carry_out(tmp_path / "runs" / "one", "import_dataset", spec, inputs)


def test_runs_that_take_minutes_are_kept_somewhere(capsys):
    with pytest.raises(SystemExit, match="2"):
        gain.main([])
    assert "--out DIR is needed" in capsys.readouterr().err


@pytest.mark.slow
def test_quick_runs_every_part_and_claims_nothing(tmp_path, capfd):
    assert gain.main(["--quick", "--out", str(tmp_path), "--methods", "defeat"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["benchmark"] == "gain"
    assert result["ok"] is True
    assert result["ratio"] is None
    assert list(result["methods"]) == ["baseline", "defeat"]
    runs = tmp_path / "digits-quick" / "faster_rcnn"
    assert sorted(path.name for path in runs.iterdir()) == ["baseline-0", "defeat-0", "teacher"]
