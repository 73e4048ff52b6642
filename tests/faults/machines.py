"""Two workers in network namespaces of their own, with the three services on a third: `unshare --net --mount python -m
tests.faults.machines FOLDER SECONDS`.

It kills one worker during a job, and disconnects another one for this many seconds. Prints the jobs' results as one
JSON object.
"""

import json
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Final

import psutil

from tests.faults.cluster import Cluster, cluster
from tests.faults.work import EPOCHS, Work
from tests.support.waiting import until

SERVICES: Final = "10.77.0.1"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _machine(number: int) -> tuple[str, ...]:
    """Create a network namespace connected to this one, and return the command prefix that runs a command in it."""
    name, here, there = f"machine{number}", f"10.77.{number}.1", f"10.77.{number}.2"
    _ip("netns", "add", name)
    _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
    _ip("addr", "add", f"{here}/24", "dev", name)
    _ip("link", "set", name, "up")
    for command in (
        ["addr", "add", f"{there}/24", "dev", "eth0"],
        ["link", "set", "eth0", "up"],
        ["link", "set", "lo", "up"],
        ["route", "add", "default", "via", here],
    ):
        _ip("-n", name, *command)
    return ("ip", "netns", "exec", name)


def _owner(service: Cluster, job: str) -> str | None:
    """Return the name of the worker with a run of the job; None: no worker has one."""
    for name, worker in service.workers.items():
        with suppress(psutil.NoSuchProcess):
            if (run := worker.run()) is not None and job in run.cmdline()[-1]:
                return name
    return None


def _begun(service: Cluster, work: Work) -> tuple[str, str]:
    """Return a job in training, and the name of its machine."""
    job = work.submit(epochs=EPOCHS)
    owner = until(lambda: _owner(service, job), within_s=60, what="the run")

    def _trains() -> bool:
        progress = work.client.jobs.get(job)["progress"]
        return progress is not None and progress["phase"] == "distillation"

    until(_trains, within_s=60, what="its first steps")
    time.sleep(1)
    return job, owner


def _break(service: Cluster, work: Work, cut_s: float) -> list[str]:
    """Break one machine after the other while it has a job, and return the jobs."""
    killed, owner = _begun(service, work)
    service.workers[owner].kill()
    work.finished(killed)
    service.workers[owner].start()

    cut_off, owner = _begun(service, work)
    _ip("link", "set", owner, "down")
    time.sleep(cut_s)
    # Long enough for the other machine to take over the job, and perhaps to end it.
    assert work.client.jobs.get(cut_off)["attempt"] > 1
    _ip("link", "set", owner, "up")
    until(lambda: service.workers[owner].run() is None, within_s=120, what="the end of the run that lost its job")
    work.finished(cut_off)

    # Only the disconnected machine is left, and it must receive messages about new jobs.
    (other,) = set(service.workers) - {owner}
    service.workers[other].kill()
    after = work.submit(epochs=EPOCHS)
    until(lambda: work.client.jobs.get(after)["status"] != "queued", within_s=60, what="a claim of the new job")
    work.finished(after)
    return [killed, cut_off, after]


def main(folder: Path, cut_s: float) -> None:
    """Set up the machines, break them, and print the result."""
    _ip("link", "set", "lo", "up")
    _ip("addr", "add", f"{SERVICES}/32", "dev", "lo")
    Path("/run/netns").mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", "/run/netns"], check=True)  # invisible to other processes
    prefixes = {f"machine{number}": _machine(number) for number in (1, 2)}
    with cluster(folder, SERVICES) as service:
        try:
            client = service.start()
            for name, prefix in prefixes.items():
                service.worker(name, prefix=prefix)
            work = Work(service, client, folder)
            work.expected(EPOCHS)
            report = work.judged(_break(service, work, cut_s), epochs=EPOCHS, within_s=1)
        except BaseException:
            print(service.logs(), file=sys.stderr)
            raise
    print(json.dumps(asdict(report)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
