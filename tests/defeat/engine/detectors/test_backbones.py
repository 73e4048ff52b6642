"""Every backbone of the catalog builds, and its pyramid has the strides it promises."""

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d

from defeat.engine.detectors.backbones import BACKBONES, STRIDES, TORCHVISION_BACKBONES, Pyramid, build_pyramid
from defeat.engine.report import RunError

# The heavy ones are the same code at another depth or width: built on no memory, not run.
_RESNETS = ("101", "152", "wide", "darknet", "cspresnet")
_OTHERS = ("_3_2gf", "_8gf", "convnext_small", "_base", "convnext_large", "swin_s", "swin_b", "swin_v2_s", "swin_v2_b")
HEAVY = {name for name in BACKBONES if any(part in name for part in _RESNETS + _OTHERS)}
# One network of each make.
MAKES = (
    "torchvision/resnet18",
    "torchvision/mobilenet_v2",
    "torchvision/mobilenet_v3_small",
    "torchvision/efficientnet_b0",
    "torchvision/regnet_y_400mf",
    "torchvision/convnext_tiny",
    "torchvision/swin_t",
    "torchvision/swin_v2_t",
    "timm/lcnet_050",
    "timm/mobilenetv3_small_050",
    "timm/convnext_atto",
    "timm/repvgg_a0",
)


def pyramid_of(name: str, **changes: Any) -> Pyramid:
    given: dict[str, Any] = {"strides": STRIDES, "extra_levels": "none", "frozen_batch_norm": False, **changes}
    return build_pyramid(name, channels=8, pretrained=False, **given)


@pytest.mark.parametrize("name", BACKBONES)
def test_pyramid(name):
    with torch.device("meta" if name in HEAVY else "cpu"):
        pyramid = pyramid_of(name, extra_levels="pool").eval()
        with torch.no_grad():
            features = pyramid(torch.zeros(1, 3, 64, 96))
    expected = [(8, 64 // stride, 96 // stride) for stride in (*STRIDES, 64)]
    expected[-1] = (8, 1, 2)  # subsampling rounds up
    assert [tuple(one.shape[1:]) for one in features.values()] == expected


def test_a_part_of_the_strides():
    pyramid = pyramid_of("torchvision/resnet18", strides=(8, 16))
    assert [tuple(one.shape) for one in pyramid(torch.zeros(2, 3, 64, 64)).values()] == [(2, 8, 8, 8), (2, 8, 4, 4)]


@pytest.mark.parametrize(
    ("extra_levels", "strides"),
    [("none", (8, 16)), ("pool", (8, 16, 32)), ("p6p7", (8, 16, 32, 64)), ("p6p7_backbone", (8, 16, 32, 64))],
)
def test_extra_levels(extra_levels, strides):
    pyramid = pyramid_of("torchvision/resnet18", strides=(8, 16), extra_levels=extra_levels)
    assert pyramid.strides == strides
    # 80 is no multiple of 32 and 64: extra levels round up, as every family's do, so that levels of a stride pair.
    sizes = [tuple(one.shape) for one in pyramid(torch.zeros(1, 3, 80, 96)).values()]
    assert sizes == [(1, 8, -(-80 // stride), -(-96 // stride)) for stride in strides]


@pytest.mark.parametrize("channels", [8, 256])
def test_p6_comes_from_the_pyramid_or_from_the_backbone(channels):
    """ResNet-18 has 256 channels at stride 16: of equally many, torchvision's block would take the pyramid's map."""
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for extra_levels, where in (("p6p7", "pyramid"), ("p6p7_backbone", "backbone")):
        pyramid = build_pyramid(
            "torchvision/resnet18",
            strides=(8, 16),
            channels=channels,
            extra_levels=extra_levels,
            pretrained=False,
            frozen_batch_norm=False,
        ).eval()
        maps = pyramid(images)
        source = maps["1"] if where == "pyramid" else pyramid.body(images)["1"]
        assert torch.equal(maps["p6"], pyramid.fpn.extra_blocks.p6(source))


@pytest.mark.parametrize(
    "name", ["torchvision/resnet18", "torchvision/regnet_y_400mf", "torchvision/swin_t", "timm/lcnet_050"]
)
def test_imagenet_weights_that_cannot_be_had_say_what_to_do(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def _no_network(*_args, **_kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torch.hub.download_url_to_file", _no_network)
    with pytest.raises(RunError) as caught:
        build_pyramid(name, strides=STRIDES, channels=8, extra_levels="none", pretrained=True, frozen_batch_norm=True)
    assert (caught.value.failure_class, caught.value.code) == ("infra", "weights_unavailable")
    assert "initial_weights: random" in caught.value.detail


@pytest.mark.parametrize(
    ("name", "prefix", "chain"),
    [
        ("mobilenet_v2", "", "features."),
        ("mobilenet_v3_small", "", "features."),
        ("efficientnet_b0", "", "features."),
        ("regnet_y_400mf", "", "trunk_output."),
        ("convnext_tiny", "net.", "features."),
        ("swin_v2_t", "net.", "features."),
    ],
)
def test_maps_and_names_are_torchvisions(name, prefix, chain):
    """The same maps as torchvision's feature extraction finds, with its weights under these names."""
    torch.manual_seed(0)
    whole = torchvision.models.get_model(name).eval()
    pyramid = pyramid_of(f"torchvision/{name}").eval()
    state = {key.removeprefix(chain): tensor for key, tensor in whole.state_dict().items()}
    body = pyramid.body.state_dict()
    pyramid.body.load_state_dict({key: state.get(key.removeprefix(prefix), tensor) for key, tensor in body.items()})
    assert [key for key in body if key.removeprefix(prefix) not in state and not key.startswith("norms.")] == []
    stages = TORCHVISION_BACKBONES[name]
    nodes = {f"{chain}{end}": str(level) for level, end in enumerate(stages.ends)}
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = list(create_feature_extractor(whole, nodes)(images).values())
        found = list(pyramid.body(images).values())
    if stages.channels_last:
        expected = [maps.movedim(-1, 1) for maps in expected]
    if stages.layer_norm:  # over the channels of each cell
        centred = [maps - maps.mean(dim=1, keepdim=True) for maps in expected]
        expected = [maps / (maps.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() for maps in centred]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MAKES)
def test_what_no_level_needs_is_not_there(name):
    with torch.device("meta"):
        pyramid = pyramid_of(name, strides=(4, 8)).eval()
        pyramid.body(torch.zeros(1, 3, 64, 64))["1"].sum().backward()
    idle = [key for key, parameter in pyramid.body.named_parameters() if parameter.grad is None]
    assert [key for key in idle if not key.startswith("norms.")] == []


@pytest.mark.parametrize(
    "name",
    [
        "torchvision/resnet18",
        "torchvision/mobilenet_v3_small",
        "torchvision/regnet_y_400mf",
        "torchvision/swin_v2_t",
        "timm/lcnet_050",
    ],
)
def test_frozen_batch_norm_computes_what_batch_norm_did(name):
    torch.manual_seed(0)
    plain = pyramid_of(name).eval()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    frozen = pyramid_of(name, frozen_batch_norm=True).eval()
    kinds = [type(module).__name__ for module in frozen.modules()]
    assert not any("BatchNorm" in kind and "Frozen" not in kind for kind in kinds)
    assert any("FrozenBatchNorm" in kind for kind in kinds) == ("swin" not in name)
    state = {key: tensor for key, tensor in plain.state_dict().items() if not key.endswith("num_batches_tracked")}
    frozen.load_state_dict(state)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(frozen(images).values(), plain(images).values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_epsilon_of_frozen_batch_norm_is_the_networks_own():
    pyramid = pyramid_of("torchvision/mobilenet_v3_small", frozen_batch_norm=True)
    assert {module.eps for module in pyramid.modules() if isinstance(module, FrozenBatchNorm2d)} == {1e-3}


def test_a_timm_network_draws_its_weights_once():
    torch.manual_seed(0)
    pyramid_of("timm/lcnet_050")
    drawn = torch.get_rng_state()
    torch.manual_seed(0)
    timm.create_model("lcnet_050", features_only=True, out_indices=(1, 2, 3, 4))
    FeaturePyramidNetwork([32, 64, 128, 256], 8)
    assert torch.equal(torch.get_rng_state(), drawn)
