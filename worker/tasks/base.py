"""What a supervisor must know of the kind of row that it works on."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal

from sqlalchemy.orm import Session

from app.db import Database
from app.queue.leases import Row
from app.settings import Settings
from app.storage import ObjectMissing, Storage, Stored
from defeat.engine.report import FailureClass, RunError
from worker.rundir import Event, ResultArtifact, RunDirectory

Status = Literal["succeeded", "failed", "cancelled"]


@dataclass(frozen=True)
class Context:
    """What every adapter works with."""

    database: Database
    storage: Storage
    settings: Settings


@dataclass(frozen=True)
class Request:
    """What a run is asked to do: `run.json` without the row's id and attempt."""

    kind: str
    spec: Mapping[str, Any]
    inputs: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `failure` is in the API's shape: class, code, detail, log_tail."""

    status: Status
    results: Mapping[str, Any] = field(default_factory=dict)
    failure: dict[str, Any] | None = None
    artifacts: Sequence[ResultArtifact] = ()

    @classmethod
    def failed(cls, failure_class: FailureClass, code: str, detail: str, *, log_tail: Sequence[str] = ()) -> "Outcome":
        """Return a failure."""
        failure = {"class": failure_class, "code": code, "detail": detail, "log_tail": list(log_tail)}
        return cls("failed", failure=failure)


class Adapter(ABC, Generic[Row]):
    """One kind of leased row: how its run is asked for, and where what it says and leaves goes.

    Only `record`, `keep_checkpoint` and `finish` may write to the database, within the session they get, which has
    just verified the lease. The others may be called in another thread and may block on the object store.
    """

    model: ClassVar[Any]

    def __init__(self, context: Context) -> None:
        self.database = context.database
        self.storage = context.storage
        self.settings = context.settings

    @abstractmethod
    def prepare(self, row: Row, directory: Path, resources: ExitStack) -> Request:
        """Fetch the run's inputs and return its request. What `resources` holds is released after the run.

        Raises `RunError` for what cannot be run, `ObjectMissing` or `OSError` for what cannot be fetched.
        """

    def record(self, session: Session, row: Row, events: Sequence[Event]) -> None:
        """Write what the run said. Kinds without a history have nothing to write."""

    def checkpoint_key(self, row: Row, number: int) -> str | None:
        """Return where the attempt's training checkpoint of this number goes; None: this kind keeps none."""
        del row, number
        return None

    def keep_checkpoint(self, session: Session, row: Row, key: str) -> str | None:
        """Make the object `key` what another attempt goes on from; return the key it replaces."""
        raise NotImplementedError(f"{type(self).__name__} keeps no checkpoints")

    def lighten(self, row: Row) -> tuple[dict[str, Any], str] | None:
        """Return the columns that let another attempt take less memory, and what they change in words, or None."""
        del row
        return None

    def memory_hint(self, row: Row, code: str) -> str:
        """Say what to change after memory ran out, by the failure's code; empty: the run has said all there is."""
        del row, code
        return ""

    def goes_on(self, row: Row) -> str:
        """Say in words where another attempt begins."""
        del row
        return "from the beginning"

    def at_rest(self, row: Row) -> dict[str, Any]:
        """Return the columns that change when the row is given back and nobody works on it."""
        del row
        return {}

    def complete(self, outcome: Outcome, directory: RunDirectory) -> Outcome:
        """Return the outcome with what is to be read from the run's files. Raises `BadResult`."""
        del directory
        return outcome

    @abstractmethod
    def upload(self, row: Row, outcome: Outcome, directory: RunDirectory) -> dict[str, Stored]:
        """Store what the run left, under keys of this attempt's own, and return it by name.

        Raises `OSError`. May be called again after an error.
        """

    @abstractmethod
    def finish(self, session: Session, row: Row, outcome: Outcome, uploaded: Mapping[str, Stored]) -> None:
        """Record the end, in one fenced write with everything that belongs to it."""

    def tidy(self, row: Row, outcome: Outcome, uploaded: Mapping[str, Stored]) -> None:
        """Delete objects that nobody needs after the recorded end. Raises `OSError`."""

    def fetch(self, key: str, path: Path, what: str) -> str:
        """Write the object `key` to `path` and return the path as text. Raises `RunError` if there is none."""
        try:
            self.storage.get_file(key, path)
        except ObjectMissing as error:
            raise RunError("infra", "object_missing", f"{what} is not in the object store any more ({key})") from error
        return str(path)
