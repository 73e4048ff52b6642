"""How long an attempt waits: for a database or an object store that does not answer, and for a run that must end."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Final, TypeVar

import structlog
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app.logs import first_line
from worker import metrics

log = structlog.get_logger(__name__)

T = TypeVar("T")

DATABASE_ERRORS: Final = (OperationalError, InterfaceError, PoolTimeout)
"""What a query raises when the database does not answer."""

HURRY_S: Final = 10.0
"""How long an attempt that must end waits for the object store, seconds."""

_MAX_PAUSE_S: Final = 5.0
_ERRORS_BEFORE_STOP: Final = 4
_POLL_S: Final = 0.1


class Stopped(Exception):
    """The worker must end and cannot wait any longer; the row stays leased until its lease expires."""


def pause_s(first_s: float, failures: int, *, most_s: float) -> float:
    """Return the pause before the next try, seconds: `first_s`, doubled for each earlier failure, at most `most_s`."""
    return min(first_s * 2.0 ** min(failures, 60), most_s)


class Deadline:
    """A moment in the future, by the monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        """Whether the moment has come."""
        return time.monotonic() > self._at


def hurry() -> Deadline:
    """Return the moment until which an attempt that must end waits for the object store."""
    return Deadline(HURRY_S)


class DatabaseBackoff:
    """When to query a database again that did not answer.

    Args:
        first_s: pause after the first error, seconds; doubled after each further one, up to 5 s.
        stop: set when the worker must end.
    """

    def __init__(self, first_s: float, stop: threading.Event) -> None:
        self._first_s = first_s
        self._stop = stop
        self._errors = 0
        self._retry_at = 0.0

    @property
    def pausing(self) -> bool:
        """Whether the pause after the last error is not over."""
        return time.monotonic() < self._retry_at

    def failed(self, error: Exception) -> None:
        """Count an error and begin the next pause."""
        pause = pause_s(self._first_s, self._errors, most_s=_MAX_PAUSE_S)
        self._errors += 1
        self._retry_at = time.monotonic() + pause
        metrics.DATABASE_ERRORS.inc()
        log.warning("database_away", error=first_line(error), retry_in_s=pause)

    def succeeded(self) -> None:
        """Forget the errors so far."""
        self._errors = 0

    def wait(self, what: str, *, at_most_s: float) -> None:
        """Sleep for a moment. Raises `Stopped` if the worker must end and the database has failed several times."""
        if self._stop.is_set() and self._errors > _ERRORS_BEFORE_STOP:
            raise Stopped(f"{what}: the database does not answer and the worker must end")
        time.sleep(min(at_most_s, _POLL_S))

    def wait_out(self, what: str, *, at_most_s: float) -> None:
        """Sleep until the pause is over. Raises as `wait` does."""
        self.wait(what, at_most_s=at_most_s)
        time.sleep(max(0.0, self._retry_at - time.monotonic()))


class StoreThread:
    """One thread for work on the object store, which repeats the work while the store does not answer.

    Args:
        patience_s: how long it repeats one piece of work, seconds.
        first_s: pause before the first repetition, seconds; doubled before each further one, up to 5 s.
        stop: set when the worker must end: the next error is then final.
    """

    def __init__(self, *, patience_s: float, first_s: float, stop: threading.Event) -> None:
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="storage")
        self._patience_s = patience_s
        self._first_s = first_s
        self._stop = stop
        self._closed = threading.Event()

    def submit(self, work: Callable[[], T], *, must_end: Callable[[], bool]) -> Future[T]:
        """Begin `work`, and repeat it after an `OSError` until the patience is over.

        Args:
            must_end: whether the attempt must end; the patience is then `HURRY_S` at most.
        """
        begun = time.monotonic()

        def _repeat() -> T:
            for failures in count():
                pause = pause_s(self._first_s, failures, most_s=_MAX_PAUSE_S)
                try:
                    return work()
                except OSError as error:
                    patience_s = min(self._patience_s, HURRY_S) if must_end() else self._patience_s
                    given_up = self._stop.is_set() or self._closed.is_set()
                    if given_up or time.monotonic() + pause > begun + patience_s:
                        raise
                    log.warning("storage_retry", error=str(error))
                    metrics.STORAGE_RETRIES.inc()
                    self._stop.wait(pause)
            raise AssertionError("unreachable")

        return self.executor.submit(_repeat)

    def close(self) -> None:
        """Make the next error final, and wait until the thread has ended."""
        self._closed.set()
        self.executor.shutdown(wait=True, cancel_futures=True)
