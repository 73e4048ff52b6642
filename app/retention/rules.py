"""What may go: each rule does a bounded part of its work in the transaction that it is given.

A rule locks the rows that it takes (on PostgreSQL it skips those that others hold; SQLite has one writer), asks its
conditions in the same statement, and leaves objects to `after_commit`. So any number of processes may run them at
once, and rolled back they have done nothing: that is a dry run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, TypeVar

from sqlalchemy import ColumnElement, delete, exists, func, select
from sqlalchemy.orm import Session

from app.checkpoints.repository import NAMED_AT, jobs_using
from app.db import after_commit, update_count, utcnow
from app.http.uploads import discard, discard_prefix
from app.models import Checkpoint, Dataset, Job, Leased
from app.settings import Settings
from app.states import AWAITING_UPLOAD, FAILED, JOB_TERMINAL, READY
from app.storage import Storage

LIMIT: Final = 200
"""Rows that a rule takes at once."""

Row = TypeVar("Row", bound=Leased)
ASSETS: Final[tuple[type[Dataset] | type[Checkpoint], ...]] = (Dataset, Checkpoint)


@dataclass(frozen=True)
class Removed:
    """What a rule did: what it removed, by name, and whether there may be more of it."""

    names: Sequence[str]
    more: bool = False


@dataclass(frozen=True)
class Rule:
    """A rule that the operator's setting `keep_…_s` switches on; None: for ever.

    Attributes:
        setting: its name.
        apply: does a part of the work on what is older than a time.
    """

    setting: str
    apply: Callable[[Session, Storage, Settings, datetime], Removed]

    def run(self, session: Session, storage: Storage, settings: Settings) -> Removed:
        """Apply the rule if the operator wants it."""
        keep_s: float | None = getattr(settings, self.setting)
        if keep_s is None:
            return Removed(())
        return self.apply(session, storage, settings, utcnow() - timedelta(seconds=keep_s))


def take(session: Session, model: type[Row], *which: ColumnElement[bool], limit: int = LIMIT) -> Sequence[Row]:
    """Return rows that nobody else changes before this transaction ends."""
    return session.scalars(select(model).where(*which).limit(limit).with_for_update(skip_locked=True)).all()


def _discard_later(session: Session, storage: Storage, keys: Sequence[str]) -> None:
    def _discard() -> None:
        for key in keys:
            discard(storage, key)

    after_commit(session, _discard)


def training_checkpoints(session: Session, storage: Storage, settings: Settings, before: datetime) -> Removed:
    """Delete what a job that ended long ago could go on from."""
    del settings
    ended = (Job.status.in_(JOB_TERMINAL), Job.finished_at < before, Job.resume_key.is_not(None))
    rows = take(session, Job, *ended)
    keys = [row.resume_key for row in rows if row.resume_key is not None]
    for row in rows:
        row.resume_key = None
    session.flush()
    _discard_later(session, storage, keys)
    return Removed(keys, len(rows) == LIMIT)


def empty_uploads(session: Session, storage: Storage, settings: Settings, before: datetime) -> Removed:
    """Delete datasets and checkpoints whose content never came."""
    del settings
    names: list[str] = []
    more = False
    for model in ASSETS:
        rows = take(session, model, model.status == AWAITING_UPLOAD, model.created_at < before)
        _delete_assets(session, storage, model, [row.id for row in rows])
        names += [row.id for row in rows]
        more |= len(rows) == LIMIT
    return Removed(names, more)


def _delete_assets(
    session: Session, storage: Storage, model: type[Dataset] | type[Checkpoint], ids: Sequence[str]
) -> None:
    def _discard() -> None:
        for row_id in ids:
            discard_prefix(storage, f"{model.__tablename__}/{row_id}")

    update_count(session, delete(model).where(model.id.in_(ids)))
    after_commit(session, _discard)


def failed_uploads(session: Session, storage: Storage, settings: Settings, before: datetime) -> Removed:
    """Delete the uploads of checks that failed long ago; their rows stay, and say why."""
    del settings
    keys: list[str] = []
    more = False
    for model in ASSETS:
        failed = (model.status == FAILED, model.finished_at < before, model.upload_key.is_not(None))
        rows = take(session, model, *failed)
        keys += [row.upload_key for row in rows if row.upload_key is not None]
        for row in rows:
            row.upload_key = row.upload_bytes = None
        more |= len(rows) == LIMIT
    session.flush()
    _discard_later(session, storage, keys)
    return Removed(keys, more)


def teachers(session: Session, storage: Storage, settings: Settings, before: datetime) -> Removed:
    """Delete trained teachers that no job's spec names and that nobody has downloaded lately.

    The job that trained one keeps it as an artifact all the same.
    """
    del settings
    wanted = func.coalesce(Checkpoint.downloaded_at, Checkpoint.finished_at, Checkpoint.created_at)
    trained = (Checkpoint.source_job_id.is_not(None), Checkpoint.status == READY, wanted < before)
    of_tenant = Job.tenant_id == Checkpoint.tenant_id
    unnamed = [~exists().where(of_tenant, Job.spec[path].as_string() == Checkpoint.id) for path in NAMED_AT]
    rows = take(session, Checkpoint, *trained, *unnamed)
    # Asked again behind the locks: a job may have been made since the statement began. From now on one that is made
    # waits for this transaction, and then finds no checkpoint.
    names = [row.id for row in rows if not jobs_using(session, row.tenant_id, [row.id])]
    _delete_assets(session, storage, Checkpoint, names)
    return Removed(names, len(rows) == LIMIT)
