"""Keeps a run's newest training checkpoint in the object store, so that another attempt can resume from it."""

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future

import structlog

from app.storage import Storage
from defeat.engine.events import CheckpointOffer
from worker.patience import pause_s
from worker.rundir import RecordedMessage, RunDirectory

log = structlog.get_logger(__name__)

_MAX_PAUSE_S = 60.0


class CheckpointUploader:
    """Uploads offered checkpoints one at a time; while it uploads one, only the newest of the others waits.

    It repeats an upload that failed until a newer checkpoint takes its place. The caller polls `finished`, records the
    key that it returns, and then calls `recorded`.

    Args:
        executor: one thread, in which it uploads and deletes.
        backoff_s: pause before an upload is repeated, seconds; doubled each time, up to a minute.
        key_of: returns the object key for the checkpoint of a number; None: this kind of row keeps none.

    Attributes:
        warnings: messages to record about uploads that failed: one for each time that the store stopped answering.
    """

    def __init__(
        self,
        storage: Storage,
        directory: RunDirectory,
        executor: Executor,
        *,
        backoff_s: float,
        key_of: Callable[[int], str | None],
    ) -> None:
        self._storage = storage
        self._directory = directory
        self._executor = executor
        self._backoff_s = backoff_s
        self._key_of = key_of
        self._number = 0
        self._waiting: CheckpointOffer | None = None
        self._current: CheckpointOffer | None = None
        self._upload: Future[str] | None = None
        self._failures = 0
        self._retry_at = 0.0
        self.warnings: list[RecordedMessage] = []

    @property
    def idle(self) -> bool:
        """Whether no checkpoint waits, is being uploaded, or must be recorded."""
        return self._waiting is None and self._upload is None and not self.warnings

    def offer(self, offer: CheckpointOffer) -> None:
        """Take a checkpoint; it replaces one that still waits."""
        self._waiting = offer

    def drop_waiting(self) -> None:
        """Drop the checkpoint that waits, because no attempt will resume from it."""
        self._waiting = None

    def finished(self) -> str | None:
        """Start the next upload if one waits; return the key of a finished upload that the caller must record."""
        if self._upload is None:
            self._start_next()
            return None
        if not self._upload.done():
            return None
        try:
            return self._upload.result()
        except (OSError, ValueError) as error:
            self._put_off(error)
            return None

    def _put_off(self, error: Exception) -> None:
        log.warning("checkpoint_not_kept", error=str(error))
        if not self._failures:
            text = f"the worker could not upload a training checkpoint, and retries: {error}"
            origin = f"checkpoint {self._number}"
            self.warnings.append(RecordedMessage(level="warn", code="checkpoint_not_kept", message=text, origin=origin))
        self._retry_at = time.monotonic() + pause_s(self._backoff_s, self._failures, most_s=_MAX_PAUSE_S)
        self._failures += 1
        self._upload = None
        self._waiting = self._waiting or self._current

    def _start_next(self) -> None:
        if self._waiting is None or time.monotonic() < self._retry_at:
            return
        self._current, self._waiting = self._waiting, None
        key = self._key_of(self._number + 1)
        if key is not None:
            self._number += 1
            self._upload = self._executor.submit(self._put, key, self._current.path)

    def _put(self, key: str, name: str) -> str:
        return self._storage.put_file(key, self._directory.file(name)).key

    def recorded(self, replaced: str | None) -> None:
        """Continue after the finished upload was recorded; deletes the object that it replaces."""
        self._upload = None
        self._failures, self._retry_at = 0, 0.0
        if replaced is not None:
            self._executor.submit(self._delete, replaced)

    def _delete(self, key: str) -> None:
        try:
            self._storage.delete(key)
        except OSError as error:
            log.warning("old_checkpoint_not_deleted", key=key, error=str(error))
