"""Looks at everything that the service needs and says what is wrong and what would do: `python -m app.ops.doctor`.

Exit code 0: nothing is wrong (there may be warnings); 1: something is; 2: the settings themselves cannot be read.
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
# Amazon S3 and its like refuse a request that was signed this far from their own time.
_SKEW_WRONG_S: Final = 900.0
_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108
# What NCCL may want of it, to exchange the gradients of several GPUs; containers have 64 MiB unless told otherwise.
_LEAST_SHARED_MEMORY: Final = GIB // 2


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: what was looked at.
        state: `wrong` keeps the service or a part of it from working; `warning` will, or loses something.
        detail: what was found.
        advice: what would do; None where nothing need be done.
    """

    check: str
    state: State
    detail: str
    advice: str | None = None


@dataclass(frozen=True)
class Beat:
    """What the table of workers says of one.

    Attributes:
        queues: what it takes.
        draining: whether it takes nothing new.
        age_s: how long ago it was heard of.
    """

    queues: tuple[str, ...]
    draining: bool
    age_s: float


def examine(settings: Settings) -> Iterator[Finding]:
    """Yield what each check finds. Writes and deletes one probe in the object store and one in the scratch space."""
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
            found.append(f"no {name}")  # an API has no torch
    return Finding("versions", "ok", ", ".join(found))


def _secret(settings: Settings) -> Finding:
    if settings.secret.get_secret_value():
        return Finding("secret", "ok", "DEFEAT_SECRET is set")
    if settings.database_url.startswith("sqlite"):
        return Finding("secret", "ok", f"kept in {settings.home / 'secret'}")
    return Finding(
        "secret",
        "warning",
        f"DEFEAT_SECRET is not set, so each machine makes its own under {settings.home}",
        "give every API the same DEFEAT_SECRET, or keys made by one are unknown to the others",
    )


def _scratch(settings: Settings) -> Finding:
    advice = "give DEFEAT_HOME a disk with room for the datasets worked on, three times over"
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
    """Say whether several GPUs could exchange gradients here. Loading images takes none of it."""
    if shutil.which("nvidia-smi") is None:
        return Finding("shared memory", "ok", "not wanted: this machine has no GPUs that would exchange gradients")
    try:
        free = shutil.disk_usage(_SHARED_MEMORY).free
    except OSError as error:
        return Finding("shared memory", "warning", f"{_SHARED_MEMORY} cannot be read: {error.strerror}")
    room = f"{free / GIB:.2f} GiB are free in {_SHARED_MEMORY}"
    advice = "give the container 1 GiB (shm_size in compose, a Memory emptyDir in Kubernetes): NCCL fails without"
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
            "database", "wrong", first_line(error), "start the database, or mend DATABASE_URL and the network to it"
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
    detail = f"the database is at revision {current or 'none'}, and this version needs {head}"
    return Finding("migrations", "wrong", detail, "python -m app.migrate, with the newest version that runs here")


def _clock(skew_s: float) -> Finding:
    detail = f"this machine is {abs(skew_s):.2f} s {'ahead of' if skew_s > 0 else 'behind'} the database"
    advice = "let both keep time by NTP: the times that people read, and signatures for S3, go by this machine's clock"
    if abs(skew_s) > _SKEW_WRONG_S:
        return Finding("clock", "wrong", f"{detail}; an S3 server refuses what is signed so far off", advice)
    return Finding("clock", "warning" if abs(skew_s) > _SKEW_WARNING_S else "ok", detail, advice)


def _storage(settings: Settings) -> Finding:
    try:
        start = time.perf_counter()
        Storage(settings.storage_url).ping()
    except (OSError, ValueError, ObjectMissing) as error:
        advice = "see STORAGE_URL, the AWS_* variables, and what the credentials may do: write, read, list and delete"
        return Finding("storage", "wrong", first_line(error), advice)
    took = time.perf_counter() - start
    return Finding("storage", "ok", f"wrote, read and deleted a probe in {took * 1000:.0f} ms")


def _broker(queue: Queue) -> tuple[Finding, dict[str, Answer] | None]:
    """Return what is found of the broker, and what its workers answer; None: it is away."""
    try:
        server, answers = queue.server(), queue.workers()
    except BROKER_ERRORS as error:
        advice = "start the broker, or mend REDIS_URL and the network to it"
        return Finding("broker", "wrong", first_line(error), advice), None
    found = f"version {server['version']}"
    if server["eviction"] == "noeviction":
        return Finding("broker", "ok", found), answers
    detail = f"{found} drops messages when it is full (maxmemory-policy {server['eviction']})"
    return Finding("broker", "warning", detail, "set maxmemory-policy to noeviction"), answers


def _beats(database: Database) -> dict[str, Beat]:
    """Return what is known of each worker, by name; of several with one name, of the one heard of last."""
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
    """Say who takes each queue, and what is wrong with a worker that only one of database and broker hears of.

    None: that service is away, and the other's word is taken.
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
            detail = f"runs version {answer.version or 'older than its question'}, and this is {own}"
            troubles.append(Finding(f"version of {name}", "warning", detail, "let all be of one version"))
    for wanted in QUEUES:
        takers = [name for name, queues in taking.items() if wanted in queues]
        yield _queue(wanted, takers, [name for name, queues in draining.items() if wanted in queues])
    yield from troubles


def _trouble(
    name: str, beat: Beat | None, answer: Answer | None, settings: Settings, *, database: bool, broker: bool
) -> Finding | None:
    """Return what is wrong with a worker by what it said to the database and to the broker, those that were asked."""
    check = f"worker {name}"
    silent = beat is not None and beat.age_s > settings.lease_s
    heard = f"it was last heard of {beat.age_s:.0f} s ago" if beat is not None else "it is not registered"
    if database and answer is not None and (beat is None or silent):
        detail = f"answers on the broker, but does not reach the database: {heard}"
        return Finding(check, "wrong", detail, "see its log, its DATABASE_URL and the network from there")
    if silent:
        advice = "see whether it was killed, and start it again; its row goes to another worker"
        return Finding(check, "warning", f"is gone: {heard}", advice)
    # One that ends once its work is done hears no messages any more.
    if broker and answer is None and beat is not None and not beat.draining:
        detail = "reaches the database, but does not answer on the broker: no message wakes it"
        return Finding(check, "wrong", detail, "see its log, its REDIS_URL and the network from there; start it again")
    return None


def _queue(wanted: str, takers: Sequence[str], draining: Sequence[str]) -> Finding:
    check, start = f"workers for {wanted}", f"start one: python -m worker --queues {wanted}"
    drained = f"draining: {', '.join(draining)}"
    if takers:
        return Finding(check, "ok", "; ".join([", ".join(takers), *([drained] if draining else [])]))
    if draining:
        advice = f"python -m app.workers --undrain {draining[0]}, or {start}"
        return Finding(check, "wrong", f"none takes anything new; {drained}", advice)
    return Finding(check, "wrong", "none takes this queue", start)


def _print_line(finding: Finding) -> None:
    print(f"{_MARKS[finding.state]}  {finding.check}: {finding.detail}", flush=True)
    if finding.advice and finding.state != "ok":
        print(f"         -> {finding.advice}", flush=True)


def _worst(findings: Sequence[Finding]) -> State:
    states = {finding.state for finding in findings}
    return "wrong" if "wrong" in states else "warning" if "warning" in states else "ok"


def main(arguments: list[str] | None = None) -> int:
    """Check everything and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m app.ops.doctor", description="Checks what the service needs.")
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
