"""The rules of retention. Each processes a bounded number of rows in the given transaction.

A rule selects and locks its rows in one statement (PostgreSQL skips rows that others have locked; SQLite has one
writer), and deletes objects in `after_commit`. So several processes may apply the rules at once, and a rollback undoes
everything, which makes a dry run.
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
"""Most rows that a rule processes at once."""

Row = TypeVar("Row", bound=Leased)
ASSETS: Final[tuple[type[Dataset] | type[Checkpoint], ...]] = (Dataset, Checkpoint)


@dataclass(frozen=True)
class Removed:
    """What a rule deleted (ids or keys), and whether there may be more."""

    names: Sequence[str]
    more: bool = False


@dataclass(frozen=True)
class Rule:
    """A rule and its setting `keep_…_s`; None: the rule is off.

    Attributes:
        setting: the setting's name.
        apply: deletes a bounded part of what is older than the given time.
    """

    setting: str
    apply: Callable[[Session, Storage, Settings, datetime], Removed]

    def run(self, session: Session, storage: Storage, settings: Settings) -> Removed:
        """Apply the rule, unless it is off."""
        keep_s: float | None = getattr(settings, self.setting)
        if keep_s is None:
            return Removed(())
        return self.apply(session, storage, settings, utcnow() - timedelta(seconds=keep_s))


def take(session: Session, model: type[Row], *which: ColumnElement[bool], limit: int = LIMIT) -> Sequence[Row]:
    """Return rows and lock them until this transaction ends."""
    return session.scalars(select(model).where(*which).limit(limit).with_for_update(skip_locked=True)).all()


def _discard_later(session: Session, storage: Storage, keys: Sequence[str]) -> None:
    def _discard() -> None:
        for key in keys:
            discard(storage, key)

    after_commit(session, _discard)


def training_checkpoints(session: Session, storage: Storage, settings: Settings, before: datetime) -> Removed:
    """Delete training checkpoints of ended jobs: a retry then begins from the start."""
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
    """Delete datasets and checkpoints whose content was never uploaded."""
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
    """Delete the uploads of failed checks; the rows stay, with their failure."""
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
    """Delete trained teachers that no job's spec names and that were not downloaded recently.

    The job that trained one still has it as an artifact.
    """
    del settings
    wanted = func.coalesce(Checkpoint.downloaded_at, Checkpoint.finished_at, Checkpoint.created_at)
    trained = (Checkpoint.source_job_id.is_not(None), Checkpoint.status == READY, wanted < before)
    of_tenant = Job.tenant_id == Checkpoint.tenant_id
    unnamed = [~exists().where(of_tenant, Job.spec[path].as_string() == Checkpoint.id) for path in NAMED_AT]
    rows = take(session, Checkpoint, *trained, *unnamed)
    # Checked again under the locks: a job may have been created since the statement began. Creating one now waits for
    # this transaction, and then finds no checkpoint.
    names = [row.id for row in rows if not jobs_using(session, row.tenant_id, [row.id])]
    _delete_assets(session, storage, Checkpoint, names)
    return Removed(names, len(rows) == LIMIT)
