"""Frozen batch norm: values of a batch norm in eval mode, in the precision of its input, of which it keeps nothing."""

import copy

import pytest
import timm
import torch
import torchvision
from timm.layers.norm_act import freeze_batch_norm_2d
from torchvision.models.detection._utils import overwrite_eps
from torchvision.ops import FrozenBatchNorm2d

from defeat.engine import detectors
from defeat.engine.detectors.backbones import STRIDES
from defeat.engine.detectors.frozen_norm import FrozenBatchNorm, freeze_batch_norm
from tests.defeat.engine.detectors.test_backbones import pyramid_of
from tests.support.training import CLASSES

HALVES = (torch.bfloat16, torch.float16)
BACKBONES = (
    "torchvision/resnet18",
    "torchvision/mobilenet_v3_small",
    "torchvision/regnet_y_400mf",
    "timm/resnet10t",
    "timm/mobilenetv3_small_050",
    "timm/repvgg_a0",
)
MOBILENET = {"architecture": "faster_rcnn_mobilenet", "pyramid_channels": 16, "min_size": 64, "max_size": 96}
BATCH = 3


def filled(norm: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for buffer in norm.buffers():
        buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return norm


def random_images() -> torch.Tensor:
    return torch.rand(BATCH, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_values_and_gradients_are_those_of_float64(dtype, epsilon, layout):
    norm = filled(FrozenBatchNorm(5, epsilon))
    generator = torch.Generator().manual_seed(2)
    x, pull = (torch.randn(2, 5, 4, 6, generator=generator).to(dtype).to(memory_format=layout) for _ in range(2))
    exact, pulled = x.double().requires_grad_(), pull.double()
    expected = filled(FrozenBatchNorm2d(5, epsilon)).double()(exact)
    (expected_gradient,) = torch.autograd.grad(expected, exact, pulled)
    if dtype == torch.float64:
        norm.double()
    found = norm(x.requires_grad_())
    # The graph is gone through twice, as in a step that measures gradients.
    (first,) = torch.autograd.grad(found, x, pull, retain_graph=True)
    (gradient,) = torch.autograd.grad(found, x, pull)
    assert (found.dtype, gradient.dtype) == (dtype, dtype)
    assert found.is_contiguous(memory_format=layout)
    assert torch.equal(first, gradient)
    # Half a unit in the last place, of one rounding; what float32 adds to it is little.
    step = torch.finfo(dtype).eps
    for mine, other in ((found, expected), (gradient, expected_gradient)):
        torch.testing.assert_close(
            mine.double(), other, rtol=max(0.51 * step, 4e-7 if step > 1e-9 else 1e-14), atol=1e-6
        )


def test_without_gradients_it_is_a_batch_norm():
    norm, x = filled(FrozenBatchNorm(5)), torch.randn(2, 5, 4, 6, requires_grad=True)
    with torch.no_grad():
        quiet = norm(x)
    assert torch.equal(quiet, norm(x))
    assert norm(x.detach()).grad_fn is None
    exported = torch.export.export(torch.nn.Sequential(norm), (x.detach(),))
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert names == ["aten.batch_norm.default"]


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", BACKBONES)
def test_every_map_is_in_half_precision(name, half, who):
    pyramid = pyramid_of(name, frozen_batch_norm=True, extra_levels="p6p7").train(who == "student")
    with torch.autocast("cpu", half), torch.set_grad_enabled(who == "student"):
        stages = pyramid.body(random_images())
        levels = pyramid.fpn(stages)
    assert {one.dtype for one in stages.values()} == {half}
    assert {one.dtype for one in levels.values()} == {half}
    assert [one.requires_grad for one in stages.values()] == [who == "student"] * len(STRIDES)


def test_the_maps_of_torchvisions_mobilenet_pyramid_are_in_half_precision():
    detector = detectors.build({**MOBILENET, "frozen_batch_norm": True}, CLASSES).train()
    norms = [one for one in detector.modules() if isinstance(one, FrozenBatchNorm2d)]
    assert len(norms) > 20
    assert {type(one) for one in norms} == {FrozenBatchNorm}
    with torch.autocast("cpu", torch.bfloat16):
        assert {one.dtype for one in detector.backbone.body(random_images()).values()} == {torch.bfloat16}


def kept(pyramid: torch.nn.Module, dtype: torch.dtype) -> int:
    """Return how many bytes of activations the body keeps for its backward pass."""
    storages = {}

    def _pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 4 and len(tensor) == BATCH:  # no weights
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(_pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        maps = pyramid.body(random_images())
    assert all(one.requires_grad for one in maps.values())
    return sum(one.nbytes() for one in storages.values())


@pytest.mark.parametrize("name", [*BACKBONES, "torchvision/resnet50"])
def test_half_precision_keeps_half_as_much_for_the_backward_pass(name):
    pyramid = pyramid_of(name, frozen_batch_norm=True).train()
    assert kept(pyramid, torch.bfloat16) <= 0.6 * kept(pyramid, torch.float32)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet10t"])
def test_a_frozen_norm_keeps_nothing_of_its_input(name):
    """Frozen norms keep less than norms in eval mode, which keep their input for the gradient of their weights."""
    frozen, plain = pyramid_of(name, frozen_batch_norm=True).train(), pyramid_of(name).eval()
    assert kept(frozen, torch.float32) < 0.7 * kept(plain, torch.float32)


def randomised(net: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape))
    return net


@pytest.mark.parametrize(
    "make",
    [
        lambda: torchvision.models.get_model("resnet18", weights=None),
        lambda: torchvision.models.get_model("efficientnet_b0", weights=None),
        lambda: timm.create_model("mobilenetv3_small_050"),
        lambda: timm.create_model("resnet10t"),
        lambda: timm.create_model("hgnetv2_b0"),
    ],
    ids=["resnet18", "efficientnet_b0", "timm-mobilenetv3", "timm-resnet10t", "timm-hgnetv2"],
)
def test_batch_norm_freezes_as_timm_freezes_it(make):
    net = randomised(make())
    # timm drops the switch for whether a norm is followed by its activation: the comparison is of what they hold.
    ours, theirs = freeze_batch_norm(copy.deepcopy(net)), freeze_batch_norm_2d(net)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours.state_dict()[key], tensor) for key, tensor in theirs.state_dict().items())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/mobilenetv3_small_050", "timm/hgnetv2_b0"])
def test_torchvision_finds_the_epsilon_of_each(name):
    pyramid = pyramid_of(name, frozen_batch_norm=True)
    overwrite_eps(pyramid, 0.25)
    norms = [one for one in pyramid.body.modules() if hasattr(one, "running_var")]
    assert len(norms) > 10
    assert {(isinstance(one, FrozenBatchNorm), one.eps) for one in norms} == {(True, 0.25)}
