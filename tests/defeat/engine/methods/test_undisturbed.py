"""A distillation adds: whatever the method, the student's own half of a step is that of torchvision's plain call."""

import copy
from functools import cache

import pytest
import torch
from torchvision.models import vgg

from defeat.engine import detectors, methods
from defeat.engine.methods import METHODS
from tests.defeat.engine.detectors.test_mask_rcnn import with_masks
from tests.support.methods import START
from tests.support.one_stage import FCOS, RETINANET
from tests.support.ssd import NARROW_VGG, SSD, SSDLITE
from tests.support.training import CLASSES, TINY, images_and_targets

SEED = 3
# The student and the teacher of each family, with batch norm wherever a family can have one.
PAIRS = {
    "faster_rcnn": (TINY, TINY),
    "convolutional": ({**TINY, "box_head": "convolutional", "pyramid_batch_norm": True}, TINY),
    "mask_rcnn": ({**TINY, "architecture": "mask_rcnn", "mask_channels": 8, "mask_batch_norm": True}, TINY),
    "retinanet": (RETINANET, RETINANET),
    "fcos": (FCOS, FCOS),
    "ssd": ({**SSD, "size": 288}, RETINANET),
    "ssdlite": (SSDLITE, RETINANET),
}
TWO_STAGE = ("faster_rcnn", "convolutional", "mask_rcnn")
SPECS = {
    **{name: {"method": name} for name in METHODS},
    **{f"defeat-{whose}": {"method": "defeat", "proposals": whose} for whose in ("teacher", "both")},
    "defeat-auto": {"method": "defeat", "weights": "auto", "proposals": "both"},
    "defeat-backbone": {"method": "defeat", "backbone_object_weight": 1.0, "backbone_background_weight": 1.0},
}
HEADLESS = {"head_object_weight": 0, "head_background_weight": 0}
# What the constructors refuse, each with a test of its own.
REFUSED = {
    *(("fgfi", family) for family in ("fcos", "ssd", "ssdlite")),
    *(("pkd", family) for family in ("ssd", "ssdlite")),
    *(("defeat-backbone", family) for family in ("ssd", "ssdlite")),
}


def spec_for(name, family):
    """The method's spec for the family, without the parts that it has not got; None where it has none of it."""
    spec = SPECS[name]
    if (name, family) in REFUSED or (spec.get("proposals") and family not in TWO_STAGE):
        return None
    if spec["method"] == "defeat" and family not in TWO_STAGE:
        return {**spec, **HEADLESS}
    return {**spec, "logits_weight": 0} if name == "frs" and family in ("ssd", "ssdlite") else spec


CASES = [(name, family) for family in PAIRS for name in SPECS if spec_for(name, family) is not None]


@pytest.fixture(scope="module", autouse=True)
def _narrow_vgg():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vgg.cfgs, "D", NARROW_VGG)
        yield


@cache
def pair_of(family):
    torch.manual_seed(0)
    student, teacher = (detectors.build(spec, CLASSES) for spec in PAIRS[family])
    return student.train(), teacher.eval().requires_grad_(False)


def batch_for(family):
    return with_masks(SEED) if family == "mask_rcnn" else images_and_targets(seed=SEED)


def half_a_step(student, losses):
    """Losses, gradients and buffers once the student's own losses went backward."""
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: one.grad for name, one in student.named_parameters() if one.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients, dict(student.named_buffers())


@cache
def plain(family):
    student = copy.deepcopy(pair_of(family)[0])
    torch.manual_seed(SEED)
    return half_a_step(student, student(*batch_for(family)))


@pytest.mark.parametrize(("name", "family"), CASES, ids=lambda one: one)
def test_losses_gradients_and_buffers_are_those_of_the_plain_call(name, family):
    student, teacher = copy.deepcopy(pair_of(family))
    method = methods.build(spec_for(name, family), student, teacher)
    torch.manual_seed(SEED)
    passed = student.forward_train(*batch_for(family))
    added = method(passed, teacher, START)
    assert bool(added) == (name != "baseline")
    assert student.training
    assert all(parameter.grad is None for parameter in student.parameters())
    for ours, theirs in zip(half_a_step(student, passed.losses), plain(family), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("family", PAIRS)
def test_the_plain_call_moves_what_is_compared(family):
    """What never changed would be equal whatever a method did to it."""
    _, gradients, buffers = plain(family)
    assert sum(gradient.abs().sum().item() for gradient in gradients.values()) > 0
    before = dict(pair_of(family)[0].named_buffers())
    moved = [key for key in buffers if not torch.equal(before[key], buffers[key])]
    assert any("running_mean" in key for key in moved) == (family != "ssd")  # VGG has no batch norm
    assert any("roi_heads.box_head" in key for key in moved) == (family == "convolutional")
