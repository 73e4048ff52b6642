"""The norms of gradients at shared features, and the part weights that follow from them."""

import math

import pytest
import torch

from defeat.engine import methods
from defeat.engine.detectors.base import TrainPass
from defeat.engine.detectors.normalization import Normalization
from defeat.engine.methods import StepInfo
from defeat.engine.methods.balance import MAX_FACTOR, Balance, gradient_norms
from tests.support.methods import START, on_two_processes, one_pass, pair


def test_norms_are_those_of_gradients_worked_out_by_hand():
    first = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    second = torch.tensor([[3.0], [0.5]], dtype=torch.float64, requires_grad=True)
    elsewhere = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    losses = {
        "linear": 3 * first[0] + 4 * first[1],  # gradient (3, 4) and nothing
        "both": first.square().sum() / 2 + 2 * second[1, 0] ** 3,  # (1, -2) and (0, 6 * 0.25)
        "elsewhere": elsewhere**2,
        "constant": torch.tensor(7.0),
    }
    norms = gradient_norms(losses, [first, second])
    expected = {"linear": 5.0, "both": (1 + 4 + 1.5**2) ** 0.5, "elsewhere": 0.0, "constant": 0.0}
    assert list(norms) == list(expected)
    for name, norm in norms.items():
        assert not norm.requires_grad
        assert abs(norm.item() - expected[name]) <= 1e-12
    assert first.grad is None


def test_features_that_need_no_gradient_count_in_no_norm():
    frozen, trained = torch.ones(3), torch.ones(2, requires_grad=True)
    losses = {"both": (frozen.sum() * trained).sum()}
    assert gradient_norms(losses, [frozen, trained])["both"].item() == pytest.approx(3 * 2**0.5)
    assert gradient_norms(losses, [frozen])["both"].item() == 0.0


def test_norms_of_a_real_step_are_those_of_backward_and_leave_it_as_it_was():
    student, teacher = pair()
    method = methods.build({"method": "defeat", "warmup_steps": 0}, student, teacher)
    passed = one_pass(student)
    losses = {**passed.losses, **method(passed, teacher, START)}
    features = list(passed.features.values())
    norms = gradient_norms(losses, features)
    assert all(parameter.grad is None for parameter in student.parameters())
    for feature in features:
        feature.retain_grad()
    for name, loss in losses.items():
        for feature in features:
            feature.grad = None
        loss.backward(retain_graph=True)
        squares = [feature.grad.double().square().sum() for feature in features if feature.grad is not None]
        expected = torch.stack(squares).sum().sqrt().item()
        assert expected > 0, name
        assert abs(norms[name].item() - expected) <= 1e-5 * expected, name


@pytest.mark.parametrize("size", [1e-7, 1e-3, 1.0, 100.0])
def test_norms_in_float16_are_those_in_float32(size):
    """As under autocast: the loss is wide, the features and what flows back through them half."""
    norms = []
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(0)
        features = torch.randn(1000, requires_grad=True)
        half = features.to(dtype)
        loss = (half.float() * size * torch.linspace(0.5, 1.0, 1000)).sum()
        norms.append(float(gradient_norms({"loss": loss}, [half])["loss"]))
    assert norms[1] == pytest.approx(norms[0], rel=2e-3)


def test_norms_of_half_precision_features_do_not_overflow():
    features = torch.full((10_000,), 1.0, dtype=torch.bfloat16, requires_grad=True)
    wide = torch.full((4,), 1.0, dtype=torch.float16, requires_grad=True)
    norms = gradient_norms({"loss": features.sum(), "large": (wide * 30_000).float().sum()}, [features, wide])
    assert norms["loss"].dtype == torch.float32
    assert norms["loss"].item() == 100.0
    assert abs(norms["large"].item() - 60_000) < 20


def scripted(own: float, **parts: float) -> tuple[TrainPass, dict[str, torch.Tensor]]:
    """A pass whose own losses and further parts have gradients of these norms at its one feature map."""
    features = torch.zeros(2, 2, requires_grad=True)
    losses = {name: (norm * features[0, 0]) + 1 for name, norm in {"first": own / 4, "second": 3 * own / 4}.items()}
    passed = TrainPass(
        images=torch.zeros(1),
        normalization=Normalization(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        image_sizes=[],
        targets=[],
        features={"0": features},
        losses=losses,
    )
    return passed, {name: (norm * features[1, 1]) + 1 for name, norm in parts.items()}


def factors(balance: Balance, own: float, step: int, **parts: float) -> dict[str, float]:
    """What each part was multiplied with at a step."""
    passed, losses = scripted(own, **parts)
    return {name: loss.item() for name, loss in balance(passed, losses, step).items()}  # each was 1


def test_factors_are_geometric_means_over_the_measured_steps():
    balance = Balance(["a", "b"])
    assert factors(balance, 8.0, 0, a=2.0, b=16.0, c=5.0) == pytest.approx({"a": 4.0, "b": 0.5, "c": 1.0}, rel=1e-6)
    mean = 4.0**0.8 * 1.0**0.2
    assert factors(balance, 2.0, 9, a=2.0, b=4.0) == pytest.approx({"a": mean, "b": 0.5}, rel=1e-6)
    for step in (10, 49, 51, 99):
        assert factors(balance, 100.0, step, a=1.0, b=1.0) == pytest.approx({"a": mean, "b": 0.5}, rel=1e-6)
    again = Balance(["a", "b"])
    again.load_state_dict(balance.state_dict())
    later = mean**0.8 * 3.0**0.2
    for one in (balance, again):
        assert factors(one, 3.0, 100, a=1.0, b=6.0)["a"] == pytest.approx(later, rel=1e-6)


def _of_each_rank(rank: int) -> list[float]:
    """The factors of one process of two, whose images pull unlike the other's."""
    found = factors(Balance(["near", "far"]), own=(2.0, 6.0)[rank], step=0, near=(1.0, 3.0)[rank], far=(0.5, 0.0)[rank])
    return [found["near"], found["far"]]


def test_processes_that_train_together_take_the_means_of_their_norms(tmp_path):
    first, second = on_two_processes(_of_each_rank, tmp_path)
    assert first == second
    assert first == pytest.approx([4 / 2, 4 / 0.25])


def test_what_cannot_be_measured_leaves_the_factors_as_they_were():
    balance = Balance(["a", "b"])
    assert factors(balance, 1.0, 0, a=0.0, b=4.0) == pytest.approx({"a": 1.0, "b": 0.25}, rel=1e-6)
    for own, b in ((0.0, 1.0), (math.inf, 1.0), (1.0, math.inf), (math.nan, 1.0)):
        factors(balance, own, 1, a=0.0, b=b)
        assert balance.log_factor[1].item() == pytest.approx(math.log(0.25), rel=1e-6)
    # The first time that it can be measured counts whole, whenever that is.
    assert factors(balance, 6.0, 50, a=2.0, b=0.0)["a"] == pytest.approx(3.0, rel=1e-6)
    assert factors(Balance(["a"]), 1.0, 0, a=1e-12)["a"] == pytest.approx(MAX_FACTOR, rel=1e-5)


def test_each_part_of_defeat_pulls_as_hard_as_the_students_own_losses_whatever_its_weight():
    student, teacher = pair()
    found = []
    for weights in ({}, {"neck_object_weight": 0.01, "head_background_weight": 300.0}):
        torch.manual_seed(0)
        method = methods.build({"method": "defeat", "weights": "auto", **weights}, student, teacher)
        passed = one_pass(student)
        losses = method(passed, teacher, START)
        norms = gradient_norms({"own": sum(passed.losses.values()), **losses}, list(passed.features.values()))
        assert len(losses) == 4
        for name in losses:
            assert norms[name].item() == pytest.approx(norms["own"].item(), rel=1e-4), name
        found.append({name: loss.item() for name, loss in losses.items()})
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_part_without_a_weight_stays_off_and_the_backbones_keeps_its_own():
    student, teacher = pair()
    given = {"method": "defeat", "neck_background_weight": 0, "backbone_object_weight": 2.0}
    torch.manual_seed(0)
    auto = methods.build({**given, "weights": "auto"}, student, teacher)
    fixed = methods.build(given, student, teacher)
    fixed.load_state_dict(auto.state_dict(), strict=False)
    passed = one_pass(student)
    ours, theirs = (method(passed, teacher, StepInfo(step=0, steps=1, epoch=0, epochs=1)) for method in (auto, fixed))
    assert ours.keys() == theirs.keys() == {"neck_object", "backbone_object", "head_object", "head_background"}
    assert ours["backbone_object"].item() == theirs["backbone_object"].item() > 0
    assert ours["neck_object"].item() != pytest.approx(theirs["neck_object"].item(), rel=1e-2)
