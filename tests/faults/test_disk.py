"""A worker's disk fills up during a run, and later has space again."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cluster import Cluster
from tests.faults.conftest import Found
from tests.faults.work import EPOCHS, Work
from tests.support.waiting import until

_ROOM_MB = 64


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory with space for 64 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={_ROOM_MB}m", "none", str(disk)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small disk needs root, and mount")
    if subprocess.run(["mount", *options], check=False, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_outlasts_a_full_disk(service: Cluster, work: Work, found: Found, long: bool, small_disk: Path) -> None:
    work.expected(EPOCHS)
    for name in ("one", "two"):
        service.workers.pop(name).end()
    worker = service.worker("small", home=small_disk)
    try:
        job = work.submit(epochs=EPOCHS)
        until(worker.run, within_s=60, what="the run")
        time.sleep(5)
        _fill(small_disk / "filler")
        time.sleep(60 if long else 15)
        (small_disk / "filler").unlink()
        report = work.judged([job], epochs=EPOCHS, within_s=300)
        messages = [event["message"] for event in work.client.jobs.events(job) if event["code"] == "retrying"]
    finally:
        service.workers.pop("small").end()
        for name in ("one", "two"):
            service.worker(name)
    found.add(disks_filled=1)
    found.judge(report)
    assert any("disk_full" in message for message in messages), messages


def _fill(path: Path) -> None:
    with path.open("wb") as file:
        try:
            while True:
                os.write(file.fileno(), bytes(4096))
        except OSError:
            return
