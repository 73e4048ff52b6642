"""Keeps a run's newest training checkpoint in the object store, for another attempt to go on from."""

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future

import structlog

from app.storage import Storage
from worker.retry import pause_s
from worker.rundir import CheckpointOffer, Message, RunDirectory

log = structlog.get_logger(__name__)

_MAX_BACKOFF_S = 60.0


class CheckpointKeeper:
    """Uploads offered checkpoints one at a time, the newest first; what is overtaken meanwhile is left out.

    An upload that failed is tried again until a newer checkpoint takes its place. The caller polls `ready`, records
    that key, and then calls `recorded`.

    Args:
        backoff_s: first pause before an upload is tried again; doubled each time, up to a minute.
        key_of: says where the checkpoint of a number goes; None: none is kept.

    Attributes:
        warnings: uploads that failed, as messages to be recorded: one for each time that the store went away.
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
        self._offer: CheckpointOffer | None = None
        self._current: CheckpointOffer | None = None
        self._uploading: Future[str] | None = None
        self._failures = 0
        self._again_at = 0.0
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
            self._put_off(error)
            return None

    def _put_off(self, error: Exception) -> None:
        log.warning("checkpoint_not_kept", error=str(error))
        if not self._failures:
            text = f"a training checkpoint could not be kept for another attempt yet; it is tried again: {error}"
            origin = f"checkpoint {self._number}"
            self.warnings.append(Message(level="warn", code="checkpoint_not_kept", message=text, origin=origin))
        self._again_at = time.monotonic() + pause_s(self._backoff_s, self._failures, most_s=_MAX_BACKOFF_S)
        self._failures += 1
        self._uploading = None
        self._offer = self._offer or self._current

    def _start_next(self) -> None:
        if self._offer is None or time.monotonic() < self._again_at:
            return
        self._current, self._offer = self._offer, None
        key = self._key_of(self._number + 1)
        if key is not None:
            self._number += 1
            self._uploading = self._executor.submit(self._upload, key, self._current.path)

    def _upload(self, key: str, name: str) -> str:
        return self._storage.put_file(key, self._directory.file(name)).key

    def recorded(self, replaced: str | None) -> None:
        """Go on after the ready key was recorded; the object that it replaces is deleted."""
        self._uploading = None
        self._failures, self._again_at = 0, 0.0
        if replaced is not None:
            self._executor.submit(self._delete, replaced)

    def _delete(self, key: str) -> None:
        try:
            self._storage.delete(key)
        except OSError as error:
            log.warning("old_checkpoint_not_deleted", key=key, error=str(error))
