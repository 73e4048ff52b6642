"""One optimiser step: cut into parts, in half precision, out of memory, with values that are not finite."""

import math
import weakref

import pytest
import torch

from defeat.engine import detectors, methods
from defeat.engine.data.loading.batch import Batch
from defeat.engine.methods import METHODS
from defeat.engine.methods.base import StepInfo
from defeat.engine.report import RunError
from defeat.engine.training.config import ScheduleConfig
from defeat.engine.training.ema import EMA
from defeat.engine.training.health import QUIET_STEPS, Monitor
from defeat.engine.training.optim import state_bytes
from defeat.engine.training.process_group import ProcessGroup
from defeat.engine.training.step import Step
from tests.support.training import CLASSES, TINY, images_and_targets

START = StepInfo(step=0, steps=10, epoch=0, epochs=1)
# A RetinaNet without batch norm in motion: its losses are means over images, so parts of a batch add up to the whole.
RETINANET = {
    "architecture": "retinanet",
    "backbone": TINY["backbone"],
    "strides": [8, 16],
    "extra_levels": "none",
    "pyramid_channels": 16,
    "min_size": 64,
    "max_size": 96,
    "frozen_batch_norm": True,
}


def batch_of(count):
    images, targets = images_and_targets(count)
    return Batch.of([((255 * image).byte(), target) for image, target in zip(images, targets, strict=True)])


def step_for(detector=RETINANET, distillation=None, device="cpu", **schedule):
    torch.manual_seed(0)
    student = detectors.build(detector, CLASSES).train().to(device)
    teacher = None
    if distillation is not None:
        teacher = detectors.build({**detector, "pyramid_channels": 24}, CLASSES).eval().requires_grad_(False).to(device)
    method = methods.build(distillation or {"method": "baseline"}, student, teacher).to(device)
    given = {"warmup_steps": 0, "batch_size": 4, "learning_rate": 0.01, **schedule}
    step = Step(
        student,
        method=method,
        teacher=teacher,
        schedule=ScheduleConfig(**given),
        group=ProcessGroup(),
        device=torch.device(device),
    )
    return step


def gradients(step):
    return {name: one.grad for name, one in step.losses.named_parameters() if one.grad is not None}


WHOLE_DEFEAT = {"method": "defeat", "proposals": "both", "backbone_object_weight": 1, "backbone_background_weight": 1}


@pytest.mark.parametrize("boxes", [True, False])
@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"baseline", "pkd"}))  # these two have none
def test_every_parameter_of_a_method_has_a_gradient(name, boxes):
    """So that several processes need not look for those that have none, in each step."""
    detector, method = (TINY, WHOLE_DEFEAT) if name == "defeat" else (RETINANET, {"method": name})
    step = step_for(detector, distillation=method)
    images, targets = images_and_targets(4)
    if not boxes:
        targets = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in targets]
    samples = [((255 * image).byte(), target) for image, target in zip(images, targets, strict=True)]
    step(Batch.of(samples), StepInfo(step=600, steps=1000, epoch=0, epochs=1))
    trainable = {name for name, one in step.losses.named_parameters() if one.requires_grad}
    assert gradients(step).keys() == trainable


def test_accumulated_parts_have_the_gradient_of_the_whole_batch():
    whole, parts = (
        step_for(distillation={"method": "fitnet"}, accumulation=count, gradient_clip=0) for count in (1, 4)
    )
    images, targets = images_and_targets(1)
    other = [{"boxes": target["boxes"] + 9, "labels": target["labels"]} for target in targets]
    batch = Batch.of(list(zip([(255 * image).byte() for image in images * 4], [*targets, *other] * 2, strict=True)))
    values = whole(batch, START, measured=True).values
    again = parts(batch, START, measured=True).values
    assert again.keys() == values.keys()
    for name, value in values.items():
        # A share is of a mean of norms, and a norm of a mean is less: the parts have gradients of different directions.
        if not name.startswith("gradient_share/"):
            assert again[name] == pytest.approx(value, rel=1e-4), name
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("detector", [RETINANET, TINY], ids=["retinanet", "faster_rcnn"])
def test_half_precision_takes_nearly_the_same_step(detector, precision):
    method = {"method": "defeat", "head_object_weight": 0, "head_background_weight": 0}
    if detector is TINY:
        method = {"method": "defeat", "proposals": "both"}
    (full, half) = (
        step_for(detector, distillation=method, precision=one, channels_last=one != "float32", gradient_clip=0)
        for one in ("float32", precision)
    )
    batch = batch_of(4)
    found = []
    for step in (full, half):
        torch.manual_seed(1)
        found.append(step(batch, START).values)
    wide, narrow = found
    assert narrow.keys() == wide.keys()
    assert narrow["loss/total"] == pytest.approx(wide["loss/total"], rel=0.05)
    assert all(one.dtype == torch.float32 for one in half.losses.parameters())
    if precision == "bfloat16":  # float16 starts with a scale that overflows, and leaves steps out until it fits
        assert narrow["gradient_norm"] == pytest.approx(wide["gradient_norm"], rel=0.2)


def test_float16_leaves_out_a_step_that_overflows_and_goes_on():
    step = step_for(precision="float16")
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 1e38})
    before = {name: tensor.clone() for name, tensor in step.losses.detector.state_dict().items()}
    values = step(batch_of(4), START).values
    assert all(map(math.isfinite, values.values()))
    assert "gradient_norm" not in values
    weights = dict(step.losses.detector.named_parameters())
    assert all(torch.equal(before[name], one) for name, one in weights.items())
    assert step.scaler.get_scale() < 1e38


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_gradient_above_the_limit_is_clipped_and_reported_with_its_norm_before(precision):
    """In float16 too, where the gradient is scaled until just before."""
    free, clipped = (step_for(precision=precision, gradient_clip=clip) for clip in (0, 0.01))
    for step in (free, clipped):
        step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 64.0})
    whole, reported = (step(batch_of(4), START).values for step in (free, clipped))
    assert reported["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=1e-5)
    assert reported["gradient_norm"] > 0.1
    for name, gradient in gradients(free).items():
        expected = gradient * (0.01 / whole["gradient_norm"])
        torch.testing.assert_close(gradients(clipped)[name], expected, rtol=1e-3, atol=1e-8, msg=name)


def test_a_gradient_below_the_limit_stays():
    free, clipped = (step_for(gradient_clip=clip) for clip in (0, 1e6))
    for step in (free, clipped):
        step(batch_of(4), START)
    assert all(torch.equal(gradients(clipped)[name], gradient) for name, gradient in gradients(free).items())


def test_a_loss_that_is_not_finite_ends_the_run_with_the_weights_as_they_were():
    step = step_for(distillation={"method": "fitnet"})
    with torch.no_grad():
        step.losses.frozen[0].backbone.fpn.layer_blocks[0][0].bias.fill_(math.inf)
    before = {name: tensor.clone() for name, tensor in step.losses.state_dict().items()}
    with pytest.raises(RunError, match=r"neck (inf|nan)") as raised:
        step(batch_of(4), START)
    assert raised.value.code == "loss_not_finite"
    assert all(torch.equal(before[name], one) for name, one in step.losses.state_dict().items())


@pytest.mark.parametrize(
    ("accumulation", "limit", "expected"),
    [
        (1, 3, "6 images at a time do not fit into memory; 3 at a time fit: that is accumulation 2 for the same"),
        (1, 2, "that is accumulation 3 for the same batch_size 6, or batch_size 2 ("),
        (2, 1, "3 images at a time do not fit into memory; 1 at a time fit: that is accumulation 6 for the same"),
        (2, 1, "or batch_size 2 ("),
        (1, 0, "not even one image fits"),
    ],
)
def test_out_of_memory_names_a_batch_that_would_fit(monkeypatch, accumulation, limit, expected):
    step = step_for(batch_size=6, accumulation=accumulation)
    student = step.losses.detector
    plain, held = student.forward_train, []

    def _train_pass(images, targets):
        assert not any(one() for one in held), "what a failed pass took is still taken when the next one is tried"
        activation = torch.zeros(1)
        held.append(weakref.ref(activation))
        if len(images) > limit:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB\nmore")
        return plain(images, targets)

    monkeypatch.setattr(student, "forward_train", _train_pass)
    with pytest.raises(RunError) as raised:
        step(batch_of(6), START)
    assert (raised.value.failure_class, raised.value.code) == ("oom", "out_of_memory")
    assert expected in raised.value.detail
    assert raised.value.detail.endswith("(tried to allocate 80 GiB)")


@pytest.mark.parametrize("room", [1, 3])
def test_an_optimizer_without_room_for_its_state_is_out_of_memory_too(monkeypatch, room):
    """What is tried then leaves the room that the state will want."""
    step = step_for(batch_size=6)
    state, free = state_bytes(step.optimizer), {"bytes": 0}

    def _step():
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    plain, empty = step.losses.detector.forward_train, torch.empty

    def _train_pass(images, targets):
        if free["bytes"] == state and len(images) > room:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        return plain(images, targets)

    def _empty(*size, **options):
        if size == (state,):
            free["bytes"] = state
        return empty(*size, **options)

    monkeypatch.setattr(step.optimizer, "step", _step)
    monkeypatch.setattr(step.losses.detector, "forward_train", _train_pass)
    monkeypatch.setattr(torch, "empty", _empty)
    with pytest.raises(RunError) as raised:
        step(batch_of(6), START)
    assert (raised.value.failure_class, raised.value.code) == ("oom", "out_of_memory")
    assert f"{room} at a time fit: that is accumulation {6 // room} for" in raised.value.detail
    assert raised.value.detail.endswith("(tried to allocate 2 GiB)")


def test_the_detectors_gradient_and_the_methods_are_clipped_apart():
    free, clipped = (step_for(distillation={"method": "fitnet", "neck_weight": 50}, gradient_clip=c) for c in (0, 0.01))
    whole, reported = (step(batch_of(4), START).values for step in (free, clipped))
    names = ("gradient_norm", "adapter_gradient_norm")
    assert [reported[name] for name in names] == pytest.approx([whole[name] for name in names])
    assert all(reported[name] > 0.01 for name in names)
    for name, gradient in gradients(free).items():
        norm = whole["adapter_gradient_norm" if name.startswith("method.") else "gradient_norm"]
        torch.testing.assert_close(gradients(clipped)[name], gradient * (0.01 / norm), rtol=1e-3, atol=1e-9, msg=name)


def test_a_step_that_overflows_is_left_out_and_the_scale_falls():
    step = step_for(precision="float16", batch_size=1)
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 1e38})
    before = {name: tensor.clone() for name, tensor in step.losses.named_parameters()}
    values = step(batch_of(1), START).values
    assert "gradient_norm" not in values
    assert all(map(math.isfinite, values.values()))
    assert step.scaler.get_scale() == pytest.approx(0.5e38)
    assert all(torch.equal(before[name], one) for name, one in step.losses.named_parameters())
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 64.0})
    assert step(batch_of(1), START).values["gradient_norm"] > 0
    assert not all(torch.equal(before[name], one) for name, one in step.losses.named_parameters())


def test_no_fewer_images_are_tried_than_the_detector_trains_on(monkeypatch):
    step, tried = step_for(batch_size=6), []
    student = step.losses.detector
    monkeypatch.setattr(type(student), "least_images", 2)

    def _train_pass(images, _targets):
        tried.append(len(images))
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(student, "forward_train", _train_pass)
    with pytest.raises(RunError, match="not even 2 images fit"):
        step(batch_of(6), START)
    assert tried == [6, 3, 2]


def test_measuring_changes_nothing():
    weights = []
    for measured in (False, True):
        step = step_for(TINY, distillation={"method": "defeat", "proposals": "teacher"})
        torch.manual_seed(5)
        values = step(batch_of(4), START, measured=measured).values
        weights.append(step.losses.state_dict())
        shares = [value for name, value in values.items() if name.startswith("gradient_share/")]
        assert sum(shares) == pytest.approx(1.0 if measured else 0.0)
    assert all(torch.equal(weights[1][name], one) for name, one in weights[0].items())


def test_a_part_at_the_backbone_has_its_share():
    step = step_for(TINY, distillation={"method": "defeat", "backbone_object_weight": 2.0})
    values = step(batch_of(4), START, measured=True).values
    shares = {name: value for name, value in values.items() if name.startswith("gradient_share/")}
    assert shares["gradient_share/backbone_object"] > 0
    assert shares["gradient_share/neck_object"] > 0
    assert sum(shares.values()) == pytest.approx(1)


def test_the_average_is_the_formula():
    module = torch.nn.BatchNorm1d(2)
    average = EMA(module, decay=0.5)
    expected = {name: tensor.clone().double() for name, tensor in module.state_dict().items()}
    for step in range(12):
        torch.manual_seed(step)
        with torch.no_grad():
            module.weight.normal_()
        module(torch.randn(4, 2))
        average.update(module, step=step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, tensor in module.state_dict().items():
            expected[name] = tensor if name == "num_batches_tracked" else decay * expected[name] + (1 - decay) * tensor
    own = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    parameters = list(module.parameters())
    places = {tensor.data_ptr() for tensor in (*own.values(), *module.state_dict().values(), *average.tensors.values())}
    with average.applied(module):
        for name, tensor in module.state_dict().items():
            torch.testing.assert_close(tensor.double(), expected[name].double(), rtol=1e-5, atol=1e-6)
            assert tensor.data_ptr() in places  # no third copy of the weights
        assert all(one is other for one, other in zip(parameters, module.parameters(), strict=True))
    assert all(torch.equal(own[name], tensor) for name, tensor in module.state_dict().items())


class RecordingReporter:
    def __init__(self):
        self.messages = []

    def message(self, level, code, message):
        self.messages.append((level, code, message))


def test_a_part_of_the_loss_that_stays_zero_is_reported_once():
    reporter = RecordingReporter()
    monitor = Monitor(reporter, "student")
    for step in range(QUIET_STEPS - 1):
        monitor.update({"loss/neck": 0.0, "loss/head": 1.0, "gradient_norm": 1.0}, step=step)
    assert reporter.messages == []
    resumed = Monitor(reporter, "student")
    resumed.quiet_steps = dict(monitor.quiet_steps)
    for step in range(QUIET_STEPS - 1, 3 * QUIET_STEPS):
        resumed.update({"loss/neck": 0.0, "loss/head": 0.0 if step % 40 else 1.0, "gradient_norm": 1.0}, step=step)
    ((level, code, message),) = reporter.messages
    assert (level, code) == ("warn", "loss_part_zero")
    assert message.startswith("loss/neck of the student has been 0 for 50 steps, up to step 49")


def test_skipped_steps_are_reported_once():
    step, reporter = step_for(precision="float16", batch_size=1), RecordingReporter()
    monitor = Monitor(reporter, "student")
    for number in range(QUIET_STEPS):
        step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 1e38})
        monitor.update(step(batch_of(1), START).values, step=number)
    ((level, code, message),) = reporter.messages
    assert (level, code) == ("warn", "gradient_not_finite")
    assert "the student's gradient has overflowed float16 for 50 steps, up to step 49" in message


@pytest.mark.slow
def test_compiled_trunks_take_the_same_steps():
    method = {"method": "defeat", "head_object_weight": 0, "head_background_weight": 0}
    compiled, plain = (step_for(distillation=method, compile=one) for one in (True, False))
    assert compiled.losses.detector.state_dict().keys() == plain.losses.detector.state_dict().keys()
    for number in range(3):
        found = []
        for step in (compiled, plain):
            torch.manual_seed(number)
            found.append(step(batch_of(4), START, measured=number == 1).values)
        assert found[0] == pytest.approx(found[1], rel=1e-3)
