"""Workers with wrong clocks share the work with one whose clock is right."""

import pytest

from tests.faults.cluster import Cluster
from tests.faults.conftest import Found
from tests.faults.work import Work

MINUTES_10 = 600.0


@pytest.mark.timeout(900)
@pytest.mark.parametrize("clock_s", [MINUTES_10, pytest.param(-MINUTES_10, marks=pytest.mark.slow)])
def test_a_clock_that_is_wrong_takes_no_job_away(
    service: Cluster, work: Work, found: Found, long: bool, clock_s: float
) -> None:
    service.workers.pop("two").end()
    service.worker("wrong", clock_s=clock_s)
    try:
        jobs = [work.submit(epochs=2) for _ in range(8 if long else 4)]
        report = work.judged(jobs, epochs=2, within_s=300)
    finally:
        service.workers.pop("wrong").end()
        service.worker("two")
    found.add(clocks_off=1)
    found.judge(report)
    assert report.attempts == len(jobs), "a job was taken from a worker that was well"
