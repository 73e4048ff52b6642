"""Combinations: the sum of their methods, from one look at the teacher."""

import pytest
import torch

from defeat.engine import methods
from defeat.engine.report import RunError
from tests.support.methods import START, one_pass, pair
from tests.support.training import TINY, events, run, shapes, spec, write_run

BOTH = {"method": "defeat", "proposals": "both"}


def test_losses_are_those_of_each_method_times_its_weight_under_its_name():
    student, teacher = pair(student_channels=16)
    combined = methods.build([{**BOTH, "weight": 2.0}, {"method": "pkd", "weight": 0.5}], student, teacher)
    passed, state = one_pass(student), torch.get_rng_state()
    losses = combined(passed, teacher, START)
    expected = {}
    torch.set_rng_state(state)
    for name, weight in (("defeat", 2.0), ("pkd", 0.5)):
        alone = methods.build(BOTH if name == "defeat" else {"method": name}, student, teacher)
        alone.load_state_dict(combined.methods[name].state_dict())
        torch.set_rng_state(state)
        own = alone(passed, teacher, START)
        expected |= {f"{name}/{part}": weight * loss for part, loss in own.items()}
    assert losses.keys() == expected.keys()
    assert "defeat/head_object" in losses
    assert "pkd/neck" in losses
    assert all(torch.equal(losses[name], expected[name]) for name in losses)


def test_the_teachers_trunk_runs_once_for_all_methods_together(monkeypatch):
    student, teacher = pair(student_channels=16)
    names = ("defeat", "pkd", "cwd", "fgd", "mgd", "fitnet", "fgfi", "frs")
    specs = [{"method": name} for name in names]
    specs[0] |= {"proposals": "both", "backbone_object_weight": 1.0}
    combined = methods.build(specs, student, teacher)
    runs = {"body": 0, "fpn": 0}
    for part in runs:
        module = getattr(teacher.backbone, part)
        forward = module.forward

        def counted(*args, _part=part, _forward=forward):
            runs[_part] += 1
            return _forward(*args)

        monkeypatch.setattr(module, "forward", counted)
    losses = combined(one_pass(student), teacher, START)
    assert {name.split("/")[0] for name in losses} == set(names)
    assert runs == {"body": 1, "fpn": 1}
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in combined.parameters())


@pytest.mark.parametrize(
    ("spec", "code", "says"),
    [
        ([], "bad_combination", "at least two methods; got 0"),
        ([{"method": "pkd"}], "bad_combination", "at least two methods; got 1"),
        ([{"method": "cwd"}, {"method": "fgd"}, {"method": "cwd"}], "bad_combination", "cwd repeats"),
        ([{"method": "cwd"}, {"method": "baseline"}], "bad_combination", "baseline teaches nothing"),
        ([{"method": "cwd"}, {"method": "magic"}], "unknown_method", "distillation.1.method is 'magic'"),
        ([{"method": "cwd"}, {"method": "fgd", "weight": 0}], "bad_spec", "distillation.1.weight"),
        ([{"method": "cwd"}, {"method": "fgd", "weight": 1000.5}], "bad_spec", "distillation.1.weight"),
        ([{"method": "cwd"}, {"method": "fgd", "wieght": 1}], "bad_spec", "distillation.1.wieght"),
        ({"method": "cwd", "weight": 2}, "bad_spec", "distillation.weight"),
    ],
)
def test_what_cannot_be_combined_says_why(spec, code, says):
    with pytest.raises(RunError) as caught:
        methods.build(spec, *pair())
    assert (caught.value.failure_class, caught.value.code) == ("user", code)
    assert says in caught.value.detail


def test_a_run_logs_each_methods_losses_by_its_name(tmp_path):
    schedule = {"epochs": 1, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 2}
    job = spec(
        teacher={"source": "train", "detector": TINY, "initial_weights": "random", "schedule": schedule},
        student={"detector": TINY, "initial_weights": "random"},
        distillation=[{"method": "fgfi"}, {"method": "frs", "weight": 0.5}],
        schedule=schedule,
    )
    shapes(tmp_path, train=8, val=4)
    directory = write_run(tmp_path / "run", tmp_path / "canonical", job)
    result = run(directory)
    assert result["status"] == "succeeded", result
    logged = [one["values"] for one in events(directory, "metrics") if one["subject"] == "student"][-1]
    own = {"loss/classifier", "loss/box_reg", "loss/objectness", "loss/rpn_box_reg"}
    added = {"loss/fgfi/neck", "loss/frs/neck", "loss/frs/logits"}
    assert {name for name in logged if name.startswith("loss/")} == {"loss/total"} | own | added
    assert all(logged[name] > 0 for name in added)
