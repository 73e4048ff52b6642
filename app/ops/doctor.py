"""Checks everything that the service needs and reports problems with advice: `defeat doctor`.

Exit code 0: nothing is wrong (there may be warnings); 1: a check found something wrong; 2: the settings are invalid.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Final, Literal

from pydantic import ValidationError
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app.db import Database, now
from app.logs import first_line
from app.migrate import revisions
from app.models import QUEUES
from app.queue.messages import BROKER_ERRORS, Answer, Queue
from app.settings import GIB, Settings
from app.storage import ObjectMissing, Storage
from app.workers import repository

State = Literal["ok", "warning", "wrong"]
_MARKS: Final[dict[State, str]] = {"ok": "ok     ", "warning": "warning", "wrong": "WRONG  "}
_PACKAGES: Final = ("defeat-service", "fastapi", "celery", "sqlalchemy", "obstore", "torch", "torchvision")
_LEAST_POSTGRES: Final = 13
_SKEW_WARNING_S: Final = 2.0
# Amazon S3 and compatible stores reject a request whose signature differs this much from their own time.
_SKEW_WRONG_S: Final = 900.0
_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108
# NCCL may need this much to exchange the gradients of several GPUs; the default of containers is 64 MiB.
_LEAST_SHARED_MEMORY: Final = GIB // 2


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: what was checked.
        state: `wrong`: the service or a part of it does not work; `warning`: it may stop working or lose data.
        detail: what was found.
        advice: what to change; None if nothing need change.
    """

    check: str
    state: State
    detail: str
    advice: str | None = None


@dataclass(frozen=True)
class Beat:
    """A worker's row in the table of workers.

    Attributes:
        queues: the queues that it works on.
        draining: whether it claims no more rows.
        age_s: time since its last heartbeat, seconds.
    """

    queues: tuple[str, ...]
    draining: bool
    age_s: float


def examine(settings: Settings) -> Iterator[Finding]:
    """Yield the finding of each check. Writes and deletes a probe in object store and scratch directory."""
    yield _versions()
    yield _secret(settings)
    yield _scratch(settings)
    yield _shared_memory()
    with Database(settings.database_url) as database:
        findings = list(_database(database))
        yield from findings
        current = any(found.check == "migrations" and found.state == "ok" for found in findings)
        beats = _beats(database) if current else None
    yield _storage(settings)
    with closing(Queue(settings.redis_url)) as queue:
        broker, answers = _broker(queue)
    yield broker
    if beats is not None or answers is not None:
        yield from _workers(beats, answers, settings)


def _versions() -> Finding:
    found = [f"Python {python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")  # an API's installation has no torch
    return Finding("versions", "ok", ", ".join(found))


def _secret(settings: Settings) -> Finding:
    if settings.secret.get_secret_value():
        return Finding("secret", "ok", "DEFEAT_SECRET is set")
    if settings.database_url.startswith("sqlite"):
        return Finding("secret", "ok", f"stored in {settings.home / 'secret'}")
    return Finding(
        "secret",
        "warning",
        f"DEFEAT_SECRET is not set, so each machine creates its own in {settings.home}",
        "set the same DEFEAT_SECRET for every API; otherwise keys from one are invalid for the others",
    )


def _scratch(settings: Settings) -> Finding:
    advice = "put DEFEAT_HOME on a disk with three times the space of the datasets in work"
    try:
        settings.scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=settings.scratch) as file:
            file.write(b"probe")
        usage = shutil.disk_usage(settings.scratch)
    except OSError as error:
        return Finding("scratch", "wrong", f"{settings.scratch} cannot be written: {error.strerror}", advice)
    room = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB are free in {settings.scratch}"
    if usage.free < GIB:
        return Finding("scratch", "wrong", room, advice)
    return Finding("scratch", "warning" if usage.free < 0.1 * usage.total else "ok", room, advice)


def _shared_memory() -> Finding:
    """Check whether several GPUs can exchange gradients here. The loading of images uses no shared memory."""
    if shutil.which("nvidia-smi") is None:
        return Finding("shared memory", "ok", "not needed: this machine has no GPUs")
    try:
        free = shutil.disk_usage(_SHARED_MEMORY).free
    except OSError as error:
        return Finding("shared memory", "warning", f"{_SHARED_MEMORY} cannot be read: {error.strerror}")
    room = f"{free / GIB:.2f} GiB are free in {_SHARED_MEMORY}"
    advice = "give the container 1 GiB (shm_size in Compose, a Memory emptyDir in Kubernetes); NCCL fails without it"
    return Finding("shared memory", "ok" if free >= _LEAST_SHARED_MEMORY else "warning", room, advice)


def _database(database: Database) -> Iterator[Finding]:
    try:
        with database.engine.connect() as connection:
            current, head = revisions(connection)
            before = datetime.now(UTC)
            if connection.dialect.name == "postgresql":
                query = text("SELECT current_setting('server_version'), clock_timestamp()")
                server, present = connection.execute(query).one()
            else:
                server, present = connection.execute(text("SELECT sqlite_version()")).scalar_one(), None
            after = datetime.now(UTC)
            name = connection.dialect.name
    except SQLAlchemyError as error:
        yield Finding(
            "database", "wrong", first_line(error), "start the database, or correct DATABASE_URL and the network to it"
        )
        return
    yield _server(name, str(server))
    yield _migrations(current, head)
    if present is not None:
        yield _clock((before + (after - before) / 2 - present).total_seconds())


def _server(name: str, found: str) -> Finding:
    if name == "postgresql" and int(found.split(".", 1)[0]) < _LEAST_POSTGRES:
        return Finding("database", "wrong", f"PostgreSQL {found}", f"use PostgreSQL {_LEAST_POSTGRES} or newer")
    return Finding("database", "ok", f"{name} {found}")


def _migrations(current: str | None, head: str) -> Finding:
    if current == head:
        return Finding("migrations", "ok", f"at revision {head}")
    detail = f"the database is at revision {current or 'none'}, but this version needs {head}"
    return Finding("migrations", "wrong", detail, "run `defeat admin migrate` with the newest version that is in use")


def _clock(skew_s: float) -> Finding:
    detail = f"this machine is {abs(skew_s):.2f} s {'ahead of' if skew_s > 0 else 'behind'} the database"
    advice = "synchronise both by NTP: displayed times and signatures for S3 depend on this machine's clock"
    if abs(skew_s) > _SKEW_WRONG_S:
        return Finding("clock", "wrong", f"{detail}; an S3 server rejects signatures with this difference", advice)
    return Finding("clock", "warning" if abs(skew_s) > _SKEW_WARNING_S else "ok", detail, advice)


def _storage(settings: Settings) -> Finding:
    try:
        start = time.perf_counter()
        Storage(settings.storage_url).ping()
    except (OSError, ValueError, ObjectMissing) as error:
        advice = "check STORAGE_URL, the AWS_* variables, and that the credentials may write, read, list and delete"
        return Finding("storage", "wrong", first_line(error), advice)
    took = time.perf_counter() - start
    return Finding("storage", "ok", f"wrote, read and deleted a probe in {took * 1000:.0f} ms")


def _broker(queue: Queue) -> tuple[Finding, dict[str, Answer] | None]:
    """Return the finding about the broker, and the answers of its workers; None: the broker does not answer."""
    try:
        server, answers = queue.server(), queue.workers()
    except BROKER_ERRORS as error:
        advice = "start the broker, or correct REDIS_URL and the network to it"
        return Finding("broker", "wrong", first_line(error), advice), None
    found = f"version {server['version']}"
    if server["eviction"] == "noeviction":
        return Finding("broker", "ok", found), answers
    detail = f"{found} drops messages when it is full (maxmemory-policy {server['eviction']})"
    return Finding("broker", "warning", detail, "set maxmemory-policy to noeviction"), answers


def _beats(database: Database) -> dict[str, Beat]:
    """Return the row of each worker, by name; of several with the same name, the one with the newest heartbeat."""
    with database.read() as session:
        present = now(session)
        rows = sorted(repository.all_workers(session), key=lambda row: row.seen_at)
    return {
        row.name: Beat(tuple(row.queues), row.draining, max(0.0, (present - row.seen_at).total_seconds()))
        for row in rows
    }


def _workers(
    beats: Mapping[str, Beat] | None, answers: Mapping[str, Answer] | None, settings: Settings
) -> Iterator[Finding]:
    """Yield the workers of each queue, and the problem of a worker that only one of database and broker knows.

    None: that service does not answer, and only the other one counts.
    """
    troubles: list[Finding] = []
    taking: dict[str, tuple[str, ...]] = {}
    draining: dict[str, tuple[str, ...]] = {}
    own = version("defeat-service")
    for name in sorted({*(beats or ()), *(answers or ())}):
        beat, answer = (beats or {}).get(name), (answers or {}).get(name)
        trouble = _trouble(name, beat, answer, settings, database=beats is not None, broker=answers is not None)
        if trouble is not None:
            troubles.append(trouble)
        else:
            queues = beat.queues if beat is not None else answer.queues if answer is not None else ()
            (draining if beat is not None and beat.draining else taking)[name] = queues
        if answer is not None and answer.version != own:
            detail = f"runs version {answer.version or 'unknown, an old one'}, but this is {own}"
            troubles.append(Finding(f"version of {name}", "warning", detail, "install the same version everywhere"))
    for wanted in QUEUES:
        takers = [name for name, queues in taking.items() if wanted in queues]
        yield _queue(wanted, takers, [name for name, queues in draining.items() if wanted in queues])
    yield from troubles


def _trouble(
    name: str, beat: Beat | None, answer: Answer | None, settings: Settings, *, database: bool, broker: bool
) -> Finding | None:
    """Return the problem of a worker by its row in the database and its answer on the broker, if these are known."""
    check = f"worker {name}"
    silent = beat is not None and beat.age_s > settings.lease_s
    heartbeat = f"its last heartbeat was {beat.age_s:.0f} s ago" if beat is not None else "it is not registered"
    if database and answer is not None and (beat is None or silent):
        detail = f"answers on the broker, but does not reach the database: {heartbeat}"
        return Finding(check, "wrong", detail, "check its log, its DATABASE_URL and the network from there")
    if silent:
        advice = "check whether it was killed, and restart it; another worker takes over its row"
        return Finding(check, "warning", f"has stopped: {heartbeat}", advice)
    # A worker that drains receives no messages once it has begun to end.
    if broker and answer is None and beat is not None and not beat.draining:
        detail = "reaches the database, but does not answer on the broker, so no message wakes it"
        return Finding(check, "wrong", detail, "check its log, its REDIS_URL and the network from there; restart it")
    return None


def _queue(wanted: str, takers: Sequence[str], draining: Sequence[str]) -> Finding:
    check, start = f"workers for {wanted}", f"start one: python -m worker --queues {wanted}"
    drained = f"draining: {', '.join(draining)}"
    if takers:
        return Finding(check, "ok", "; ".join([", ".join(takers), *([drained] if draining else [])]))
    if draining:
        advice = f"defeat admin workers --undrain {draining[0]}, or {start}"
        return Finding(check, "wrong", f"none is running that claims new rows; {drained}", advice)
    return Finding(check, "wrong", f"none is running for queue `{wanted}`", start)


def _print_line(finding: Finding) -> None:
    print(f"{_MARKS[finding.state]}  {finding.check}: {finding.detail}", flush=True)
    if finding.advice and finding.state != "ok":
        print(f"         -> {finding.advice}", flush=True)


def _worst(findings: Sequence[Finding]) -> State:
    states = {finding.state for finding in findings}
    return "wrong" if "wrong" in states else "warning" if "warning" in states else "ok"


def main(arguments: list[str] | None = None) -> int:
    """Run all checks, print the findings and return the exit code."""
    parser = argparse.ArgumentParser(prog="defeat doctor", description="Checks what the service needs.")
    parser.add_argument("--json", action="store_true", help="print one JSON object: status and checks")
    options = parser.parse_args(arguments)
    try:
        settings = Settings()
    except ValidationError as error:
        parser.error(str(error))
    findings: list[Finding] = []
    for finding in examine(settings):
        findings.append(finding)
        if not options.json:
            _print_line(finding)
    worst = _worst(findings)
    if options.json:
        print(json.dumps({"status": worst, "checks": [asdict(finding) for finding in findings]}))
    return 1 if worst == "wrong" else 0


if __name__ == "__main__":
    sys.exit(main())
