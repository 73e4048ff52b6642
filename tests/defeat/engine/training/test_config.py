"""The `teacher` part of a job's spec: one set of keys for each source, as the API sends them."""

import pytest

from defeat.engine.report import RunError
from defeat.engine.training.config import JobConfig
from tests.support.tiny import TINY

REST = {"student": {"detector": TINY}, "distillation": {"method": "defeat"}}


@pytest.mark.parametrize(
    ("teacher", "trained"),
    [
        ({"source": "train", "detector": TINY, "initial_weights": "imagenet", "schedule": {"epochs": 3}}, True),
        ({"source": "checkpoint", "id": "ckpt_1", "detector": TINY, "class_map": {}}, False),
        ({"source": "checkpoint", "id": "ckpt_1", "detector": None, "class_map": {"cat": "Katze"}}, False),
        ({"source": "pretrained", "detector": "fcos_resnet50_fpn", "weights": "COCO_V1", "class_map": {}}, False),
    ],
)
def test_each_source_has_its_keys(teacher, trained):
    config = JobConfig.parse({**REST, "teacher": teacher}, where="spec")
    assert config.trains_teacher is trained
    assert config.teacher.model_dump(include=teacher.keys()) | {"schedule": None} == teacher | {"schedule": None}


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        ({"source": "train", "detector": "fcos_resnet50_fpn"}, "detector"),
        ({"source": "train", "detector": TINY, "class_map": {"cat": "Katze"}}, "class_map"),
        ({"source": "checkpoint", "detector": TINY}, "id"),
        ({"source": "pretrained", "detector": "fcos_resnet50_fpn"}, "weights"),
        ({"source": "pretrained", "detector": TINY, "weights": "COCO_V1"}, "detector"),
        ({"source": "other"}, "'train', 'checkpoint', 'pretrained'"),
    ],
)
def test_keys_of_another_source_are_rejected_by_name(teacher, expected):
    with pytest.raises(RunError, match=expected) as raised:
        JobConfig.parse({**REST, "teacher": teacher}, where="spec")
    assert raised.value.code == "bad_spec"
