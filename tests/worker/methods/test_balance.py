"""The norms of gradients at shared features."""

import torch

from tests.worker.methods.support import START, one_pass, pair
from worker import methods
from worker.methods.balance import gradient_norms


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


def test_norms_of_half_precision_features_do_not_overflow():
    features = torch.full((10_000,), 1.0, dtype=torch.bfloat16, requires_grad=True)
    wide = torch.full((4,), 1.0, dtype=torch.float16, requires_grad=True)
    norms = gradient_norms({"loss": features.sum(), "large": (wide * 30_000).float().sum()}, [features, wide])
    assert norms["loss"].dtype == torch.float32
    assert norms["loss"].item() == 100.0
    assert abs(norms["large"].item() - 60_000) < 20
