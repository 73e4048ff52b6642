"""The common part of the handlers for datasets and checkpoints."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from sqlalchemy.orm import Session

from app.models import Checkpoint, Dataset
from app.queue import leases
from app.states import FAILED, INVALID, READY
from app.storage import Stored
from worker.rundir import BadResult, RunDirectory
from worker.tasks.base import Handler, Outcome

Asset = TypeVar("Asset", Dataset, Checkpoint)


class AssetHandler(Handler[Asset]):
    """A row that becomes `ready` if its run succeeds, `invalid` if its upload is at fault, else `failed`."""

    artifact: ClassVar[str]  # the run's file that is stored as the asset
    needed: ClassVar[tuple[str, ...]]  # results that a success must have
    at_fault: ClassVar[frozenset[str]]  # failure classes for which the upload is at fault

    def asset_key(self, row: Asset) -> str:
        """Return the object key for this attempt's asset."""
        folder, _, suffix = self.artifact.partition(".")
        return f"{row.__tablename__}/{row.id}/{folder}-{row.attempt}.{suffix}"

    def complete(self, outcome: Outcome, directory: RunDirectory) -> Outcome:
        """Raise `BadResult` for a success without its file or one of its results."""
        if outcome.status == "succeeded":
            missing = [name for name in self.needed if name not in outcome.results]
            if not directory.file(f"artifacts/{self.artifact}").is_file():
                missing.append(self.artifact)
            if missing:
                raise BadResult(f"the run reported success without {', '.join(missing)}")
        return outcome

    @abstractmethod
    def values(self, outcome: Outcome, stored: Stored | None) -> dict[str, Any]:
        """Return the columns with the run's results, of a failure too; `stored` is the asset of a success."""

    def upload(self, row: Asset, outcome: Outcome, directory: RunDirectory) -> dict[str, Stored]:
        """Store the asset of a success."""
        if outcome.status != "succeeded":
            return {}
        path = directory.file(f"artifacts/{self.artifact}")
        return {self.artifact: self.storage.put_file(self.asset_key(row), path)}

    def finish(self, session: Session, row: Asset, outcome: Outcome, uploaded: Mapping[str, Stored]) -> None:
        """Record the asset, or the reason why there is none."""
        stored = uploaded.get(self.artifact)
        values = self.values(outcome, stored)
        if stored is not None:
            values |= {"storage_key": stored.key, "size_bytes": stored.size_bytes, "upload_key": None}
            leases.finish(session, row, status=READY, failure=None, **values)
            return
        failure = outcome.failure or {
            "class": "infra",
            "code": "run_terminated",
            "detail": "the check was cancelled before it was complete",
            "log_tail": [],
        }
        invalid = failure["class"] in self.at_fault
        values |= {"upload_key": None} if invalid else {}
        leases.finish(session, row, status=INVALID if invalid else FAILED, failure=failure, **values)

    def clean_up(self, row: Asset, outcome: Outcome, uploaded: Mapping[str, Stored]) -> None:
        """Delete the objects of earlier attempts, and the upload once it was checked.

        The upload of a row that failed for another reason stays, so that the operator can examine it.
        """
        keep = {stored.key for stored in uploaded.values()}
        checked = outcome.status == "succeeded" or (outcome.failure or {}).get("class") in self.at_fault
        if not checked and row.upload_key is not None:
            keep.add(row.upload_key)
        for key in self.storage.list(f"{row.__tablename__}/{row.id}"):
            if key not in keep:
                self.storage.delete(key)
