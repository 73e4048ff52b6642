"""Child processes that end with their parent, and file locks that end with their holder."""

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
    """Return a `preexec_fn` with which the kernel kills the child (SIGKILL) when its parent ends in any way.

    For the kernel the parent is a *thread*, so start such children from the main thread. It does nothing on systems
    other than Linux.
    """
    if not sys.platform.startswith("linux"):
        return lambda: None
    # Loaded here, because as little as possible must happen between fork and exec.
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def _before_exec() -> None:
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
        if os.getppid() != parent:  # the parent ended before the line above
            os.kill(os.getpid(), signal.SIGKILL)

    return _before_exec


class Locked(Exception):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock on the file `path`, created if missing; the kernel releases it when this process ends.

    Raises `Locked` at once if another holder excludes this one.
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
