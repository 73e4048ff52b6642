"""Waiting for what other processes and threads do."""

import time
from collections.abc import Callable
from typing import Any


def until(condition: Callable[[], Any], *, within_s: float = 60.0, what: str = "what was waited for") -> Any:
    """Return the condition's first true value; fail if there is none within the time."""
    deadline, pause_s = time.monotonic() + within_s, 0.01
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {within_s:.0f} s"
        time.sleep(pause_s)
        # What takes long is asked for less often: to ask may be work for those that are waited for.
        pause_s = min(1.5 * pause_s, 0.25)
    return value
