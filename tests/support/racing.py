"""Threads that begin together."""

import threading
from collections.abc import Callable


def race(work: Callable[[int], object], count: int) -> None:
    """Run `work(number)` in `count` threads at once; raise the first error that any of them had."""
    barrier, errors = threading.Barrier(count), []

    def _run(number: int) -> None:
        barrier.wait()
        try:
            work(number)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=_run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
