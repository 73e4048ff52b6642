"""What cannot be trained is rejected before any training: of the student and of the teacher."""

import pytest

from tests.support.ssd import SSDLITE
from tests.support.training import TINY, events, run, shapes, spec, write_run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    shapes(root, train=4, val=1)
    return root / "canonical"


NECK_ONLY = {"method": "defeat", "head_object_weight": 0, "head_background_weight": 0}


@pytest.mark.parametrize(
    ("detector", "schedule", "augmentation", "code", "expected"),
    [
        (SSDLITE, {"batch_size": 1}, {}, "batch_too_small", "set batch_size to 2 or more"),
        (SSDLITE, {"batch_size": 4, "accumulation": 4}, {}, "batch_too_small", "set batch_size to 8 or more"),
        (SSDLITE, {"batch_size": 4, "frozen_stages": 1}, {}, "stages_cannot_freeze", "leave it at 0"),
        (TINY, {"batch_size": 5}, {}, "too_few_images", "the training split has 4 images"),
        (
            SSDLITE,
            {"batch_size": 4},
            {"scale_min": 0.5},
            "fixed_input_size",
            "(ssdlite) sees every image at 96 x 96 px",
        ),
    ],
)
@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_it_is_rejected_before_any_training(whose, detector, schedule, augmentation, code, expected, dataset, tmp_path):
    schedules = {who: schedule if who == whose else {"batch_size": 4} for who in ("teacher", "student")}
    job = spec(
        teacher={
            "source": "train",
            "detector": detector if whose == "teacher" else TINY,
            "initial_weights": "random",
            "schedule": {**schedules["teacher"], "epochs": 1},
        },
        student={"detector": detector if whose == "student" else TINY, "initial_weights": "random"},
        distillation=NECK_ONLY,
        schedule={**schedules["student"], "epochs": 1},
        augmentation=augmentation,
    )
    directory = write_run(tmp_path / "run", dataset, job)
    failure = run(directory)["failure"]
    assert (failure["class"], failure["code"]) == ("user", code)
    assert expected in failure["detail"]
    assert events(directory, "metrics") == []
    if code in ("batch_too_small", "too_few_images"):
        assert f"{'teacher.' * (whose == 'teacher')}schedule.batch_size" in failure["detail"]
