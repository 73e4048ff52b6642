"""A batch normalised for the student, as the teacher would have normalised it."""

import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from defeat.engine import detectors
from defeat.engine.detectors.base import Maps
from defeat.engine.detectors.normalization import Normalization, renormalize
from defeat.engine.methods.base import TeacherPass
from tests.support.methods import one_pass
from tests.support.ssd import SSDLITE
from tests.support.training import CLASSES, TINY, images_and_targets

IMAGENET = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HALVES = Normalization(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
CAFFE = Normalization(mean=(0.48235, 0.45882, 0.40784), std=(1 / 255, 1 / 255, 1 / 255))
NAMES = {"imagenet": IMAGENET, "halves": HALVES, "caffe": CAFFE}


def batch(normalization):
    """Images of unequal sizes, padded to one of 96 x 128, by torchvision's own transform."""
    transform = GeneralizedRCNNTransform(64, 96, list(normalization.mean), list(normalization.std)).eval()
    made, _ = transform(images_and_targets()[0])
    return made.tensors, made.image_sizes


@pytest.mark.parametrize("given", NAMES)
@pytest.mark.parametrize("wanted", NAMES)
def test_it_is_what_the_other_transform_would_have_made(given, wanted):
    images, sizes = batch(NAMES[given])
    expected, _ = batch(NAMES[wanted])
    ours = renormalize(images, sizes, given=NAMES[given], wanted=NAMES[wanted])
    if given == wanted:
        assert ours is images
    scale = expected.abs().max()
    torch.testing.assert_close(ours / scale, expected / scale, rtol=1e-5, atol=1e-6)
    # Padding is zero in every detector's batches; the mean's own value would be something else.
    padded = torch.ones_like(images, dtype=torch.bool)
    for one, (height, width) in zip(padded, sizes, strict=True):
        one[:, :height, :width] = False
    assert padded.any()
    assert (ours[padded] == 0).all()


def test_it_is_exact_against_plain_numbers():
    images, sizes = batch(IMAGENET)
    ours = renormalize(images, sizes, given=IMAGENET, wanted=CAFFE)
    for image, (height, width) in enumerate(sizes):
        for channel in range(3):
            for row, column in ((0, 0), (height - 1, width - 1), (height // 2, width // 3)):
                value = images[image, channel, row, column].item()
                plain = (value * IMAGENET.std[channel] + IMAGENET.mean[channel] - CAFFE.mean[channel]) * 255
                assert ours[image, channel, row, column].item() == pytest.approx(plain, rel=1e-5, abs=1e-4)


def test_the_given_batch_is_left_alone():
    images, sizes = batch(IMAGENET)
    before = images.clone()
    renormalize(images, sizes, given=IMAGENET, wanted=HALVES)
    assert torch.equal(images, before)


@pytest.mark.parametrize(("student", "teacher"), [(TINY, SSDLITE), (SSDLITE, TINY)], ids=["to-halves", "to-imagenet"])
def test_a_teacher_sees_the_students_batch_as_it_is_used_to(student, teacher, monkeypatch):
    torch.manual_seed(0)
    student, teacher = detectors.build(student, CLASSES).train(), detectors.build(teacher, CLASSES).eval()
    assert {student.normalization, teacher.normalization} == {IMAGENET, HALVES}
    passed = one_pass(student)
    seen = []
    monkeypatch.setattr(teacher, "maps", lambda images: seen.append(images) or Maps(features={}, backbone=None))
    assert TeacherPass(teacher, passed).features == {}
    teacher.transform.min_size, teacher.transform.max_size = student.transform.min_size, student.transform.max_size
    teacher.transform.fixed_size = student.transform.fixed_size
    teacher.transform.size_divisible = student.transform.size_divisible
    expected, _ = teacher.transform(images_and_targets(seed=0)[0])
    torch.testing.assert_close(seen[0], expected.tensors, rtol=1e-5, atol=1e-5)


def test_a_teacher_with_the_same_normalization_sees_the_very_same_tensor(monkeypatch):
    torch.manual_seed(0)
    student, teacher = detectors.build(TINY, CLASSES).train(), detectors.build(TINY, CLASSES).eval()
    passed = one_pass(student)
    seen = []
    monkeypatch.setattr(teacher, "maps", lambda images: seen.append(images) or Maps(features={}, backbone=None))
    assert TeacherPass(teacher, passed).features == {}
    assert seen[0] is passed.images
