"""Broker, database and object store stop while jobs are queued and run, and start again."""

import time

import pytest

from tests.faults.cluster import Cluster
from tests.faults.conftest import Found
from tests.faults.work import EPOCHS, Work
from tests.support.waiting import until


def _running(service: Cluster) -> bool:
    return bool(service.runs())


@pytest.mark.timeout(1800)
def test_a_broker_that_is_killed_and_flushed_loses_no_job_and_doubles_none(
    service: Cluster, work: Work, found: Found, long: bool
) -> None:
    work.expected(1)
    jobs = [work.submit(epochs=1) for _ in range(100 if long else 6)]
    until(lambda: _running(service), within_s=60, what="the first run")
    service.flush_broker()
    report = work.judged(jobs, epochs=1, within_s=1500)
    found.add(broker_flushed_with_queued=len(jobs))
    found.judge(report)
    assert report.attempts == len(jobs), "a job began twice"


@pytest.mark.timeout(900)
def test_a_job_goes_on_while_the_database_is_away(service: Cluster, work: Work, found: Found, long: bool) -> None:
    away_s = 60.0 if long else 8.0
    work.expected(EPOCHS)
    jobs = [work.submit(epochs=EPOCHS) for _ in range(2)]
    until(lambda: len(service.runs()) == 2, within_s=60, what="two runs")
    service.postgres.stop()
    began = time.monotonic()
    assert service.answer("/readyz") == 503
    assert service.answer("/healthz") == 200
    time.sleep(max(0.0, away_s - (time.monotonic() - began)))
    service.postgres.start()
    until(lambda: service.answer("/readyz") == 200, within_s=30, what="the API's recovery")
    found.add(database_away_s=round(away_s))
    found.judge(work.judged(jobs, epochs=EPOCHS, within_s=300))


@pytest.mark.timeout(900)
def test_nothing_is_lost_while_the_object_store_refuses_to_write(
    service: Cluster, work: Work, found: Found, long: bool
) -> None:
    away_s = 60.0 if long else 15.0
    work.expected(EPOCHS)
    job = work.submit(epochs=EPOCHS)
    until(lambda: _running(service), within_s=60, what="the run")
    service.gate.touch()
    began = time.monotonic()
    # The run ends meanwhile, and its results wait for the store.
    until(lambda: not _running(service), within_s=120, what="the end of the run")
    time.sleep(max(2.0, away_s - (time.monotonic() - began)))
    assert work.ended(job) is None
    service.gate.unlink()
    report = work.judged([job], epochs=EPOCHS, within_s=120)
    found.add(storage_refused_s=round(time.monotonic() - began))
    found.judge(report)
    assert report.attempts == 1, "work was done again that was there"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_service_begins_again_after_everything_was_cut_off_at_once(
    service: Cluster, work: Work, found: Found
) -> None:
    """As in a power cut: workers, API, broker and database stop at once and start again."""
    work.expected(EPOCHS)
    jobs = [work.submit(epochs=EPOCHS) for _ in range(3)]
    until(lambda: len(service.runs()) == 2, within_s=60, what="two runs")
    time.sleep(6)
    for process in (*service.workers.values(), service.api, service.broker):
        process.kill()
    service.postgres.stop()
    service.postgres.start()
    for process in (service.broker, service.api, *service.workers.values()):
        process.start()
    found.add(power_cuts=1)
    found.judge(work.judged(jobs, epochs=EPOCHS, within_s=300))
