"""SSD and SSDLite laid open: the same numbers as torchvision's plain call, and maps whose strides are what they say."""

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torchvision.models import VGG16_Weights, detection
from torchvision.models.vgg import cfgs, make_layers

from defeat.engine import detectors
from defeat.engine.detectors.pretrained import load_pretrained, published
from defeat.engine.report import RunError
from tests.support.one_stage import backward, with_an_empty_image
from tests.support.ssd import SSD, SSDLITE
from tests.support.training import CLASSES, images_and_targets

FAMILIES = {"ssd": SSD, "ssdlite": SSDLITE}
PRESETS = ("ssd300_vgg16", "ssdlite320_mobilenet_v3_large")

pytestmark = pytest.mark.usefixtures("narrow_vgg")


def build(family, classes=CLASSES, **changes):
    torch.manual_seed(0)
    return detectors.build({**FAMILIES[family], **changes}, classes)


@pytest.mark.parametrize(("family", "seed"), [("ssd", 0), ("ssdlite", 0), ("ssdlite", 1)])
def test_losses_and_gradients_are_those_of_the_plain_call(family, seed):
    detector = build(family).train()
    images, targets = with_an_empty_image(seed)
    plain, plain_gradients, plain_state = backward(detector, lambda: detector(images, targets), seed)
    ours, our_gradients, our_state = backward(detector, lambda: detector.forward_train(images, targets).losses, seed)
    assert plain.keys() == ours.keys() == {"classification", "bbox_regression"}
    assert all(loss.item() > 0 for loss in ours.values())
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
    assert all(torch.equal(plain_gradients[name], our_gradients[name]) for name in plain_gradients)
    assert torch.equal(plain_state, our_state)  # the same random numbers were drawn


@pytest.mark.parametrize("size", [288, 300, 320])
def test_ssds_maps_at_each_of_its_sizes(size):
    detector = build("ssd", size=size).eval()
    assert detector.fixed_size == (size, size)
    assert detector.strides == (8, 16, 32, 64, round(size / 3), size)
    assert detector.channels == (512, 1024, 512, 256, 256, 256)
    with torch.no_grad():
        maps = list(detector.features(torch.zeros(1, 3, size, size)).values())
    assert tuple(one.shape[1] for one in maps) == detector.channels
    # The first four round up as a ResNet's pyramid does; the last two are 3 cells and 1.
    sides = [-(-size // stride) for stride in (8, 16, 32, 64)] + [3, 1]
    assert [tuple(one.shape[-2:]) for one in maps] == [(side, side) for side in sides]
    # Default boxes lie where the cells do: 100 and 300 px apart at the paper's size.
    assert detector.anchor_generator.steps == [8, 16, 32, 64, size / 3, size]


@pytest.mark.parametrize(("height", "width", "levels"), [(64, 96, 4), (256, 320, 5), (320, 288, 6), (800, 1344, 6)])
def test_ssd_as_a_teacher_leaves_out_levels_without_a_cell(height, width, levels):
    maps = list(build("ssd").eval().to("meta").features(torch.zeros(1, 3, height, width, device="meta")).values())
    assert len(maps) == levels
    for features, stride in zip(maps, (8, 16, 32, 64), strict=False):
        assert tuple(features.shape[-2:]) == (-(-height // stride), -(-width // stride))


@pytest.mark.parametrize("backbone", ["torchvision/mobilenet_v3_small", "torchvision/mobilenet_v3_large"])
@pytest.mark.parametrize(("height", "width"), [(96, 96), (320, 320), (64, 160)])
def test_ssdlites_maps(backbone, height, width):
    detector = build("ssdlite", backbone=backbone, size=320).eval()
    assert detector.strides == (16, 32, 64, 128, 256, 512)
    with torch.no_grad():
        maps = list(detector.features(torch.zeros(1, 3, height, width)).values())
    assert tuple(one.shape[1] for one in maps) == detector.channels
    expected = [(-(-height // stride), -(-width // stride)) for stride in detector.strides]
    assert [tuple(one.shape[-2:]) for one in maps] == expected


@pytest.mark.parametrize("name", PRESETS)
def test_the_pretrained_preset_is_torchvisions_model(name):
    torch.manual_seed(0)
    theirs = detection.__dict__[name](weights=None, weights_backbone=None, num_classes=91).eval()
    ours = detectors.build(published()[name].config.model_dump(mode="json"), [str(one) for one in range(90)]).eval()
    ours.load_state_dict(theirs.state_dict())  # strict: the released weights have these names
    image = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0))
    for model in (ours, theirs):
        model.score_thresh, model.detections_per_img, model.topk_candidates = 0.0, 50, 10
    with torch.no_grad():
        mine, plain = ours([image])[0], theirs([image])[0]
    assert len(plain["boxes"]) == 50
    assert all(torch.equal(mine[key], plain[key]) for key in ("boxes", "labels", "scores"))


@pytest.mark.parametrize("name", PRESETS)
def test_defaults_are_torchvisions(name):
    with torch.device("meta"):
        theirs = detection.__dict__[name](weights=None, weights_backbone=None)
        ours = detectors.build(published()[name].config.model_dump(mode="json"), CLASSES)
    for attribute in ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates", "neg_to_pos_ratio"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    for attribute in ("min_size", "max_size", "fixed_size", "size_divisible", "image_mean", "image_std"):
        assert getattr(ours.transform, attribute) == getattr(theirs.transform, attribute)
    for attribute in ("aspect_ratios", "scales", "steps"):
        assert getattr(ours.anchor_generator, attribute) == getattr(theirs.anchor_generator, attribute)
    assert str(ours.backbone).replace("VGGPyramid", "") == str(theirs.backbone).replace("SSDFeatureExtractorVGG", "")


@pytest.mark.parametrize("name", PRESETS)
def test_published_weights_load_with_their_classes(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    theirs = detection.__dict__[name](weights=None, weights_backbone=None, num_classes=91).state_dict()
    path = tmp_path / "hub" / "checkpoints" / Path(published()[name].weights["COCO_V1"].url).name
    path.parent.mkdir(parents=True)
    torch.save(theirs, path)
    detector = load_pretrained(name, "COCO_V1")
    ours = detector.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (len(detector.classes), detector.classes[0], detector.classes[-1]) == (90, "person", "toothbrush")


@pytest.mark.parametrize("family", FAMILIES)
def test_selecting_classes_keeps_their_logits_and_boxes(family):
    detector = build(family, ("a", "b", "c", "d"), score_threshold=0.0).eval()
    images, targets = images_and_targets()
    side = detector.config.size
    with torch.no_grad():
        levels = list(detector.features(torch.rand(2, 3, side, side)).values())
        before = detector.head(levels)
        detector.select_classes(["d", "b"])
        after = detector.head(levels)
    torch.testing.assert_close(after["cls_logits"], before["cls_logits"][..., [0, 4, 2]])
    assert torch.equal(after["bbox_regression"], before["bbox_regression"])
    assert detector.classes == ["d", "b"]
    assert {label for found in detector.detect(images) for label in found["labels"].tolist()} == {1, 2}
    detector.train().forward_train(images, targets)  # and it can be trained on


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_detector_comes_back_the_same(family, tmp_path):
    detector = build(family, score_threshold=0.0, max_detections=20).eval()
    detectors.save(detector, tmp_path / "d.safetensors")
    again = detectors.load(tmp_path / "d.safetensors")
    assert (again.config, again.classes, again.strides) == (detector.config, list(CLASSES), detector.strides)
    images, _ = images_and_targets()
    for one, other in zip(detector.detect(images), again.detect(images), strict=True):
        assert len(one["boxes"]) == 20
        assert all(torch.equal(one[key], other[key]) for key in ("boxes", "labels", "scores"))
        assert one["scores"].tolist() == sorted(one["scores"].tolist(), reverse=True)


def test_ssdlite_says_what_one_image_alone_would_do_to_batch_norm():
    images, targets = images_and_targets(count=1)
    detector = build("ssdlite").train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        detector(images, targets)
    with pytest.raises(RunError) as caught:
        detector.forward_train(images, targets)
    assert (caught.value.failure_class, caught.value.code) == ("user", "batch_too_small")
    build("ssdlite", size=544).train().forward_train(images, targets)  # 2 x 2 cells


def test_ssd_starts_from_vggs_convolutions_alone(monkeypatch):
    """The published file has no classifier that could be used, and what it has is not read."""
    torch.manual_seed(1)
    published = {f"features.{name}": value for name, value in make_layers(cfgs["D"]).state_dict().items()}
    published["classifier.0.weight"] = torch.full((4096, 25088), torch.nan)
    monkeypatch.setattr(VGG16_Weights, "get_state_dict", lambda *_args, **_kwargs: published)
    detector = detectors.build(SSD, CLASSES, pretrained_backbone=True)
    theirs = [value for name, value in published.items() if name.startswith("features.") and name.endswith("weight")]
    ours = [layer.weight for layer in detector.backbone.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert len(theirs) == 13
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=False))


@pytest.mark.parametrize(("family", "changes"), [("ssd", {}), ("ssdlite", {"reduced_tail": False})])
def test_imagenet_weights_that_cannot_be_had_say_what_to_do(family, changes, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def _no_network(*_args, **_kwargs):
        raise URLError("Network is unreachable")

    monkeypatch.setattr("torch.hub.download_url_to_file", _no_network)
    with pytest.raises(RunError) as caught:
        detectors.build({**FAMILIES[family], **changes}, CLASSES, pretrained_backbone=True)
    assert (caught.value.failure_class, caught.value.code) == ("infra", "weights_unavailable")
    assert "initial_weights: random" in caught.value.detail


def test_imagenet_weights_do_not_fit_a_reduced_tail():
    with pytest.raises(RunError) as caught:
        detectors.build(SSDLITE, CLASSES, pretrained_backbone=True)
    assert (caught.value.failure_class, caught.value.code) == ("user", "reduced_tail")


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        ("ssd", {"size": 512}, "detector.size"),
        ("ssd", {"strides": [8, 16]}, "strides are what the family has, [8, 16, 32, 64]; got [8, 16]"),
        ("ssd", {"backbone": "torchvision/resnet50"}, "detector.backbone"),
        ("ssd", {"min_size": 300}, "detector.min_size"),
        ("ssdlite", {"size": 300}, "multiple of 32"),
        ("ssdlite", {"backbone": "torchvision/vgg16"}, "detector.backbone"),
        ("ssdlite", {"candidates": 0}, "greater than or equal to 1"),
    ],
)
def test_a_wrong_spec_names_key_and_value(family, change, says):
    with pytest.raises(RunError) as caught:
        build(family, **change)
    assert caught.value.failure_class == "user"
    assert says in caught.value.detail
