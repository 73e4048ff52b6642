"""What the API works out of a detector's spec by itself is what the engine builds."""

from urllib.error import URLError

import pytest
import torch

from app.specs.catalog import load_catalog
from app.specs.levels import strides_of
from app.specs.training import training_problems
from defeat.engine.data.loading.config import AugmentationConfig
from defeat.engine.detectors import DETECTORS, build
from defeat.engine.report import RunError
from defeat.engine.training.config import ScheduleConfig
from defeat.engine.training.trainable import require_trainable

IMAGES = 16


def extra_levels():
    """Every value of `extra_levels` that a family takes."""
    return DETECTORS["fcos"].config.model_json_schema()["properties"]["extra_levels"]["enum"]


@pytest.mark.parametrize(
    "spec",
    [
        {"architecture": "faster_rcnn", "strides": [8, 16]},
        {"architecture": "faster_rcnn", "strides": [8, 16], "pool_level": False},
        {"architecture": "retinanet", "strides": [16, 32]},
        *({"architecture": "fcos", "extra_levels": extra} for extra in extra_levels()),
    ],
    ids=lambda spec: "-".join(map(str, spec.values())),
)
def test_strides(spec):
    with torch.device("meta"):
        detector = build({**spec, "backbone": "torchvision/resnet18"}, ["cat"])
    assert strides_of(load_catalog(), detector.config.model_dump(mode="json")) == list(detector.strides)


@pytest.mark.parametrize("augmentation", [{}, {"scale_min": 0.5}, {"scale_max": 2}], ids=str)
@pytest.mark.parametrize("schedule", [{"batch_size": 1}, {"batch_size": 2}, {"frozen_stages": 1}, {"batch_size": 17}])
@pytest.mark.parametrize("initial_weights", ["random", "imagenet"])
@pytest.mark.parametrize(
    "spec",
    [
        *({"architecture": family} for family in DETECTORS),
        *({"architecture": "ssdlite", "size": size} for size in (512, 544)),
        {"architecture": "ssdlite", "reduced_tail": False},
    ],
    ids=lambda spec: "-".join(map(str, spec.values())),
)
def test_what_can_be_trained(spec, schedule, augmentation, initial_weights, monkeypatch, tmp_path):
    """The API refuses just what the run would; published weights cannot be had here, which is said later."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", _no_network)
    config = DETECTORS[spec["architecture"]].config
    if config.model_fields["backbone"].is_required():
        spec = {**spec, "backbone": "torchvision/resnet18"}
    whole, given = config.parse(spec, where="detector"), ScheduleConfig.parse(schedule, where="schedule")
    changes = AugmentationConfig.parse(augmentation, where="augmentation")
    problems = training_problems(
        load_catalog(),
        whole.model_dump(mode="json"),
        given.model_dump(mode="json"),
        initial_weights=initial_weights,
        gpus=1,
        images=IMAGES,
        augmentation=changes.model_dump(mode="json"),
        who=("student",),
        where=("schedule",),
    )
    assert {problem["code"] for problem in problems} == refused(spec, given, changes, initial_weights)


def _no_network(*_args, **_kwargs):
    raise URLError("Network is unreachable")


def refused(spec, schedule, augmentation, initial_weights):
    """The codes with which the engine refuses to build or to train the detector."""
    codes = set()
    if initial_weights == "imagenet":
        codes |= code_of(lambda: build(spec, ["cat"], pretrained_backbone=True)) - {"weights_unavailable"}
    with torch.device("meta"):
        detector = build(spec, ["cat"])
    # One at a time: the engine stops at the first.
    for change, changes in (
        ({"frozen_stages": 0}, AugmentationConfig()),
        ({"batch_size": 8}, AugmentationConfig()),
        ({"frozen_stages": 0, "batch_size": 8}, augmentation),
    ):
        one = schedule.model_copy(update=change)
        codes |= code_of(
            lambda one=one, changes=changes: require_trainable(
                detector, one, changes, images=IMAGES, processes=1, who="student", where="schedule"
            )
        )
    return codes


def code_of(action):
    try:
        action()
    except RunError as error:
        return {error.code}
    return set()
