"""Waiting for what other processes and threads do."""

import time
from collections.abc import Callable
from typing import Any


def until(condition: Callable[[], Any], *, within_s: float = 60.0, what: str = "what was waited for") -> Any:
    """Return the condition's first true value; fail if there is none within the time."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {within_s:.0f} s"
        time.sleep(0.02)
    return value
