"""What importing a dataset and checking a checkpoint have in common."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from sqlalchemy.orm import Session

from app.models import Checkpoint, Dataset
from app.queue import leases
from app.states import FAILED, INVALID, READY
from app.storage import Stored
from worker.rundir import BadResult, RunDirectory
from worker.tasks.base import Adapter, Outcome

Asset = TypeVar("Asset", Dataset, Checkpoint)


class AssetAdapter(Adapter[Asset]):
    """A row that becomes `ready` when its run succeeds, `invalid` when its upload is at fault, else `failed`."""

    artifact: ClassVar[str]  # the run's file that is the asset
    needed: ClassVar[tuple[str, ...]]  # results without which it is none
    at_fault: ClassVar[frozenset[str]]  # failure classes that mean that the upload is at fault

    def asset_key(self, row: Asset) -> str:
        """Return where this attempt's asset goes."""
        folder, _, suffix = self.artifact.partition(".")
        return f"{row.__tablename__}/{row.id}/{folder}-{row.attempt}.{suffix}"

    def complete(self, outcome: Outcome, directory: RunDirectory) -> Outcome:
        """Raise `BadResult` for a success without everything that makes one."""
        if outcome.status == "succeeded":
            missing = [name for name in self.needed if name not in outcome.results]
            if not directory.file(f"artifacts/{self.artifact}").is_file():
                missing.append(self.artifact)
            if missing:
                raise BadResult(f"the run says that it succeeded, but left no {', '.join(missing)}")
        return outcome

    @abstractmethod
    def values(self, outcome: Outcome, stored: Stored | None) -> dict[str, Any]:
        """Return the columns that the run fills in, whether it succeeded or not; `stored` is the asset if it did."""

    def upload(self, row: Asset, outcome: Outcome, directory: RunDirectory) -> dict[str, Stored]:
        """Store the asset if there is one to be had."""
        if outcome.status != "succeeded":
            return {}
        path = directory.file(f"artifacts/{self.artifact}")
        return {self.artifact: self.storage.put_file(self.asset_key(row), path)}

    def finish(self, session: Session, row: Asset, outcome: Outcome, uploaded: Mapping[str, Stored]) -> None:
        """Record the asset or why there is none."""
        stored = uploaded.get(self.artifact)
        values = self.values(outcome, stored)
        if stored is not None:
            values |= {"storage_key": stored.key, "size_bytes": stored.size_bytes, "upload_key": None}
            leases.finish(session, row, status=READY, failure=None, **values)
            return
        failure = outcome.failure or {
            "class": "infra",
            "code": "run_terminated",
            "detail": "the check was told to end before it was through",
            "log_tail": [],
        }
        invalid = failure["class"] in self.at_fault
        values |= {"upload_key": None} if invalid else {}
        leases.finish(session, row, status=INVALID if invalid else FAILED, failure=failure, **values)

    def tidy(self, row: Asset, outcome: Outcome, uploaded: Mapping[str, Stored]) -> None:
        """Delete the upload once it has been judged, and what earlier attempts left.

        The upload of a row that failed for another reason stays, for the operator to look at.
        """
        keep = {stored.key for stored in uploaded.values()}
        judged = outcome.status == "succeeded" or (outcome.failure or {}).get("class") in self.at_fault
        if not judged and row.upload_key is not None:
            keep.add(row.upload_key)
        for key in self.storage.list(f"{row.__tablename__}/{row.id}"):
            if key not in keep:
                self.storage.delete(key)
