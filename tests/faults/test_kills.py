"""Runs, supervisors and workers are killed at random times."""

import os
import random
import signal
import time
from collections import Counter

import psutil
import pytest

from tests.faults.cluster import Cluster, Worker
from tests.faults.conftest import Found
from tests.faults.work import EPOCHS, Work
from tests.support.waiting import until


def _kill(process: psutil.Process | None) -> bool:
    if process is None:
        return False
    try:
        os.kill(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _strike(kind: str, worker: Worker) -> bool:
    """Kill the worker's run, its supervisor, or the whole worker; return whether there was a run."""
    if kind == "run":
        return _kill(worker.run())
    if worker.run() is None:
        return False
    if kind == "supervisor":
        return _kill(worker.supervisor())
    worker.kill()
    worker.start()  # as a process manager would
    return True


@pytest.mark.timeout(2400)
def test_whatever_is_killed_each_job_ends_as_if_nothing_had_been(
    service: Cluster, work: Work, found: Found, dice: random.Random, long: bool
) -> None:
    kinds = ["run", "supervisor", "worker"]
    plan = [dice.choice(kinds) for _ in range(50 - len(kinds))] + kinds if long else kinds
    dice.shuffle(plan)
    work.expected(EPOCHS)
    jobs = [work.submit(epochs=EPOCHS) for _ in range(2)]
    twice: set[str] = set()
    kills = 0
    while plan:
        while len([job for job in jobs if not work.ended(job)]) < 2:
            jobs.append(work.submit(epochs=EPOCHS))
        worker = dice.choice(list(service.workers.values()))
        until(lambda: any(one.run() for one in service.workers.values()), within_s=60, what="a run to kill")
        for _ in range(int(10 * dice.uniform(0.2, 8.0))):
            runs = service.runs()
            now = Counter(job for job, _ in runs)
            twice |= {f"{job} ran twice at once: {runs}" for job, count in now.items() if count > 1}
            time.sleep(0.1)
        if _strike(plan[-1], worker):
            plan.pop()
            kills += 1
    found.add(kills=kills)
    report = work.judged(jobs, epochs=EPOCHS, within_s=300)
    report.doubled += len(twice)
    report.wrong += twice
    found.judge(report)
    assert report.resumed_identical > 0
