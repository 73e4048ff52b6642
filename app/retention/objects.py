"""Finds orphaned objects, which no row refers to: a process was killed before it recorded or deleted them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.models import Artifact, Checkpoint, Dataset, Job
from app.states import ASSET_TERMINAL, JOB_TERMINAL
from app.storage import Found, Storage

FOLDERS: Final = ("checkpoints", "datasets", "jobs", "ping")
"""The service's folders in the store. Other folders are never touched."""
BATCH: Final = 1000


@dataclass(frozen=True)
class Scan:
    """The result of scanning one batch of objects.

    Attributes:
        orphans: the objects to delete.
        cursor: where the next scan continues; None: the store has been scanned to its end.
    """

    orphans: Sequence[Found]
    cursor: str | None


def scan(session: Session, storage: Storage, cursor: str | None, before: datetime) -> Scan:
    """Scan the next objects after `cursor`; return those written before `before` that no row refers to.

    All objects of a row that a worker may be processing are kept.
    """
    folder = (cursor or FOLDERS[0]).split("/")[0]
    found = storage.scan(folder, after=cursor, limit=BATCH)
    old = [one for one in found if one.written_at < before]
    orphans = _orphans(session, folder, old)
    if len(found) == BATCH:
        return Scan(orphans, found[-1].key)
    later = FOLDERS[FOLDERS.index(folder) + 1 :]
    return Scan(orphans, later[0] if later else None)


def _orphans(session: Session, folder: str, found: Sequence[Found]) -> list[Found]:
    if folder == "ping":
        return list(found)
    owners = sorted({_owner(one) for one in found})
    if folder == "jobs":
        busy, kept = _jobs(session, owners)
        kept |= _artifacts(session, [one.key for one in found])
    else:
        busy, kept = _assets(session, Dataset if folder == "datasets" else Checkpoint, owners)
    if folder == "checkpoints":
        # A job that trains its teacher stores it under the id of the checkpoint that it will create.
        makers, _ = _jobs(session, ["job_" + owner.removeprefix("ckpt_") for owner in owners])
        busy |= {"ckpt_" + maker.removeprefix("job_") for maker in makers}
    return [one for one in found if _owner(one) not in busy and one.key not in kept]


def _owner(found: Found) -> str:
    parts = found.key.split("/")
    return parts[1] if len(parts) > 1 else ""


def _keys(keys: Iterable[str | None]) -> set[str]:
    return {key for key in keys if key is not None}


def _jobs(session: Session, ids: Sequence[str]) -> tuple[set[str], set[str]]:
    """Return the ids of the jobs that have not ended, and the keys of all their training checkpoints."""
    rows = session.execute(select(Job.id, Job.status, Job.resume_key).where(Job.id.in_(ids))).all()
    return {row.id for row in rows if row.status not in JOB_TERMINAL}, _keys(row.resume_key for row in rows)


def _artifacts(session: Session, keys: Sequence[str]) -> set[str]:
    # By job id: the key has no index.
    jobs = sorted({key.split("/")[1] for key in keys if "/" in key})
    return set(session.scalars(select(Artifact.storage_key).where(Artifact.job_id.in_(jobs))))


def _assets(session: Session, model: type[Dataset] | type[Checkpoint], ids: Sequence[str]) -> tuple[set[str], set[str]]:
    """Return the ids of the rows that a worker or an upload may be processing, and the keys that the rows refer to."""
    columns = select(model.id, model.status, model.upload_key, model.storage_key).where(model.id.in_(ids))
    rows = session.execute(columns).all()
    kept = _keys(key for row in rows for key in (row.upload_key, row.storage_key))
    return {row.id for row in rows if row.status not in ASSET_TERMINAL}, kept
