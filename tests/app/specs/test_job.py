"""What `POST /v1/jobs/validate` takes, fills in and refuses."""

import copy
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.db import Database
from app.models import Dataset, Job
from app.request_models import pointer
from app.specs.catalog import Catalog, load_catalog
from app.specs.validation import check, check_detector, complete, unknown_choice
from defeat.rules import show
from tests.app.conftest import ONE_DATABASE, RecordingQueue, Tenant
from tests.support import rows as seed
from tests.support.catalog import BACKBONES, CATALOG, TEACHER_DETECTOR


@pytest.fixture
def dataset(database: Database, alice: Tenant) -> Dataset:
    return seed.dataset(database, alice.id)


@pytest.fixture
def spec(dataset: Dataset) -> dict[str, Any]:
    """The smallest spec with a teacher."""
    return {
        "name": "cells-small",
        "dataset": dataset.id,
        "teacher": {"source": "train", "detector": {"architecture": "faster_rcnn", "backbone": "timm/resnet10t"}},
        "student": {"detector": {"architecture": "faster_rcnn", "backbone": "timm/mobilenetv3_small_050"}},
        "distillation": {"method": "defeat"},
    }


def _with(spec: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return the spec with `value` at the dotted path; `...` deletes."""
    changed = copy.deepcopy(spec)
    *way, last = path.split(".")
    place = changed
    for key in way:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return changed


def _errors(api: TestClient, body: Any, status: int = 422) -> list[tuple[str, str]]:
    answer = api.post("/v1/jobs/validate", json=body)
    assert answer.status_code == status, answer.text
    return sorted((item["pointer"], item["code"]) for item in answer.json()["errors"])


def test_every_default_is_filled_in(api: TestClient, database: Database, queue: RecordingQueue, spec, dataset):
    answer = api.post("/v1/jobs/validate", json=spec)
    assert answer.status_code == 200, answer.text
    full = {"strides": [4, 8, 16, 32], "pyramid_channels": 256, "batch_norm_epsilon": None}
    assert answer.json()["spec"] == {
        "name": "cells-small",
        "labels": {},
        "dataset": dataset.id,
        "teacher": {
            "source": "train",
            "detector": {"architecture": "faster_rcnn", "backbone": "timm/resnet10t"} | full,
            "initial_weights": "random",
            "schedule": {"epochs": 12, "batch_size": 8, "accumulation": 1},
        },
        "student": {
            "detector": {"architecture": "faster_rcnn", "backbone": "timm/mobilenetv3_small_050"} | full,
            "initial_weights": "random",
        },
        "distillation": {"method": "defeat", "neck_object_weight": 4.0, "temperature": 1.0, "mask": "paper"},
        "schedule": {"epochs": 12, "batch_size": 8, "accumulation": 1},
        "evaluation": {"split": "val", "every_epochs": 1},
        "augmentation": {"horizontal_flip": 0.5, "scale_min": 1.0, "scale_max": 1.0},
        "resources": {"gpus": 1, "gpu_memory_gb": None, "label": None},
        "seed": 0,
    }
    assert queue.sent == []
    with database.read() as session:
        assert session.query(Job).count() == 0


def test_a_resolved_spec_resolves_to_itself(api: TestClient, database: Database, alice: Tenant, spec):
    checkpoint = seed.checkpoint(database, alice.id)
    for teacher in (
        spec["teacher"],
        {"source": "checkpoint", "id": checkpoint.id},
        {"source": "pretrained", "detector": "fasterrcnn_resnet50_fpn", "weights": "COCO_V1"},
    ):
        resolved = api.post("/v1/jobs/validate", json=_with(spec, "teacher", teacher)).json()["spec"]
        assert api.post("/v1/jobs/validate", json=resolved).json()["spec"] == resolved


def test_given_values_are_kept(api: TestClient, spec):
    body = spec | {"schedule": {"epochs": 3.0}, "seed": 7, "labels": {"team": "lab"}, "evaluation": {"split": "train"}}
    resolved = api.post("/v1/jobs/validate", json=body).json()["spec"]
    assert resolved["schedule"] == {"epochs": 3, "batch_size": 8, "accumulation": 1}
    assert isinstance(resolved["schedule"]["epochs"], int)
    assert (resolved["seed"], resolved["labels"], resolved["evaluation"]["split"]) == (7, {"team": "lab"}, "train")


def test_the_checkpoints_detector_becomes_the_teachers(api: TestClient, database: Database, alice: Tenant, spec):
    row = seed.checkpoint(database, alice.id)
    teacher = {"source": "checkpoint", "id": row.id}
    resolved = api.post("/v1/jobs/validate", json=_with(spec, "teacher", teacher)).json()["spec"]
    assert resolved["teacher"] == teacher | {"detector": TEACHER_DETECTOR, "class_map": {}}
    other = teacher | {"detector": TEACHER_DETECTOR | {"pyramid_channels": 8}}
    answer = api.post("/v1/jobs/validate", json=_with(spec, "teacher", other))
    assert (answer.status_code, answer.json()["code"]) == (422, "teacher_detector_differs")


HINTS = {"method": "hints"}


def test_methods_are_combined_each_with_a_weight(api: TestClient, spec):
    body = _with(spec, "distillation", [{"method": "defeat", "mask": "cover"}, HINTS | {"weight": 0.5}])
    resolved = api.post("/v1/jobs/validate", json=body).json()["spec"]
    first = {"method": "defeat", "neck_object_weight": 4.0, "temperature": 1.0, "mask": "cover", "weight": 1.0}
    assert resolved["distillation"] == [first, {"method": "hints", "logits_weight": 0.0, "weight": 0.5}]
    assert api.post("/v1/jobs/validate", json=resolved).json()["spec"] == resolved
    assert _errors(api, _with(body, "teacher", None)) == [("/teacher", "teacher_required")]


@pytest.mark.parametrize(
    ("given", "errors"),
    [
        ([], [("", "bad_combination")]),
        ([HINTS], [("", "bad_combination")]),
        ([HINTS, {"method": "defeat"}, HINTS], [("/2/method", "bad_combination")]),
        ([{"method": "baseline"}, HINTS], [("/0/method", "bad_combination")]),
        ([HINTS, {"method": "defeat", "weight": 0}], [("/1/weight", "out_of_range")]),
        ([HINTS, {"method": "defeat", "weight": 1001}], [("/1/weight", "out_of_range")]),
        ([HINTS, {"method": "defeat", "neck_object_weight": 0}], [("/1", "weights_all_zero")]),
        ({"method": "defeat", "neck_object_weight": 0}, [("", "weights_all_zero")]),
        ([HINTS, {"method": "defeat", "wieght": 1}], [("/1/wieght", "unknown_key")]),
        ([HINTS, {"weight": 1}], [("/1/method", "missing_key")]),
        ([HINTS, {"method": "magic"}], [("/1/method", "unknown_method")]),
        ([HINTS, 5], [("/1", "wrong_type")]),
        ([HINTS] * 50, [(f"/{index}/method", "bad_combination") for index in (1, 2, 3)]),
        ("defeat", [("", "wrong_type")]),
    ],
)
def test_what_cannot_be_combined_says_where(api: TestClient, spec, given: Any, errors: list):
    found = _errors(api, _with(spec, "distillation", given))
    assert found == [(f"/distillation{at}", code) for at, code in errors]


def test_parts_that_a_detector_has_not_are_refused(api: TestClient, client: TestClient, spec):
    without = copy.deepcopy(CATALOG)
    without["detectors"]["faster_rcnn"]["provides"] = []
    client.app.dependency_overrides[load_catalog] = lambda: Catalog(without)  # type: ignore[attr-defined]
    assert _errors(api, _with(spec, "distillation", HINTS)) == [("/distillation/method", "anchors_missing")]
    body = _with(spec, "distillation", [{"method": "defeat"}, HINTS | {"logits_weight": 1}])
    assert _errors(api, body) == [
        ("/distillation/1/logits_weight", "logits_do_not_pair"),
        ("/distillation/1/method", "anchors_missing"),
    ]


def test_the_baseline_needs_no_teacher(api: TestClient, spec):
    body = spec | {"teacher": None, "distillation": {"method": "baseline"}}
    assert api.post("/v1/jobs/validate", json=body).json()["spec"]["teacher"] is None
    answer = api.post("/v1/jobs/validate", json=_with(spec, "teacher", None))
    assert (answer.status_code, answer.json()["code"]) == (422, "teacher_required")
    assert _errors(api, _with(spec, "teacher", ...)) == [("/teacher", "teacher_required")]


@ONE_DATABASE
@pytest.mark.parametrize(
    ("path", "value", "errors"),
    [
        ("name", ..., [("/name", "missing_key")]),
        ("student", ..., [("/student", "missing_key")]),
        ("student", [], [("/student", "wrong_type")]),
        ("student.detector", ..., [("/student/detector", "missing_key")]),
        ("student.detector", "resnet", [("/student/detector", "wrong_type")]),
        ("student.detector.backbone", ..., [("/student/detector/backbone", "missing_key")]),
        ("student.detector.backbone", "resnet10", [("/student/detector/backbone", "unknown_backbone")]),
        ("student.detector.backbone", 5, [("/student/detector/backbone", "wrong_type")]),
        ("student.detector.architecture", "yolo", [("/student/detector/architecture", "unknown_architecture")]),
        ("student.detector.architecture", ..., [("/student/detector/architecture", "missing_key")]),
        ("student.detector.colour", 1, [("/student/detector/colour", "unknown_key")]),
        ("student.detector.strides", [4, 5], [("/student/detector/strides/1", "unknown_choice")]),
        ("student.detector.pyramid_channels", 4, [("/student/detector/pyramid_channels", "out_of_range")]),
        ("student.detector.pyramid_channels", "8", [("/student/detector/pyramid_channels", "wrong_type")]),
        ("student.detector.pyramid_channels", True, [("/student/detector/pyramid_channels", "wrong_type")]),
        ("student.detector.batch_norm_epsilon", 5, [("/student/detector/batch_norm_epsilon", "out_of_range")]),
        ("student.detector.batch_norm_epsilon", "x", [("/student/detector/batch_norm_epsilon", "wrong_type")]),
        ("student.initial_weights", "resnet.pth", [("/student/initial_weights", "unknown_weights")]),
        ("student.initial_weights", "ckpt_unknown", [("/student/initial_weights", "checkpoint_not_found")]),
        ("student.initial_weights", "ckpt_'; --", [("/student/initial_weights", "checkpoint_not_found")]),
        ("teacher.initial_weights", "ckpt_unknown", [("/teacher/initial_weights", "checkpoint_not_found")]),
        ("teacher.schedule", {"epochs": 0}, [("/teacher/schedule/epochs", "out_of_range")]),
        ("teacher.schedule", 5, [("/teacher/schedule", "wrong_type")]),
        ("teacher.source", "thief", [("/teacher", "unknown_choice")]),
        ("teacher.source", ..., [("/teacher", "missing_key")]),
        ("teacher.id", "ckpt_1", [("/teacher/id", "unknown_key")]),
        ("teacher", {"source": "checkpoint"}, [("/teacher/id", "missing_key")]),
        ("teacher", {"source": "checkpoint", "id": "ckpt_unknown"}, [("/teacher/id", "checkpoint_not_found")]),
        (
            "teacher",
            {"source": "pretrained", "detector": "detr", "weights": "COCO_V1"},
            [("/teacher/detector", "unknown_detector")],
        ),
        (
            "teacher",
            {"source": "pretrained", "detector": "fasterrcnn_resnet50_fpn", "weights": "V9"},
            [("/teacher/weights", "unknown_weights")],
        ),
        ("distillation", ..., [("/distillation", "missing_key")]),
        ("distillation", {}, [("/distillation/method", "missing_key")]),
        ("distillation.method", "magic", [("/distillation/method", "unknown_method")]),
        ("distillation.temperature", 0, [("/distillation/temperature", "out_of_range")]),
        ("distillation.mask", "none", [("/distillation/mask", "unknown_choice")]),
        ("distillation.weight", 1, [("/distillation/weight", "unknown_key")]),
        (
            "schedule",
            {"epochs": 1.5, "speed": 1},
            [("/schedule/epochs", "wrong_type"), ("/schedule/speed", "unknown_key")],
        ),
        ("schedule", None, [("/schedule", "wrong_type")]),
        ("evaluation", {"split": "dev"}, [("/evaluation/split", "unknown_choice")]),
        ("evaluation", {"split": "test"}, [("/evaluation/split", "split_missing")]),
        ("augmentation", {"horizontal_flip": 2}, [("/augmentation/horizontal_flip", "out_of_range")]),
        ("schedule", {"accumulation": 3}, [("/schedule/accumulation", "out_of_range")]),
        ("resources", {"gpus": 0}, [("/resources/gpus", "out_of_range")]),
        (
            "resources",
            {"gpus": 3},
            [("/schedule/batch_size", "out_of_range"), ("/teacher/schedule/batch_size", "out_of_range")],
        ),
        ("seed", -1, [("/seed", "out_of_range")]),
        ("seed", 2**31, [("/seed", "out_of_range")]),
        ("seed", 10**400, [("/seed", "out_of_range")]),
        ("seed", 1.5, [("/seed", "wrong_type")]),
        ("labels", {"a": 1}, [("/labels/a", "wrong_type")]),
        ("labels", {"a" * 51: "x"}, [("/labels", "out_of_range")]),
        ("labels", {"": "x"}, [("/labels", "out_of_range")]),
        ("labels", {"a": "x" * 201}, [("/labels", "out_of_range")]),
        ("labels", {str(n): "" for n in range(21)}, [("/labels", "out_of_range")]),
        ("dataset", "ds_unknown", [("/dataset", "dataset_not_found")]),
        ("dataset", "ds_'; --", [("/dataset", "dataset_not_found")]),
        ("dataset", 5, [("/dataset", "wrong_type")]),
        ("colour", 1, [("/colour", "unknown_key")]),
        ("student.detector.backbone", "a\0", [("/student/detector/backbone", "unfit_value")]),
    ],
)
def test_each_mistake_has_its_place_and_code(api: TestClient, spec, path: str, value: Any, errors: list):
    found = _errors(api, _with(spec, path, value))
    assert sorted(set(found)) == errors


@ONE_DATABASE
@pytest.mark.parametrize(
    ("path", "value", "code"),
    [
        ("seed", -1, "validation_failed"),
        ("colour", 1, "validation_failed"),
        ("student.detector.backbone", "resnet10", "validation_failed"),
        ("distillation.method", "magic", "validation_failed"),
        ("student.initial_weights", "resnet.pth", "validation_failed"),
        ("teacher", None, "teacher_required"),
        ("distillation", [], "bad_combination"),
    ],
)
def test_a_rule_that_is_broken_alone_gives_the_answer_its_code(api: TestClient, spec, path: str, value: Any, code: str):
    answer = api.post("/v1/jobs/validate", json=_with(spec, path, value))
    assert (answer.status_code, answer.json()["code"]) == (422, code)


def test_nesting_has_a_limit(api: TestClient, spec):
    nested: Any = []
    for _ in range(40):
        nested = [nested]
    assert [code for _, code in _errors(api, _with(spec, "distillation.mask", nested))] == ["unfit_value"]


def test_all_mistakes_come_at_once(api: TestClient, spec):
    body = _with(spec, "student.detector.backbone", "resnet10") | {
        "dataset": "ds_unknown",
        "schedule": {"epochs": 0},
        "distillation": {"method": "magic"},
        "colour": 1,
        "seed": -1,
    }
    assert _errors(api, body) == [
        ("/colour", "unknown_key"),
        ("/dataset", "dataset_not_found"),
        ("/distillation/method", "unknown_method"),
        ("/schedule/epochs", "out_of_range"),
        ("/seed", "out_of_range"),
        ("/student/detector/backbone", "unknown_backbone"),
    ]
    document = api.post("/v1/jobs/validate", json=body).json()
    assert (document["code"], document["detail"][:25]) == ("validation_failed", "the request has 6 errors;")


def test_a_long_list_of_choices_is_shortened(api: TestClient, spec):
    document = api.post("/v1/jobs/validate", json=_with(spec, "student.detector.backbone", "resnet10t")).json()
    detail = document["errors"][0]["detail"]
    assert detail.startswith("unknown backbone 'resnet10t'; nearest: timm/resnet10t, ")
    assert detail.endswith(f"all {len(BACKBONES)} are listed by GET /v1/catalog")
    assert detail.count("timm/") == 10


@pytest.mark.parametrize("status", ["awaiting_upload", "queued", "checking", "invalid", "failed"])
def test_a_dataset_must_be_ready(api: TestClient, database: Database, alice: Tenant, spec, status: str):
    failure = {"class": "data", "code": "no_classes", "detail": "it names no class"} if status == "invalid" else None
    row = seed.dataset(database, alice.id, status=status, failure=failure)
    answer = api.post("/v1/jobs", json=_with(spec, "dataset", row.id))
    assert (answer.status_code, answer.json()["code"]) == (409, "dataset_not_ready")
    assert f"{row.id} is {status}" in answer.json()["detail"]
    assert ("it names no class" in answer.json()["detail"]) is (status == "invalid")


@pytest.mark.parametrize("path", ["teacher", "student.initial_weights", "teacher.initial_weights"])
def test_checkpoints_must_be_ready(api: TestClient, database: Database, alice: Tenant, spec, path: str):
    row = seed.checkpoint(database, alice.id, status="checking")
    value = {"source": "checkpoint", "id": row.id} if path == "teacher" else row.id
    answer = api.post("/v1/jobs", json=_with(spec, path, value))
    assert (answer.status_code, answer.json()["code"]) == (409, "checkpoint_not_ready")


def test_mistakes_come_before_what_is_not_ready(api: TestClient, database: Database, alice: Tenant, spec):
    row = seed.dataset(database, alice.id, status="queued")
    assert _errors(api, _with(spec, "dataset", row.id) | {"seed": -1}) == [("/seed", "out_of_range")]


def test_other_tenants_rows_are_not_there(api: TestClient, database: Database, bob: Tenant, spec):
    theirs, weights = seed.dataset(database, bob.id), seed.checkpoint(database, bob.id)
    assert _errors(api, _with(spec, "dataset", theirs.id)) == [("/dataset", "dataset_not_found")]
    teacher = {"source": "checkpoint", "id": weights.id}
    assert _errors(api, _with(spec, "teacher", teacher)) == [("/teacher/id", "checkpoint_not_found")]
    body = _with(spec, "student.initial_weights", weights.id)
    assert _errors(api, body) == [("/student/initial_weights", "checkpoint_not_found")]


def test_splits_must_be_there(api: TestClient, database: Database, alice: Tenant, spec):
    row = seed.dataset(database, alice.id, splits={"test": {"images": 1, "boxes": 1}})
    answer = api.post("/v1/jobs/validate", json=_with(spec, "dataset", row.id))
    assert answer.json()["code"] == "split_missing"
    assert [item["pointer"] for item in answer.json()["errors"]] == ["/dataset", "/evaluation/split"]
    assert "it has: test" in answer.json()["errors"][0]["detail"]


def test_the_teacher_must_know_the_datasets_classes(api: TestClient, database: Database, alice: Tenant, spec):
    row = seed.dataset(database, alice.id, classes=["person", "cat", "cow"])
    weights = seed.checkpoint(database, alice.id)
    for teacher in (
        {"source": "checkpoint", "id": weights.id},
        {"source": "pretrained", "detector": "fasterrcnn_resnet50_fpn", "weights": "COCO_V1"},
    ):
        answer = api.post("/v1/jobs/validate", json=_with(spec, "teacher", teacher) | {"dataset": row.id})
        assert (answer.status_code, answer.json()["code"]) == (422, "teacher_classes_differ")
        assert "2 of the dataset's 3 classes: 'cat', 'cow'" in answer.json()["detail"]
    assert api.post("/v1/jobs/validate", json=spec | {"dataset": row.id}).status_code == 200


def test_pyramids_must_share_a_stride(api: TestClient, spec):
    apart = _with(_with(spec, "student.detector.strides", [4, 8]), "teacher.detector.strides", [16, 32])
    answer = api.post("/v1/jobs/validate", json=apart)
    assert (answer.status_code, answer.json()["code"]) == (422, "pyramids_do_not_pair")
    assert "[4, 8]" in answer.json()["detail"]
    assert "[16, 32]" in answer.json()["detail"]
    assert api.post("/v1/jobs/validate", json=apart | {"distillation": {"method": "baseline"}}).status_code == 200


@pytest.mark.parametrize("body", [[], "x", 5, None])
def test_a_spec_is_an_object(api: TestClient, body: Any):
    assert _errors(api, body)[0][1] in ("wrong_type", "missing_key")


def test_pointers_and_values_are_shown_safely():
    assert pointer(("a/b", "c~d", 0)) == "/a~1b/c~0d/0"
    assert pointer(("\ud800",)) == "/\\ud800"
    assert [show(value) for value in (True, None, 5, "a")] == ["true", "null", "5", "'a'"]
    assert len(show("x" * 1000)) == 78


def test_schemas_may_nest():
    part = {"type": "object", "additionalProperties": False, "properties": {"x": {"type": "integer", "default": 1}}}
    reference = {"$ref": "#/$defs/Part"}
    schema = {
        "$defs": {"Part": part},
        "type": "object",
        "properties": {"part": reference | {"default": {}}, "parts": {"type": "array", "items": reference}},
    }
    assert complete(schema, {"parts": [{}, {"x": 2.0}]}) == {"part": {"x": 1}, "parts": [{"x": 1}, {"x": 2}]}
    found = check(schema, {"part": {"y": 1}, "parts": [{"x": "1"}]}, ("spec",))
    assert [(item["pointer"], item["code"]) for item in found] == [
        ("/spec/part/y", "unknown_key"),
        ("/spec/parts/0/x", "wrong_type"),
    ]


def test_short_lists_of_choices_are_told_whole():
    assert unknown_choice(("mask",), 1, ["paper", "cover", None]) == {
        "pointer": "/mask",
        "code": "unknown_choice",
        "detail": "unknown mask 1; known: paper, cover, null",
    }


def test_the_packaged_catalog_agrees_with_itself():
    catalog = load_catalog()
    for entry in catalog.pretrained.values():
        section = check_detector(catalog, entry["detector"], ())
        assert (section.problems, section.value) == ([], entry["detector"])
    for name, family in catalog.detectors.items():
        backbone = family["schema"]["properties"]["backbone"]
        choices = backbone["enum"] if "enum" in backbone else [backbone["const"]]
        section = check_detector(catalog, {"architecture": name, "backbone": choices[-1]}, ())
        assert section.problems == []
        assert section.value["strides"]
        # A family whose backbone is its own has it by default.
        assert "default" in backbone or set(choices) == set(catalog.document["backbones"])
    for name in ("schedule", "evaluation", "augmentation", "resources"):
        assert check(catalog.schema(name), complete(catalog.schema(name), {}), ()) == []


@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize(
    ("change", "classes", "code"),
    [
        ({}, ["person", "car", "dog"], None),
        ({"batch_norm_epsilon": 0.0}, ["person", "car"], None),
        ({"pyramid_channels": 32}, ["person", "car"], "tensors_do_not_fit"),
        ({"strides": [8, 16]}, ["person", "car"], "tensors_do_not_fit"),
        ({"backbone": "timm/mobilenetv3_small_050"}, ["person", "car"], "tensors_do_not_fit"),
        ({}, ["person"], "classes_differ"),
    ],
)
def test_initial_weights_must_fit(
    api: TestClient, database: Database, alice: Tenant, spec, whose, change, classes, code
):
    row = seed.checkpoint(database, alice.id, detector=TEACHER_DETECTOR | change, classes=classes)
    body = _with(spec, f"{whose}.detector", TEACHER_DETECTOR)
    body = _with(body, f"{whose}.initial_weights", row.id)
    answer = api.post("/v1/jobs/validate", json=body)
    if code is None:
        assert answer.status_code == 200, answer.text
        return
    wanted = f"{whose}_{code}" if code == "classes_differ" else code
    assert _errors(api, body) == [(f"/{whose}/initial_weights", wanted)]
    assert answer.json()["code"] == wanted
