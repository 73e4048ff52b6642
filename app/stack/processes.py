"""Child processes that do not outlive their parent, and locks that do not outlive their holder."""

import ctypes
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def dies_with_parent() -> Callable[[], None]:
    """Return a `preexec_fn` after which the kernel kills the child (SIGKILL) when its parent ends, however it ends.

    The kernel means the parent *thread*: start such children from the main thread. On other systems than Linux it
    does nothing.
    """
    if not sys.platform.startswith("linux"):
        return lambda: None
    libc = ctypes.CDLL(None, use_errno=True)  # loaded here: as little as possible happens between fork and exec
    parent = os.getpid()

    def _before_exec() -> None:
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
        if os.getppid() != parent:  # it ended before the line above
            os.kill(os.getpid(), signal.SIGKILL)

    return _before_exec


class Locked(Exception):
    """Somebody else holds the lock."""


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock on the file `path` (made if missing), which the kernel drops when this process ends.

    Raises `Locked` at once if it is held in a way that excludes this one.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Locked(str(path)) from error
        yield
    finally:
        os.close(descriptor)
