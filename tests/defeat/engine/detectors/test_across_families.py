"""Whole runs whose teacher and student are of different families, or both one-stage: they share the neck alone."""

from typing import Any

import pytest
import torch

from defeat.engine import detectors, methods
from defeat.engine.report import RunError
from tests.support.one_stage import FAMILIES, FCOS, RETINANET, build
from tests.support.ssd import SSD, SSDLITE
from tests.support.training import CLASSES, TINY, events, images_and_targets, run, shapes, spec, write_run

SCHEDULE = {"epochs": 1, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 2}
NECK_ONLY = {"method": "defeat", "head_object_weight": 0, "head_background_weight": 0, "warmup_steps": 2}
ONE_STAGE_LOSSES = {"loss/classification", "loss/bbox_regression"}
TWO_STAGE_LOSSES = {"loss/classifier", "loss/box_reg", "loss/objectness", "loss/rpn_box_reg"}
MASK: dict[str, Any] = {**TINY, "architecture": "mask_rcnn", "mask_channels": 8}
# A pyramid that is wider than the teacher's, and longer: the pairs are at strides 8 and 16.
WIDER: dict[str, dict[str, Any]] = {
    "faster_rcnn": {"pool_level": True, "pyramid_channels": 32},
    "retinanet": {"extra_levels": "p6p7", "pyramid_channels": 32},
    "fcos": {"extra_levels": "p6p7", "pyramid_channels": 32},
    "ssd": {},
    "ssdlite": {},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    shapes(root, train=8, val=2)
    return root / "canonical"


@pytest.mark.parametrize(
    ("teacher", "student", "own_losses"),
    [
        pytest.param(TINY, RETINANET, ONE_STAGE_LOSSES, id="faster_rcnn-to-retinanet"),
        pytest.param(RETINANET, RETINANET, ONE_STAGE_LOSSES, id="retinanet-to-retinanet"),
        pytest.param(RETINANET, TINY, TWO_STAGE_LOSSES, id="retinanet-to-faster_rcnn"),
        pytest.param(TINY, FCOS, ONE_STAGE_LOSSES | {"loss/bbox_ctrness"}, id="faster_rcnn-to-fcos"),
        pytest.param(TINY, SSD, ONE_STAGE_LOSSES, id="faster_rcnn-to-ssd"),
        pytest.param(SSD, TINY, TWO_STAGE_LOSSES, id="ssd-to-faster_rcnn"),
        pytest.param(TINY, SSDLITE, ONE_STAGE_LOSSES, id="faster_rcnn-to-ssdlite"),
        pytest.param(SSDLITE, TINY, TWO_STAGE_LOSSES, id="ssdlite-to-faster_rcnn"),
    ],
)
@pytest.mark.usefixtures("narrow_vgg")
def test_a_student_learns_from_the_neck_of_another_family(teacher, student, own_losses, dataset, tmp_path):
    student = {**student, **WIDER[student["architecture"]], "score_threshold": 0.0}
    job = spec(
        teacher={"source": "train", "detector": teacher, "initial_weights": "random", "schedule": SCHEDULE},
        student={"detector": student, "initial_weights": "random"},
        distillation=NECK_ONLY,
        schedule=SCHEDULE,
    )
    directory = write_run(tmp_path / "run", dataset, job)
    result = run(directory)
    assert result["status"] == "succeeded", result
    assert {"teacher", "student"} == result["results"].keys()

    logged = [one["values"] for one in events(directory, "metrics") if one["subject"] == "student"]
    losses = {name for name in logged[-1] if name.startswith("loss/")}
    assert losses == own_losses | {"loss/total", "loss/neck_object", "loss/neck_background"}
    assert logged[-1]["loss/neck_object"] > 0
    assert logged[-1]["loss/neck_background"] > 0

    loaded = detectors.load(directory / "artifacts" / "student-best.safetensors")
    assert type(loaded) is type(detectors.build(student, CLASSES))
    assert loaded.classes == list(CLASSES)
    found = loaded.detect(images_and_targets()[0])
    assert all(len(one["boxes"]) > 0 and set(one["labels"].tolist()) <= {1, 2} for one in found)


@pytest.mark.parametrize(("teacher", "student"), [(MASK, TINY), (TINY, MASK)], ids=["teacher", "student"])
def test_a_mask_rcnn_teaches_and_learns_by_neck_and_head(teacher, student, dataset, tmp_path):
    job = spec(
        teacher={"source": "train", "detector": teacher, "initial_weights": "random", "schedule": SCHEDULE},
        student={"detector": {**student, "pyramid_channels": 8}, "initial_weights": "random"},
        distillation={"method": "defeat", "proposals": "both", "warmup_steps": 2},
        schedule=SCHEDULE,
    )
    directory = write_run(tmp_path / "run", dataset, job)
    result = run(directory)
    assert result["status"] == "succeeded", result
    last = [one["values"] for one in events(directory, "metrics") if one["subject"] == "student"][-1]
    parts = {"loss/neck_object", "loss/neck_background", "loss/head_object", "loss/head_background"}
    assert {name for name in last if name.startswith("loss/")} == TWO_STAGE_LOSSES | parts | {"loss/total"}
    assert all(last[name] > 0 for name in parts)
    loaded = detectors.load(directory / "artifacts" / "student-best.safetensors")
    assert loaded.config.architecture == student["architecture"]


@pytest.mark.usefixtures("narrow_vgg")
def test_unequal_maps_at_the_students_size_are_refused_before_training():
    """At 300 px ConvNeXt's maps are 37 cells wide at stride 8, SSD's 38; ResNet's and MobileNet's are 38 too."""
    torch.manual_seed(0)
    teachers = {name: {**TINY, "backbone": name} for name in ("timm/convnext_atto", "torchvision/resnet18")}
    down, up = (detectors.build(teacher, CLASSES) for teacher in teachers.values())
    student = detectors.build(SSD, CLASSES)
    methods.build(NECK_ONLY, student, up)
    with pytest.raises(RunError) as caught:
        methods.build(NECK_ONLY, student, down)
    assert (caught.value.failure_class, caught.value.code) == ("user", "maps_do_not_pair")
    assert "at stride 8 is 38 x 38, the teacher's 37 x 37" in caught.value.detail
    methods.build(NECK_ONLY, detectors.build({**SSD, "size": 320}, CLASSES), down)
    methods.build(NECK_ONLY, down, student)  # its batches are multiples of 32


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("who", ["student", "teacher", "student and teacher"])
def test_the_head_part_is_refused_where_a_detector_has_no_proposals(family, who):
    torch.manual_seed(0)
    pair = {name: build(family) if name in who else detectors.build(TINY, CLASSES) for name in ("student", "teacher")}
    for weights in ({}, {"head_object_weight": 0}, {"head_background_weight": 0}):
        with pytest.raises(RunError) as caught:
            methods.build({"method": "defeat", **weights}, pair["student"], pair["teacher"])
        assert (caught.value.failure_class, caught.value.code) == ("user", "head_does_not_pair")
        assert f"this job's {who}, has none: set head_object_weight" in caught.value.detail
    methods.build(NECK_ONLY, pair["student"], pair["teacher"])


def test_a_run_refuses_a_head_part_before_it_trains_the_teacher(dataset, tmp_path):
    directory = write_run(tmp_path / "run", dataset, spec(student={"detector": RETINANET}))
    failure = run(directory)["failure"]
    assert (failure["class"], failure["code"]) == ("user", "head_does_not_pair")
    assert "head_background_weight to 0" in failure["detail"]
    assert not events(directory, "metrics")


@pytest.mark.parametrize("name", ["faster_rcnn", *FAMILIES])
def test_a_family_provides_what_it_says(name):
    detector = detectors.build({**FAMILIES, "faster_rcnn": TINY}[name], CLASSES).train()
    assert detectors.DETECTORS[name].provides == detector.provides
    passed = detector.forward_train(*images_and_targets())
    given = {"backbone": passed.backbone, "anchors": passed.anchors, "logits": passed.cell_logits}
    assert {part for part, value in given.items() if value is not None} == set(detector.provides)
    maps = detector.eval().maps(passed.images)
    assert {stride: one.shape[1] for stride, one in maps.backbone.items()} == detector.backbone_channels
    maps_again = detector.features(passed.images)
    assert maps_again.keys() == maps.features.keys()
    assert all(torch.equal(one, maps_again[level]) for level, one in maps.features.items())
    again = detector.cell_logits(maps.features)
    assert [one.shape for one in again] == [one.shape for one in passed.cell_logits]
    assert all(tuple(one.shape[1:3]) == detector.scores_per_cell for one in again)
