"""Starts a worker: `python -m worker --queues jobs,checks`.

A worker works on one row at a time. Start one worker for jobs and another for checks, or a long job delays every
dataset's check. SIGTERM ends a worker within `DEFEAT_CANCEL_GRACE_S` and some seconds: its run saves, and the row
returns to the queue.
"""

import argparse
import os
import tempfile

from app.models import QUEUES


def main() -> None:
    """Parse the command line and become the worker."""
    parser = argparse.ArgumentParser(prog="python -m worker", description="Works on jobs, datasets and checkpoints.")
    parser.add_argument("--queues", default=",".join(QUEUES), help="queues to work on, default: %(default)s")
    parser.add_argument("--name", default="worker", help="unique on this machine, default: %(default)s")
    arguments = parser.parse_args()
    if unknown := set(arguments.queues.split(",")) - set(QUEUES):
        parser.error(f"unknown queue {', '.join(sorted(unknown))}; use one of: {', '.join(QUEUES)}")
    # At SIGTERM Celery waits for the end of the task, unless this variable makes it a SIGQUIT, which cancels the task:
    # the pool's child then gets a signal, which the supervisor sees. Celery reads the variable at import.
    os.environ["REMAP_SIGTERM"] = "SIGQUIT"
    with tempfile.TemporaryDirectory(prefix="defeat-metrics-") as folder:
        # The pool's child writes the counters to files and the parent serves them. Read at import as well.
        os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", folder)
        from worker.main import start

        start(name=arguments.name, queues=arguments.queues.split(","))


if __name__ == "__main__":
    main()
