"""Keeps a run's newest training checkpoint in the object store, for another attempt to go on from."""

from collections.abc import Callable
from concurrent.futures import Executor, Future

import structlog

from app.storage import Storage
from worker.rundir import CheckpointOffer, Message, RunDirectory

log = structlog.get_logger(__name__)


class CheckpointKeeper:
    """Uploads offered checkpoints one at a time, the newest first; what is overtaken meanwhile is left out.

    The caller polls `ready`, records that key, and then calls `recorded`.

    Attributes:
        warnings: uploads that failed, as messages to be recorded. Losing one costs time, not the run.
    """

    def __init__(
        self, storage: Storage, directory: RunDirectory, executor: Executor, key_of: Callable[[int], str | None]
    ) -> None:
        self._storage = storage
        self._directory = directory
        self._executor = executor
        self._key_of = key_of
        self._number = 0
        self._offer: CheckpointOffer | None = None
        self._uploading: Future[str] | None = None
        self.warnings: list[Message] = []

    @property
    def idle(self) -> bool:
        """Whether nothing is waiting, being uploaded, or to be recorded."""
        return self._offer is None and self._uploading is None and not self.warnings

    def offer(self, offer: CheckpointOffer) -> None:
        """Take a checkpoint; it replaces one that still waits."""
        self._offer = offer

    def drop_waiting(self) -> None:
        """Forget the checkpoint that waits: nobody will go on from it."""
        self._offer = None

    def ready(self) -> str | None:
        """Start the next upload if one waits; return the key of a finished one that is to be recorded."""
        if self._uploading is None:
            self._start_next()
            return None
        if not self._uploading.done():
            return None
        try:
            return self._uploading.result()
        except (OSError, ValueError) as error:
            log.warning("checkpoint_not_kept", error=str(error))
            text = f"a training checkpoint could not be kept for another attempt: {error}"
            origin = f"checkpoint {self._number}"
            self.warnings.append(Message(level="warn", code="checkpoint_not_kept", message=text, origin=origin))
            self._uploading = None
            return None

    def _start_next(self) -> None:
        if self._offer is None:
            return
        offer, self._offer = self._offer, None
        key = self._key_of(self._number + 1)
        if key is not None:
            self._number += 1
            self._uploading = self._executor.submit(self._upload, key, offer.path)

    def _upload(self, key: str, name: str) -> str:
        return self._storage.put_file(key, self._directory.file(name)).key

    def recorded(self, replaced: str | None) -> None:
        """Go on after the ready key was recorded; the object that it replaces is deleted."""
        self._uploading = None
        if replaced is not None:
            self._executor.submit(self._delete, replaced)

    def _delete(self, key: str) -> None:
        try:
            self._storage.delete(key)
        except OSError as error:
            log.warning("old_checkpoint_not_deleted", key=key, error=str(error))
