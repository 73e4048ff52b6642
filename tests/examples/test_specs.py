"""The job specs of the families: whole, and of detectors that pair."""

from pathlib import Path

import pytest
import torch

from defeat.client.specs import load_spec
from defeat.engine import detectors, methods
from defeat.engine.detectors import DETECTORS
from defeat.engine.training.config import JobConfig
from defeat.engine.training.distill import SERVICE_KEYS
from defeat.engine.training.trainable import require_trainable
from tests.support.training import CLASSES

SPECS = sorted((Path(__file__).parents[2] / "examples" / "specs").glob("*.yaml"))


def test_there_is_one_for_each_family():
    # Faster R-CNN has the recipes, and the examples for a CPU.
    assert {path.stem for path in SPECS} == DETECTORS.keys() - {"faster_rcnn"}


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_a_specs_detectors_pair(path):
    spec = load_spec(path)
    assert spec["name"] == spec["student"]["detector"]["architecture"] == path.stem
    assert f"defeat jobs submit examples/specs/{path.name} --set dataset=ds_" in path.read_text()
    config = JobConfig.parse({key: value for key, value in spec.items() if key not in SERVICE_KEYS}, where="spec")
    with torch.device("meta"):
        teacher, student = (detectors.build(one.detector, CLASSES) for one in (config.teacher, config.student))
    methods.build(config.distillation, student, teacher)
    for detector, schedule in ((teacher, config.teacher.schedule), (student, config.schedule)):
        require_trainable(
            detector, schedule, config.augmentation, images=1000, processes=1, who="student", where="schedule"
        )
