"""Teachers that do not fit the student or the dataset are refused when a job is sent, with what would fit."""

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.db import Database
from app.specs.catalog import Catalog, load_catalog
from app.specs.levels import strides_of
from app.specs.methods import check_methods
from app.specs.pairing import pair_problems
from app.specs.validation import check_detector
from tests.app.conftest import ONE_DATABASE, Tenant
from tests.support import rows as seed

Detector = dict[str, Any]


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog()


def detector(catalog: Catalog, architecture: str, **values: Any) -> Detector:
    own = {} if architecture in ("ssd", "ssdlite", "faster_rcnn_mobilenet") else {"backbone": "torchvision/resnet18"}
    section = check_detector(catalog, {"architecture": architecture, **own, **values}, ())
    assert section.value is not None, section.problems
    return section.value


def refusals(
    catalog: Catalog, method: dict[str, Any] | str, student: Detector, teacher: Detector, *, free: bool = False
) -> dict[str, str]:
    """Details by code of what one method refuses; DeFeat's without its head."""
    spec = {"method": method} if isinstance(method, str) else method
    if spec["method"] == "defeat":
        spec = {"head_object_weight": 0, "head_background_weight": 0} | spec
    chosen, problems = check_methods(catalog, spec, ("distillation",))
    assert not problems
    found = pair_problems(catalog, chosen, student, teacher, teacher_is_free=free)
    return {item["code"]: item["detail"] for item in found}


@pytest.mark.parametrize(
    ("architecture", "values", "strides"),
    [
        ("faster_rcnn", {}, [4, 8, 16, 32, 64]),
        ("faster_rcnn", {"strides": [8, 16], "pool_level": False}, [8, 16]),
        ("retinanet", {}, [8, 16, 32, 64, 128]),
        ("fcos", {"strides": [16], "extra_levels": "none"}, [16]),
    ],
)
def test_a_pyramids_strides_count_its_extra_levels(catalog, architecture, values, strides):
    assert strides_of(catalog, detector(catalog, architecture, **values)) == strides


def test_pyramids_may_meet_in_an_extra_level(catalog):
    student = detector(catalog, "faster_rcnn", strides=[4, 8, 16])  # and 32, by subsampling
    assert refusals(catalog, "fitnet", student, detector(catalog, "retinanet", strides=[32])) == {}


FINE = {"strides": [4], "pool_level": False}
PLAIN = {"strides": [8], "extra_levels": "none"}


@pytest.mark.parametrize(
    ("student", "teacher", "free", "remedy"),
    [
        (("faster_rcnn", FINE), ("ssdlite", {}), False, "set student.detector.strides to [16, 32]"),
        (("faster_rcnn", {"strides": [4]}), ("faster_rcnn_mobilenet", {}), False, "student.detector.strides to [32]"),
        (("faster_rcnn", FINE), ("ssd", {}), False, "set student.detector.strides to [8, 16, 32]"),
        (("fcos", PLAIN), ("faster_rcnn_mobilenet", {}), False, "set student.detector.strides to [32]"),
        (("ssdlite", {}), ("faster_rcnn", {"strides": [4]}), True, "set teacher.detector.strides to [16, 32]"),
        (("ssdlite", {}), ("faster_rcnn", {"strides": [4]}), False, "take a student of faster_rcnn"),
        (("faster_rcnn", {"strides": [4]}), ("retinanet", {"strides": [16]}), True, "student.detector.strides to [16"),
    ],
)
def test_pyramids_apart_are_told_which_strides_would_do(catalog, student, teacher, free, remedy):
    student, teacher = (detector(catalog, name, **values) for name, values in (student, teacher))
    (detail,) = refusals(catalog, "fitnet", student, teacher, free=free).values()
    assert (
        f"has strides {strides_of(catalog, student)}, the teacher's {strides_of(catalog, teacher)}: none in common"
        in detail
    )
    assert remedy in detail


def test_what_a_family_does_not_take_is_not_proposed(catalog):
    """FCOS wants multiples of 32: another one must move, the teacher if it may, or the family, or the method."""
    student = detector(catalog, "fcos", pyramid_channels=64)
    teacher = detector(catalog, "retinanet", pyramid_channels=40)
    (free,) = refusals(catalog, "pkd", student, teacher, free=True).values()
    assert "64 channels, the teacher's 40" in free
    assert "take a method that adapts them (cwd, defeat" in free
    assert free.endswith("or set teacher.detector.pyramid_channels to 64")
    (fixed,) = refusals(catalog, "pkd", student, teacher).values()
    assert fixed.endswith("or take a student of faster_rcnn with pyramid_channels 40")
    (other,) = refusals(catalog, "pkd", teacher, student).values()
    assert other.endswith("or set student.detector.pyramid_channels to 64")
    assert refusals(catalog, "pkd", student, student) == {}


@pytest.mark.parametrize("family", ["ssd", "ssdlite"])
def test_channels_that_no_spec_names_are_known(catalog, family):
    own, other = detector(catalog, family), detector(catalog, "retinanet")
    assert refusals(catalog, "pkd", own, own) == {}
    assert set(refusals(catalog, "pkd", own, other)) == {"channels_differ"}
    assert set(refusals(catalog, "pkd", other, own)) == {"channels_differ"}


@pytest.mark.parametrize(
    ("student", "teacher", "remedy"),
    [
        (("retinanet", {}), ("fcos", {}), "take a student of fcos"),
        (("retinanet", {"anchor_octaves": 1}), ("retinanet", {}), "set student.detector.anchor_octaves to 3"),
        (("retinanet", {"anchor_scale": 2}), ("retinanet", {}), "set student.detector.anchor_scale to 4.0"),
        (("faster_rcnn", {"anchor_ratios": [1, 2, 3]}), ("mask_rcnn", {}), "anchor_ratios to [0.5, 1.0, 2.0]"),
        (("retinanet", {"anchor_octaves": 1, "anchor_ratios": [1], "anchor_scale": 1}), ("fcos", {}), "of fcos"),
    ],
)
def test_logits_of_unlike_anchors_do_not_pair(catalog, student, teacher, remedy):
    student, teacher = (detector(catalog, name, **values) for name, values in (student, teacher))
    found = refusals(catalog, "frs", student, teacher)
    assert set(found) == {"logits_do_not_pair"}
    assert "set it to 0, or" in found["logits_do_not_pair"]
    assert remedy in found["logits_do_not_pair"]
    assert refusals(catalog, {"method": "frs", "logits_weight": 0}, student, teacher) == {}
    assert refusals(catalog, "frs", student, student) == {}


def test_backbones_pair_by_their_strides(catalog):
    method = {"method": "defeat", "backbone_object_weight": 1}
    student, teacher = detector(catalog, "faster_rcnn", strides=[4, 8]), detector(catalog, "retinanet", strides=[16])
    found = refusals(catalog, method, student, teacher)
    assert set(found) == {"backbones_do_not_pair"}
    assert "the student's provides [4, 8], the teacher's [16]" in found["backbones_do_not_pair"]
    assert "set it to 0, or set student.detector.strides to [16" in found["backbones_do_not_pair"]
    assert refusals(catalog, method, student | {"strides": [8, 16]}, teacher) == {}


def test_maps_that_are_rounded_unlike_do_not_pair(catalog):
    student = detector(catalog, "ssd")
    teacher = detector(catalog, "retinanet", backbone="torchvision/convnext_tiny")
    found = refusals(catalog, "fitnet", student, teacher)
    assert set(found) == {"maps_do_not_pair"}
    assert (
        "at stride 8 is 38 cells wide, that of the teacher's torchvision/convnext_tiny 37" in found["maps_do_not_pair"]
    )
    assert found["maps_do_not_pair"].endswith("set student.detector.size to 288")
    assert refusals(catalog, "fitnet", student | {"size": 320}, teacher) == {}
    assert refusals(catalog, "fitnet", student, detector(catalog, "retinanet")) == {}


def test_heads_apart_name_who_has_no_proposals(catalog):
    method = {"method": "defeat", "head_object_weight": 1}
    two, one = detector(catalog, "faster_rcnn"), detector(catalog, "retinanet")
    assert refusals(catalog, method, two, two) == {}
    (detail,) = refusals(catalog, method, two, one).values()
    assert detail.startswith("head_object_weight compares proposals, and the teacher (retinanet) is a one-stage")
    assert "set it to 0, or take a two-stage teacher (faster_rcnn" in detail
    (detail,) = refusals(catalog, method, one, one).values()
    assert "the student (retinanet) and the teacher (retinanet) are" in detail
    assert "two-stage student and teacher" in detail


# ---- the same, as jobs are sent ----


def send(api: TestClient, dataset_id: str, **parts: Any) -> Any:
    small = {"architecture": "faster_rcnn", "backbone": "timm/mobilenetv3_small_050"}
    spec = {"name": "x", "dataset": dataset_id, "student": {"detector": small}, "distillation": {"method": "defeat"}}
    return api.post("/v1/jobs/validate", json=spec | parts)


@ONE_DATABASE
def test_a_class_map_is_kept_in_the_spec(api: TestClient, database: Database, alice: Tenant):
    row = seed.dataset(database, alice.id, classes=["auto", "person"])
    weights = seed.checkpoint(database, alice.id)
    for teacher in (
        {"source": "checkpoint", "id": weights.id},
        {"source": "pretrained", "detector": "fasterrcnn_resnet50_fpn", "weights": "COCO_V1"},
    ):
        answer = send(api, row.id, teacher=teacher)
        assert (answer.status_code, answer.json()["code"]) == (422, "teacher_classes_differ")
        answer = send(api, row.id, teacher=teacher | {"class_map": {"auto": "car"}})
        assert answer.status_code == 200, answer.text
        assert answer.json()["spec"]["teacher"]["class_map"] == {"auto": "car"}


@ONE_DATABASE
@pytest.mark.parametrize(
    ("class_map", "place", "code"),
    [
        ({"auto": "person"}, "/teacher/class_map/auto", "class_map_not_one_to_one"),
        ({"auto": "cat"}, "/teacher/class_map/auto", "unknown_class"),
        ({"auto": 5}, "/teacher/class_map/auto", "validation_failed"),
        ({"auto": "x" * 201}, "/teacher/class_map/auto", "validation_failed"),
        (["auto"], "/teacher/class_map", "validation_failed"),
    ],
)
def test_a_wrong_class_map_is_refused(api: TestClient, database: Database, alice: Tenant, class_map, place, code):
    row = seed.dataset(database, alice.id, classes=["auto", "person"])
    weights = seed.checkpoint(database, alice.id)
    answer = send(api, row.id, teacher={"source": "checkpoint", "id": weights.id, "class_map": class_map})
    assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text
    assert place in {item["pointer"] for item in answer.json()["errors"]}


@ONE_DATABASE
def test_a_teacher_that_is_trained_has_no_class_map(api: TestClient, database: Database, alice: Tenant):
    row = seed.dataset(database, alice.id)
    teacher = {"architecture": "faster_rcnn", "backbone": "timm/resnet10t"}
    answer = send(api, row.id, teacher={"source": "train", "detector": teacher, "class_map": {}})
    assert [(e["pointer"], e["code"]) for e in answer.json()["errors"]] == [("/teacher/class_map", "unknown_key")]


@pytest.fixture
def with_all_families(app) -> Iterator[None]:
    small = app.dependency_overrides.pop(load_catalog)
    yield
    app.dependency_overrides[load_catalog] = small


SSDLITE = {"architecture": "ssdlite"}
RESNET = {"architecture": "retinanet", "backbone": "torchvision/resnet18"}
TAIL = ("detector/reduced_tail", "reduced_tail")


@ONE_DATABASE
@pytest.mark.usefixtures("with_all_families")
@pytest.mark.parametrize(
    ("detector", "initial_weights", "schedule", "gpus", "errors"),
    [
        (SSDLITE, "imagenet", {}, 1, [TAIL]),
        (SSDLITE, "random", {}, 1, []),
        (SSDLITE | {"reduced_tail": False}, "imagenet", {}, 1, []),
        (RESNET, "imagenet", {}, 1, []),
        (SSDLITE, "random", {"batch_size": 1}, 1, [("schedule/batch_size", "batch_too_small")]),
        (SSDLITE, "random", {"batch_size": 4, "accumulation": 4}, 1, [("schedule/batch_size", "batch_too_small")]),
        (SSDLITE, "random", {"batch_size": 8, "accumulation": 2}, 4, [("schedule/batch_size", "batch_too_small")]),
        (SSDLITE, "random", {"batch_size": 8, "accumulation": 2}, 2, []),
        (SSDLITE | {"size": 512}, "random", {"batch_size": 1}, 1, [("schedule/batch_size", "batch_too_small")]),
        (SSDLITE | {"size": 544}, "random", {"batch_size": 1}, 1, []),
        ({"architecture": "ssd"}, "random", {"batch_size": 1}, 1, []),
        (RESNET, "random", {"batch_size": 1, "frozen_stages": 4}, 1, []),
        *(
            ({"architecture": family}, "random", {"frozen_stages": 1}, 1, [stages])
            for family in ("ssd", "ssdlite", "faster_rcnn_mobilenet")
            for stages in [("schedule/frozen_stages", "stages_cannot_freeze")]
        ),
        (
            SSDLITE,
            "imagenet",
            {"batch_size": 1, "frozen_stages": 2},
            1,
            [TAIL, ("schedule/frozen_stages", "stages_cannot_freeze"), ("schedule/batch_size", "batch_too_small")],
        ),
    ],
)
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_what_cannot_be_trained_is_refused(
    api: TestClient, database: Database, alice: Tenant, whose, detector, initial_weights, schedule, gpus, errors
):
    row = seed.dataset(database, alice.id)
    part = {"detector": detector, "initial_weights": initial_weights}
    if whose == "student":
        body = {"student": part, "teacher": None, "distillation": {"method": "baseline"}, "schedule": schedule}
        places = [place if place.startswith("schedule") else f"student/{place}" for place, _ in errors]
    else:
        body = {"teacher": {"source": "train", **part, "schedule": schedule}, "student": {"detector": RESNET}}
        body |= {"distillation": {"method": "baseline"}, "schedule": {"batch_size": 8}}
        places = [f"teacher/{place}" for place, _ in errors]
    answer = send(api, row.id, **body, resources={"gpus": gpus})
    codes = [code for _, code in errors]
    if not errors:
        assert answer.status_code == 200, answer.text
        return
    assert answer.status_code == 422
    found = [(item["pointer"], item["code"]) for item in answer.json()["errors"]]
    assert sorted(found) == sorted(zip([f"/{place}" for place in places], codes, strict=True))
    assert answer.json()["code"] == (codes[0] if len(codes) == 1 else "validation_failed")


@ONE_DATABASE
@pytest.mark.usefixtures("with_all_families")
@pytest.mark.parametrize(
    ("change", "errors", "code"),
    [
        ({"schedule": {"batch_size": 10}}, [], None),
        ({"schedule": {"batch_size": 11}}, [("/schedule/batch_size", "too_few_images")], "too_few_images"),
        ({"augmentation": {"scale_min": 0.5}}, [("/augmentation/scale_min", "fixed_input_size")], "fixed_input_size"),
        ({"augmentation": {"scale_max": 2}}, [("/augmentation/scale_max", "fixed_input_size")], "fixed_input_size"),
        ({"augmentation": {"scale_min": 0.5}, "student": {"detector": RESNET}}, [], None),
        ({"augmentation": {"scale_max": 0}}, [("/augmentation/scale_max", "out_of_range")], "validation_failed"),
    ],
)
def test_images_that_cannot_be_trained_on_are_refused(api, database: Database, alice: Tenant, change, errors, code):
    row = seed.dataset(database, alice.id, splits={name: {"images": 10, "boxes": 20} for name in ("train", "val")})
    body = {"student": {"detector": SSDLITE}, "teacher": None, "distillation": {"method": "baseline"}}
    answer = send(api, row.id, **{**body, "schedule": {"batch_size": 2}, **change})
    assert [(item["pointer"], item["code"]) for item in answer.json().get("errors", [])] == errors
    assert answer.json().get("code") == code


@ONE_DATABASE
def test_channels_that_differ_are_refused_by_methods_that_compare_them(app, api, database: Database, alice: Tenant):
    app.dependency_overrides[load_catalog], small = load_catalog, app.dependency_overrides[load_catalog]
    try:
        row = seed.dataset(database, alice.id)
        teacher = {"architecture": "retinanet", "backbone": "torchvision/resnet50", "pyramid_channels": 256}
        student = {"architecture": "retinanet", "backbone": "torchvision/resnet18", "pyramid_channels": 64}
        parts = {"teacher": {"source": "train", "detector": teacher}, "student": {"detector": student}}
        answer = send(api, row.id, **parts, distillation={"method": "pkd"})
        assert (answer.status_code, answer.json()["code"]) == (422, "channels_differ")
        assert answer.json()["errors"][0]["pointer"] == "/student/detector/pyramid_channels"
        assert send(api, row.id, **parts, distillation={"method": "fitnet"}).status_code == 200
        student["pyramid_channels"] = 256
        assert send(api, row.id, **parts, distillation={"method": "pkd"}).status_code == 200
        answer = send(api, row.id, **parts, distillation={"method": "defeat"})
        places = [item["pointer"] for item in answer.json()["errors"]]
        assert places == ["/distillation/head_object_weight", "/distillation/head_background_weight"]
        assert answer.json()["code"] == "head_does_not_pair"
    finally:
        app.dependency_overrides[load_catalog] = small
