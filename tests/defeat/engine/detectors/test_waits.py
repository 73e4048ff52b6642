"""Where a training pass makes the CPU wait for a GPU: for values from it, as often as torchvision; for no copies."""

import copy
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from defeat.engine import detectors
from defeat.engine.data.loading.resize import disable_training_resize
from defeat.engine.detectors import unblocked
from defeat.engine.detectors.precision import WideDefaultBoxes
from defeat.engine.detectors.ssd import ASPECT_RATIOS, SCALES
from defeat.engine.detectors.unblocked import UnblockedBoxCoder, UnblockedTransform
from tests.support.device_waits import Waits, fake_cuda
from tests.support.one_stage import FCOS, RETINANET
from tests.support.ssd import SSD, SSDLITE
from tests.support.training import CLASSES, TINY, images_and_targets

MOBILENET = {"architecture": "faster_rcnn_mobilenet", "pyramid_channels": 16, "min_size": 64, "max_size": 96}
FAMILIES: dict[str, dict[str, Any]] = {
    "faster_rcnn": TINY,
    "faster_rcnn_mobilenet": MOBILENET,
    "mask_rcnn": {**TINY, "architecture": "mask_rcnn", "mask_channels": 8},
    "retinanet": RETINANET,
    "retinanet_giou": {**RETINANET, "box_loss": "giou"},
    "fcos": FCOS,
    "ssd": SSD,
    "ssdlite": SSDLITE,
}
# Waits of a training pass: those of the whole batch, and those of each image. Where one number is set by a mask it
# counts here, and does not wait on a GPU.
PINNED: dict[str, tuple[int, int]] = {
    "faster_rcnn": (5, 17),
    "faster_rcnn_mobilenet": (5, 17),
    "mask_rcnn": (7, 19),
    "retinanet": (0, 9),
    "retinanet_giou": (0, 14),
    "fcos": (12, 2),
    "ssd": (3, 3),
    "ssdlite": (3, 3),
}


@pytest.fixture(autouse=True)
def _constants_of_this_test():
    unblocked._constant.cache_clear()
    yield
    unblocked._constant.cache_clear()  # fake ones must not serve others


def build(spec: dict[str, Any]) -> detectors.Detector:
    torch.manual_seed(0)
    detector = detectors.build(spec, CLASSES).train()
    disable_training_resize(detector)
    return detector


def sample(count: int, detector: detectors.Detector) -> Any:
    """Images of a size that the detector takes as they are, with boxes, and masks if it trains on them."""
    images, targets = images_and_targets(count)
    size = detector.fixed_size or (64, 96)
    images = [torch.nn.functional.interpolate(image[None], size=size)[0] for image in images]
    if detector.trains_masks:
        targets = [{**one, "masks": torch.ones(len(one["boxes"]), *size, dtype=torch.uint8)} for one in targets]
    return images, targets


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("narrow_vgg")
def test_no_family_waits_more_often(family):
    detector = build(FAMILIES[family])
    detector.forward_train(*sample(4, detector))  # some things are found out once
    found = []
    for count in (2, 3, 4):
        torch.manual_seed(0)
        with Waits() as waits:
            detector.forward_train(*sample(count, detector))
        found.append(len(waits.found))
    once, each = PINNED[family]
    assert found == [once + each * count for count in (2, 3, 4)]


class Made(TorchFunctionMode):
    """Counts tensors that are made of Python's numbers on a given device: on a GPU each is a copy that waits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            self.found.append(args[0])
        return func(*args, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("narrow_vgg")
def test_a_training_pass_copies_no_numbers_to_the_device(family):
    detector = build(FAMILIES[family])
    images, targets = sample(3, detector)
    with Made() as first:
        detector.forward_train(images, targets)
    with Made() as second:
        detector.forward_train(images, targets)
    assert len(first.found) > 0  # the constants, once
    assert second.found == []


def transforms(**changes: Any) -> tuple[GeneralizedRCNNTransform, UnblockedTransform]:
    given = {
        "min_size": (64,),
        "max_size": 96,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        **changes,
    }
    theirs = GeneralizedRCNNTransform(**given)
    return theirs, UnblockedTransform(copy.copy(theirs))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("changes", [{}, {"fixed_size": (96, 64)}, {"_skip_resize": True}, {"size_divisible": 8}])
def test_the_transform_is_torchvisions_to_the_last_bit(changes, training):
    theirs, ours = (one.train(training) for one in transforms(**changes))
    settings = ("min_size", "max_size", "image_mean", "image_std", "size_divisible", "fixed_size", "_skip_resize")
    assert [getattr(ours, name) for name in settings] == [getattr(theirs, name) for name in settings]
    images, targets = images_and_targets()
    (expected, scaled), (found, ours_scaled) = theirs(images, targets), ours(images, targets)
    assert torch.equal(found.tensors, expected.tensors)
    assert found.image_sizes == expected.image_sizes
    assert all(torch.equal(mine["boxes"], other["boxes"]) for mine, other in zip(ours_scaled, scaled, strict=True))
    sizes = [(image.shape[-2], image.shape[-1]) for image in images]
    masks = [torch.rand(len(one["boxes"]), 1, 28, 28) for one in targets]
    results = [
        one.postprocess(
            [{"boxes": t["boxes"], "masks": m} for t, m in zip(scaled, masks, strict=True)], found.image_sizes, sizes
        )
        for one in (theirs, ours)
    ]
    for mine, other in zip(*results, strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in ("boxes", "masks"))


def test_the_transform_takes_no_bytes():
    _, ours = transforms()
    with pytest.raises(TypeError, match=r"got torch\.uint8"):
        ours([torch.zeros(3, 8, 8, dtype=torch.uint8)])


def test_constants_of_an_evaluation_serve_in_training():
    _, ours = transforms(_skip_resize=True)
    image = torch.rand(3, 64, 96)
    with torch.inference_mode():
        ours.eval()([image])
    batch, _ = ours.train()([image.requires_grad_()])
    batch.tensors.square().sum().backward()
    assert image.grad is not None


def test_the_transform_copies_nothing_to_the_device():
    _, ours = transforms()
    with fake_cuda() as waits:
        images = [torch.empty(3, 64, 80, device="cuda"), torch.empty(3, 96, 64, device="cuda")]
        ours.eval()(images)
        waits.found.clear()
        batch, _ = ours(images)
        boxes = [{"boxes": torch.empty(5, 4, device="cuda")} for _ in images]
        ours.postprocess(boxes, batch.image_sizes, [(64, 80), (96, 64)])
        assert waits.found == []


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_boxes_are_coded_as_torchvision_codes_them(weights, dtype):
    theirs, ours = BoxCoder(weights), UnblockedBoxCoder(weights)
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 50, 2, generator=generator) * 300
    boxes, anchors = torch.cat([corners, corners + torch.rand(2, 50, 2, generator=generator) * 90 + 1], dim=2)
    codes = (torch.randn(50, 12, generator=generator) * 8).to(dtype)
    assert torch.equal(ours.decode_single(codes, anchors), theirs.decode_single(codes, anchors))
    assert torch.equal(ours.decode(codes, [anchors]), theirs.decode(codes, [anchors]))
    encoded = [one.encode([boxes.to(dtype)], [anchors.to(dtype)])[0] for one in (ours, theirs)]
    assert torch.equal(*encoded)


def test_box_coders_copy_nothing_to_the_device():
    coder = UnblockedBoxCoder((10.0, 10.0, 5.0, 5.0))
    with fake_cuda() as waits:
        boxes = torch.empty(7, 4, device="cuda")
        coder.encode_single(boxes, boxes)
        waits.found.clear()
        coder.decode_single(coder.encode_single(boxes, boxes), boxes)
        assert waits.found == []


def test_default_boxes_are_torchvisions_and_made_once():
    given = {"scales": SCALES, "steps": [8, 16, 32, 64, 100, 300]}
    theirs, ours = DefaultBoxGenerator(ASPECT_RATIOS, **given), WideDefaultBoxes(ASPECT_RATIOS, **given)
    for side in (300, 320, 300):
        batch = ImageList(torch.zeros(2, 3, side, side), [(side, side)] * 2)
        maps = [torch.zeros(2, 4, size, size) for size in (side // 8, side // 16, side // 32, 5, 3, 1)]
        with torch.inference_mode():
            ours(batch, maps)
        assert ours(batch, maps)[0] is ours(batch, maps)[1]
        assert not ours(batch, maps)[0].is_inference()
        for mine, other in zip(ours(batch, maps), theirs(batch, maps), strict=True):
            assert torch.equal(mine, other)
