"""What a config reports of a spec that is wrong: the place in the spec, what is wrong, and the value."""

import pytest

from defeat.engine.report import RunError
from defeat.engine.training.config import JobConfig
from tests.support.tiny import TINY
from tests.support.training import spec

SCHEDULE = {"epochs": 2, "batch_size": 4}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"teacher": {"source": "train", "detector": TINY, "schedule": {**SCHEDULE, "epochs": 0}}},
            r"spec\.teacher\.schedule\.epochs: Input should be greater than or equal to 1 \(got 0\)",
        ),
        ({"teacher": {"source": "guess", "detector": TINY}}, r"spec\.teacher: .*'guess'.*'train'"),
        ({"schedule": {**SCHEDULE, "epoch": 3}}, r"spec\.schedule\.epoch: .*not permitted \(got 3\)"),
        ({"resources": {"gpus": 3}}, r"spec: Value error, schedule\.batch_size: .* which is 3, .*; got 4$"),
    ],
)
def test_a_wrong_spec_is_reported_with_its_place(changes, expected):
    with pytest.raises(RunError, match=expected) as raised:
        JobConfig.parse(spec(**changes), where="spec")
    assert raised.value.code == "bad_spec"
