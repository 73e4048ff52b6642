"""What holds for every method in the registry."""

import math

import pytest
import torch

from defeat.engine import methods
from defeat.engine.data.loading.batch import Batch
from defeat.engine.methods import METHODS
from defeat.engine.report import RunError
from defeat.engine.training.config import ScheduleConfig
from defeat.engine.training.process_group import ProcessGroup
from defeat.engine.training.step import Step
from tests.support.methods import START, one_pass, pair
from tests.support.training import images_and_targets

WITH_TEACHER = [name for name, entry in METHODS.items() if entry.needs_teacher]


def detectors_for(name):
    """A pair of unlike channels, save for the method that refuses it."""
    return pair(student_channels=16 if name == "pkd" else 8)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_trains_student_and_adapters_and_leaves_the_teacher_alone(name):
    student, teacher = detectors_for(name)
    method = methods.build({"method": name}, student, teacher)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    passed = one_pass(student)
    losses = method(passed, teacher, START)
    assert bool(losses) == (name != "baseline")
    assert all(loss.shape == () and loss.dtype == torch.float32 and loss.item() >= 0 for loss in losses.values())
    assert all(math.isfinite(loss.item()) for loss in losses.values())
    assert not losses.keys() & passed.losses.keys()
    sum([*passed.losses.values(), *losses.values()]).backward()
    for module in (student, method):
        assert all(parameter.grad is not None for parameter in module.parameters())
        assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_the_loss_reaches_the_students_backbone(name):
    student, teacher = detectors_for(name)
    method = methods.build({"method": name}, student, teacher)
    sum(method(one_pass(student), teacher, START).values()).backward()
    norms = [parameter.grad.norm().item() for parameter in student.backbone.parameters() if parameter.grad is not None]
    assert sum(norms) > 0


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_a_method_without_any_weight_is_refused(name):
    weights = METHODS[name].weights
    nothing = {"method": name} | dict.fromkeys(weights, 0)
    other = {"method": "fgd" if name == "fitnet" else "fitnet"}
    for spec in (nothing, [other, {**nothing, "weight": 2.0}]):
        with pytest.raises(RunError) as caught:
            methods.build(spec, *detectors_for(name))
        assert (caught.value.failure_class, caught.value.code) == ("user", "weights_all_zero")
        assert f"every weight is 0 ({', '.join(weights)})" in caught.value.detail


@pytest.mark.parametrize(
    ("name", "weight"), [(name, weight) for name in WITH_TEACHER for weight in METHODS[name].weights]
)
def test_a_weight_of_0_leaves_its_part_out_and_the_others_as_they_are(name, weight):
    """No loss of 0 that somebody is warned of, and nothing that learns without a part that it learns from."""
    weights = METHODS[name].weights
    student, teacher = detectors_for(name)
    torch.manual_seed(1)
    whole, alone = (
        methods.build({"method": name, **dict.fromkeys(off, 0), weight: 0.5}, student, teacher)
        for off in ([], [other for other in weights if other != weight])
    )
    alone.load_state_dict({key: whole.state_dict()[key] for key in alone.state_dict()})
    passed, state = one_pass(student), torch.get_rng_state()
    found = []
    for method in (whole, alone):
        torch.set_rng_state(state)
        found.append(method(passed, teacher, START))
    expected, losses = found
    assert len(losses) == 1
    assert all(torch.equal(loss, expected[part]) for part, loss in losses.items())
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in alone.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_losses_and_weights(name):
    images, targets = images_and_targets()
    results = []
    for _ in range(2):
        student, teacher = detectors_for(name)
        method = methods.build({"method": name}, student, teacher)
        step = Step(
            student,
            method=method,
            teacher=teacher,
            schedule=ScheduleConfig(warmup_steps=0),
            group=ProcessGroup(),
            device=torch.device("cpu"),
        )
        batch = Batch.of([((255 * image).byte(), target) for image, target in zip(images, targets, strict=True)])
        values = [step(batch, START) for _ in range(2)]
        results.append((values, {**student.state_dict(), **method.state_dict()}))
    (first, weights), (second, again) = results
    assert first == second
    assert all(torch.equal(weights[key], again[key]) for key in weights)


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_steps_on_one_batch_bring_the_distillation_loss_down(name):
    student, teacher = detectors_for(name)
    method = methods.build({"method": name}, student, teacher)
    optimizer = torch.optim.Adam([*student.parameters(), *method.parameters()], lr=2e-3)
    totals = []
    for _ in range(8):
        losses = method(one_pass(student), teacher, START)
        totals.append(sum(losses.values()).item())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert totals[-1] < totals[0]


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_a_missing_teacher_and_unlike_strides_are_refused(name):
    student, teacher = detectors_for(name)
    with pytest.raises(RunError) as caught:
        methods.build({"method": name}, student, None)
    assert caught.value.code == "teacher_required"
    assert f"method {name} needs a teacher" in caught.value.detail
    teacher.strides = (32, 64)
    with pytest.raises(RunError) as caught:
        methods.build({"method": name}, student, teacher)
    assert caught.value.code == "pyramids_do_not_pair"
    assert "[8, 16], the teacher's [32, 64]" in caught.value.detail
