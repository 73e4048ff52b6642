"""The interface between the supervisor and one kind of row."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic

from sqlalchemy.orm import Session

from app.db import Database
from app.queue.leases import Row
from app.settings import Settings
from app.storage import ObjectMissing, Storage, Stored
from defeat.engine.events import FailureClass, ResultArtifact, Status
from defeat.engine.report import RunError
from worker.rundir import RecordedEvent, RunDirectory


@dataclass(frozen=True)
class Context:
    """Database, object store and settings, as every handler uses them."""

    database: Database
    storage: Storage
    settings: Settings


@dataclass(frozen=True)
class Request:
    """The request to a run: `run.json` without the row's id and attempt."""

    kind: str
    spec: Mapping[str, Any]
    inputs: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `failure` has the members of the API: class, code, detail, log_tail."""

    status: Status
    results: Mapping[str, Any] = field(default_factory=dict)
    failure: dict[str, Any] | None = None
    artifacts: Sequence[ResultArtifact] = ()

    @classmethod
    def failed(cls, failure_class: FailureClass, code: str, detail: str, *, log_tail: Sequence[str] = ()) -> "Outcome":
        """Return the outcome of a failure."""
        failure = {"class": failure_class, "code": code, "detail": detail, "log_tail": list(log_tail)}
        return cls("failed", failure=failure)


class Handler(ABC, Generic[Row]):
    """One kind of leased row: the request for its run, and where the run's events and results go.

    Only `record`, `keep_checkpoint` and `finish` may write to the database, in the session that they receive, which has
    verified the lease. The other methods may be called in another thread and may block on the object store.
    """

    model: ClassVar[Any]

    def __init__(self, context: Context) -> None:
        self.database = context.database
        self.storage = context.storage
        self.settings = context.settings

    @abstractmethod
    def prepare(self, row: Row, directory: Path, cleanup: ExitStack) -> Request:
        """Fetch the run's inputs and return its request. `cleanup` releases what it holds after the run.

        Raises `RunError` for a row that cannot be run, `ObjectMissing` or `OSError` for an input that it cannot fetch.
        """

    def record(self, session: Session, row: Row, events: Sequence[RecordedEvent]) -> None:
        """Write the run's events. The default writes nothing, for rows without a history."""

    def checkpoint_key(self, row: Row, number: int) -> str | None:
        """Return the object key for the attempt's training checkpoint of this number; None: this kind keeps none."""
        del row, number
        return None

    def keep_checkpoint(self, session: Session, row: Row, key: str) -> str | None:
        """Let the next attempt resume from the object `key`; return the key that it replaces."""
        raise NotImplementedError(f"{type(self).__name__} keeps no checkpoints")

    def reduce_memory(self, row: Row) -> tuple[dict[str, Any], str] | None:
        """Return the columns that make another attempt need less memory, and their description, or None."""
        del row
        return None

    def memory_advice(self, row: Row, code: str) -> str:
        """Return what to change after memory was exhausted, by the failure's code; empty: no advice."""
        del row, code
        return ""

    def resume_point(self, row: Row) -> str:
        """Return in words where another attempt begins."""
        del row
        return "from the beginning"

    def idle_values(self, row: Row) -> dict[str, Any]:
        """Return the columns that change when no worker works on the row any more."""
        del row
        return {}

    def complete(self, outcome: Outcome, directory: RunDirectory) -> Outcome:
        """Return the outcome, completed from the run's files. Raises `BadResult`."""
        del directory
        return outcome

    @abstractmethod
    def upload(self, row: Row, outcome: Outcome, directory: RunDirectory) -> dict[str, Stored]:
        """Store the run's files under keys of this attempt alone, and return them by name.

        Raises `OSError`. May be called again after an error.
        """

    @abstractmethod
    def finish(self, session: Session, row: Row, outcome: Outcome, uploaded: Mapping[str, Stored]) -> None:
        """Record the end and everything that belongs to it in one fenced write."""

    def clean_up(self, row: Row, outcome: Outcome, uploaded: Mapping[str, Stored]) -> None:
        """Delete the objects that are no longer needed after the recorded end. Raises `OSError`."""

    def fetch(self, key: str, path: Path, what: str) -> str:
        """Write the object `key` to `path` and return the path as text. Raises `RunError` if it does not exist."""
        try:
            self.storage.get_file(key, path)
        except ObjectMissing as error:
            raise RunError("infra", "object_missing", f"{what} is no longer in the object store ({key})") from error
        return str(path)
