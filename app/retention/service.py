"""Retention. A pass applies each rule to a bounded number of rows, then scans a bounded part of the object store."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Final

import structlog
from sqlalchemy import update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app.db import Database, update_count, utcnow
from app.models import SweepPass
from app.retention import objects
from app.retention.history import reduce_history
from app.retention.rules import Removed, Rule, empty_uploads, failed_uploads, teachers, training_checkpoints
from app.settings import Settings
from app.storage import Found, Storage

log = structlog.get_logger()

NAME: Final = "retention"
RULES: Final[tuple[Rule, ...]] = (
    Rule("keep_training_checkpoints_s", training_checkpoints),
    Rule("keep_empty_uploads_s", empty_uploads),
    Rule("keep_failed_uploads_s", failed_uploads),
    Rule("keep_teachers_s", teachers),
    Rule("keep_history_s", reduce_history),
)
ORPHANS: Final = "keep_orphans_s"
SCANS: Final = 10
"""How many batches of `objects.BATCH` objects one pass scans."""


@dataclass(frozen=True)
class Report:
    """What a pass deleted.

    Attributes:
        removed: ids of rows or keys of objects, by the setting that allowed it.
        orphan_bytes: total size of the orphaned objects, which no row refers to.
        more: whether another pass would find more.
    """

    removed: dict[str, list[str]]
    orphan_bytes: int
    more: bool


class _DryRun(Exception):
    """Rolls the transaction back, and with it the actions after its commit."""


def run_if_due(database: Database, storage: Storage, settings: Settings) -> Report | None:
    """Run a pass, or return None if this or another process began one within `retention_s`.

    Several processes may call it at any time. Raises the database's errors; logs those of the object store.
    """
    due = utcnow() - timedelta(seconds=settings.retention_s)
    with database.read() as session:
        last = session.get(SweepPass, NAME)
    if last is not None and last.began_at > due:
        return None
    with database.write() as session:
        if not begin(session, due):
            return None
    return run(database, storage, settings)


def begin(session: Session, due: datetime) -> bool:
    """Claim the next pass if the last one began at `due` or before; return whether the caller has it."""
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    never = {"name": NAME, "began_at": datetime.fromtimestamp(0, UTC)}
    session.execute(insert(SweepPass).values(never).on_conflict_do_nothing())
    mine = (SweepPass.name == NAME, SweepPass.began_at <= due)
    return update_count(session, update(SweepPass).where(*mine).values(began_at=utcnow())) == 1


def run(database: Database, storage: Storage, settings: Settings, *, dry: bool = False) -> Report:
    """Run one pass and log what it deletes. `dry` deletes nothing and scans the whole object store."""
    removed: dict[str, list[str]] = {}
    more = False
    for rule in RULES:
        done = _apply(database, storage, settings, rule, dry=dry)
        removed[rule.setting] = list(done.names)
        more |= done.more
        _log(rule.setting, done.names, dry=dry)
    orphans, more_objects = _sweep_objects(database, storage, settings, dry=dry)
    removed[ORPHANS] = [one.key for one in orphans]
    _log(ORPHANS, removed[ORPHANS], dry=dry)
    return Report(removed, sum(one.size_bytes for one in orphans), more or more_objects)


def _log(setting: str, names: Sequence[str], *, dry: bool) -> None:
    for name in names:
        log.info("would_be_swept" if dry else "swept", rule=setting, name=name)


def _apply(database: Database, storage: Storage, settings: Settings, rule: Rule, *, dry: bool) -> Removed:
    done = Removed(())
    try:
        with database.write() as session:
            done = rule.run(session, storage, settings)
            if dry:
                raise _DryRun
    except _DryRun:
        return done
    return done


def _sweep_objects(database: Database, storage: Storage, settings: Settings, *, dry: bool) -> tuple[list[Found], bool]:
    """Delete orphans in the next batches of the store; return them, and whether there are more batches."""
    if settings.keep_orphans_s is None:
        return [], False
    before = utcnow() - timedelta(seconds=settings.keep_orphans_s)
    with database.read() as session:
        last = session.get(SweepPass, NAME)
    cursor = None if last is None or dry else last.cursor
    orphans: list[Found] = []
    try:
        for _ in count() if dry else range(SCANS):
            with database.read() as session:
                part = objects.scan(session, storage, cursor, before)
            orphans += part.orphans
            if not dry:
                _delete(database, storage, part)
            cursor = part.cursor
            if cursor is None:
                break
    except OSError as error:
        log.warning("objects_not_swept", error=str(error))
        return orphans, False
    return orphans, cursor is not None


def _delete(database: Database, storage: Storage, part: objects.Scan) -> None:
    for one in part.orphans:
        try:
            storage.discard(one)
        except OSError as error:
            # The next scan finds it again; go on with the others.
            log.warning("object_not_deleted", key=one.key, error=str(error))
    with database.write() as session:
        update_count(session, update(SweepPass).where(SweepPass.name == NAME).values(cursor=part.cursor))
