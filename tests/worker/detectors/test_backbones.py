"""Every backbone of the catalog builds, and its pyramid has the strides it promises."""

import pytest
import torch

from worker.detectors.backbones import BACKBONES, STRIDES, build_pyramid
from worker.report import RunError

# The heavy ones are the same code at another depth: built on no memory, not run.
HEAVY = {name for name in BACKBONES if any(part in name for part in ("101", "152", "wide", "darknet", "cspresnet"))}


@pytest.mark.parametrize("name", BACKBONES)
def test_pyramid(name):
    with torch.device("meta" if name in HEAVY else "cpu"):
        pyramid = build_pyramid(
            name, strides=STRIDES, channels=8, extra_levels="pool", pretrained=False, frozen_batch_norm=False
        ).eval()
        with torch.no_grad():
            features = pyramid(torch.zeros(1, 3, 64, 96))
    expected = [(8, 64 // stride, 96 // stride) for stride in (*STRIDES, 64)]
    expected[-1] = (8, 1, 2)  # subsampling rounds up
    assert [tuple(one.shape[1:]) for one in features.values()] == expected


def test_a_part_of_the_strides():
    pyramid = build_pyramid(
        "torchvision/resnet18",
        strides=(8, 16),
        channels=8,
        extra_levels="none",
        pretrained=False,
        frozen_batch_norm=False,
    )
    assert [tuple(one.shape) for one in pyramid(torch.zeros(2, 3, 64, 64)).values()] == [(2, 8, 8, 8), (2, 8, 4, 4)]


@pytest.mark.parametrize(
    ("extra_levels", "strides"),
    [("none", (8, 16)), ("pool", (8, 16, 32)), ("p6p7", (8, 16, 32, 64)), ("p6p7_backbone", (8, 16, 32, 64))],
)
def test_extra_levels(extra_levels, strides):
    pyramid = build_pyramid(
        "torchvision/resnet18",
        strides=(8, 16),
        channels=8,
        extra_levels=extra_levels,
        pretrained=False,
        frozen_batch_norm=False,
    )
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


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/lcnet_050"])
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
