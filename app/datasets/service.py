"""Datasets: creating, reading and deleting them."""

from sqlalchemy.orm import Session

from app import assets
from app.datasets import repository
from app.datasets.references import check_reference
from app.datasets.schemas import DatasetCreate, ReferenceSource
from app.db import after_commit
from app.errors import Conflict, NotFound
from app.http.auth import Caller
from app.http.uploads import discard_prefix
from app.ids import new_id
from app.models import Dataset
from app.queue.messages import Queue
from app.settings import Settings
from app.states import AWAITING_UPLOAD, CHECKING, QUEUED
from app.storage import Storage
from app.usage import quotas


class DatasetInUse(Conflict):
    """A job refers to the dataset."""

    code, title = "dataset_in_use", "Dataset in use"


def create(session: Session, caller: Caller, body: DatasetCreate, settings: Settings, queue: Queue) -> Dataset:
    """Create a dataset that awaits its upload, or one from a reference, whose check is queued at once.

    Raises `ReferenceNotAllowed`, `QuotaExceeded`, `QuotaBusy`.
    """
    source = body.source.model_dump()
    referenced = isinstance(body.source, ReferenceSource)
    if isinstance(body.source, ReferenceSource):
        source["uri"] = check_reference(settings, body.source.uri)
    quotas.check(session, settings, caller.tenant_id, "datasets")
    quotas.check(session, settings, caller.tenant_id, "storage_bytes" if referenced else "uploads")
    row = Dataset(
        id=new_id("ds"),
        tenant_id=caller.tenant_id,
        name=body.name,
        status=QUEUED if referenced else AWAITING_UPLOAD,
        source=source,
        max_dropped_fraction=body.max_dropped_fraction,
        attempt=0,
    )
    session.add(row)
    if referenced:
        queue.enqueue(session, row)
    session.flush()
    return row


def get(session: Session, caller: Caller, dataset_id: str) -> Dataset:
    """Return the caller's dataset. Raises `NotFound`."""
    return assets.found(repository.find(session, caller.tenant_id, assets.checked_id(dataset_id)), dataset_id)


def get_report(session: Session, caller: Caller, dataset_id: str) -> dict[str, object]:
    """Return the report of the check. Raises `NotFound` if there is none yet; the detail has the dataset's status."""
    row = get(session, caller, dataset_id)
    if row.report is None:
        raise NotFound(f"{row.id} has no report: it is {row.status}; the check writes the report")
    return row.report


def delete(session: Session, caller: Caller, dataset_id: str, storage: Storage) -> None:
    """Delete the dataset, and its objects after the commit.

    Raises `NotFound`; `DatasetInUse` while any job refers to it, ended or not, because a job's results need its
    dataset to be understood; `Conflict` during its check.
    """
    row = repository.find_to_delete(session, caller.tenant_id, assets.checked_id(dataset_id))
    row = assets.found(row, dataset_id)
    if jobs := repository.jobs_using(session, row.id):
        raise DatasetInUse(
            f"{row.id} is used by {assets.listed(jobs)}; a dataset that a job refers to cannot be deleted"
        )
    if row.status == CHECKING:
        raise Conflict(f"{row.id} is being checked; delete it once the check has ended")
    session.delete(row)
    after_commit(session, lambda: discard_prefix(storage, f"datasets/{dataset_id}"))
