"""Requests a second that one API process answers, on SQLite; with `--before`, against those of another version.

    python -m benchmarks.requests [--quick] [--before DIRECTORY]

The API runs in a process of its own (uvicorn) with its files in a temporary directory; four connections, each of which
sends its next request when it has the last one's answer, ask for one job, a page of 20 jobs, the validation of a job
spec, and the creation of a dataset with an idempotency key. `--before` names a checkout of another version, which is
served from the same environment; the two take turns of half a second, and the ratio is the median of the turns' ratios
of requests a second. The processor's time per request is the server's own. The last line is one JSON object; the exit
code is 1 if any kind of request falls below the goal, which only a comparison has.
"""

import argparse
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from app.db import Database, utcnow
from app.keys.service import create_key
from app.migrate import upgrade
from app.settings import Settings
from tests.support import rows

GOAL: Final = 0.97
CONNECTIONS: Final = 4
JOBS: Final = 60
TURN_S: Final = 0.5
HERE: Final = Path(__file__).resolve().parents[1]
SPEC: Final = {
    "name": "cells-small",
    "teacher": None,
    "student": {"detector": {"architecture": "faster_rcnn", "backbone": "timm/resnet10t"}},
    "distillation": {"method": "baseline"},
}


@dataclass(frozen=True)
class Server:
    """One version's API, and what there is to ask it for."""

    port: int
    pid: int
    key: str
    job_id: str
    dataset_id: str

    def processor_s(self) -> float:
        """Return the processor's seconds that the server has used, in user and kernel mode."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def request(self, kind: str) -> tuple[str, str, str | None, dict[str, str]]:
        """Return method, path, body and headers of a request of this kind."""
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        if kind == "get_job":
            return "GET", f"/v1/jobs/{self.job_id}", None, headers
        if kind == "list_jobs":
            return "GET", "/v1/jobs?limit=20", None, headers
        if kind == "validate_job":
            return "POST", "/v1/jobs/validate", json.dumps(SPEC | {"dataset": self.dataset_id}), headers
        body = json.dumps({"name": "cells", "source": {"kind": "upload"}})
        return "POST", "/v1/datasets", body, headers | {"Idempotency-Key": uuid4().hex}


KINDS: Final = {"get_job": 200, "list_jobs": 200, "validate_job": 200, "create_dataset": 201}
"""The kinds of request, each with the status of its answer."""


@contextmanager
def serving(checkout: Path, home: Path) -> Iterator[Server]:
    """Serve the version in `checkout` with its files in `home`."""
    settings = Settings(home=home)
    upgrade(settings.database_url)
    with Database(settings.database_url) as database:
        with database.write() as session:
            row, key = create_key(session, settings, "benchmark", "benchmark")
        dataset = rows.dataset(database, row.tenant_id)
        done = {"status": "succeeded", "finished_at": utcnow()}
        jobs = [rows.job(database, row.tenant_id, dataset.id, **done).id for _ in range(JOBS)]
    environment = os.environ | {"DEFEAT_HOME": str(home), "PYTHONPATH": str(checkout), "DEFEAT_LOG_LEVEL": "WARNING"}
    for name in ("DATABASE_URL", "STORAGE_URL", "REDIS_URL", "DEFEAT_SECRET"):
        environment.pop(name, None)
    command = [sys.executable, "-P", "-m", "uvicorn", "app.main:create_app", "--factory", "--port", "0"]
    log = home / "log"
    with (
        log.open("w") as out,
        subprocess.Popen(
            [*command, "--no-access-log"], stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=checkout
        ) as process,
    ):
        try:
            yield Server(_port(log, process), process.pid, key, jobs[0], dataset.id)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def _port(log: Path, process: subprocess.Popen[bytes]) -> int:
    mark = "Uvicorn running on http://127.0.0.1:"
    while process.poll() is None:
        if mark in (text := log.read_text()):
            return int(text.partition(mark)[2].split()[0])
        time.sleep(0.05)
    raise RuntimeError(f"the API did not start:\n{log.read_text()[-3000:]}")


def measure(server: Server, kind: str, duration_s: float) -> tuple[float, float]:
    """Return the answers a second, and the server's processor seconds for each, over `duration_s`."""
    counts = [0] * CONNECTIONS
    failures: list[str] = []
    end = time.perf_counter() + duration_s

    def _ask(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        while time.perf_counter() < end and not failures:
            connection.request(*server.request(kind))
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != KINDS[kind]:
                failures.append(f"{kind}: {answer.status} {content[:500]!r}")
            counts[number] += 1
        connection.close()

    used, start = server.processor_s(), time.perf_counter()
    threads = [threading.Thread(target=_ask, args=(number,)) for number in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise RuntimeError(failures[0])
    return sum(counts) / (time.perf_counter() - start), (server.processor_s() - used) / sum(counts)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and return the result."""
    parser = argparse.ArgumentParser(description="Requests a second that one API process answers.")
    parser.add_argument("--quick", action="store_true", help="8 turns instead of 60")
    parser.add_argument("--before", type=Path, metavar="DIRECTORY", help="checkout of the version to compare with")
    options = parser.parse_args(arguments)
    turns = 8 if options.quick else 60
    versions = {"now": HERE} | ({"before": options.before.resolve()} if options.before else {})
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="requests") as folder, ExitStack() as stack:
        servers = {}
        for name, checkout in versions.items():
            home = Path(folder) / name
            home.mkdir()
            servers[name] = stack.enter_context(serving(checkout, home))
        for kind in KINDS:
            for server in servers.values():
                measure(server, kind, 0.5)  # the first requests build routes and open connections
            for turn in range(turns):
                for name in sorted(servers, reverse=turn % 2 == 1):
                    found.setdefault((name, kind), []).append(measure(servers[name], kind, TURN_S))
    result: dict[str, Any] = {"benchmark": "requests", "connections": CONNECTIONS}
    ratios = []
    for kind in KINDS:
        numbers: dict[str, float] = {}
        for name in versions:
            numbers[f"{name}_per_s"] = round(statistics.median(rate for rate, _ in found[name, kind]), 1)
            numbers[f"{name}_processor_ms"] = round(statistics.median(used for _, used in found[name, kind]) * 1000, 3)
        if options.before:
            pairs = zip(found["now", kind], found["before", kind], strict=True)
            numbers["ratio"] = round(statistics.median(now / before for (now, _), (before, _) in pairs), 3)
            ratios.append(numbers["ratio"])
        print(f"{kind}: {numbers}", flush=True)
        result[kind] = numbers
    if ratios:
        result |= {"least_ratio": min(ratios), "goal": GOAL}
    result["ok"] = not ratios or min(ratios) >= GOAL
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    sys.exit(0 if main()["ok"] else 1)
