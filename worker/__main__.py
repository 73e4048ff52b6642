"""Starts a worker: `python -m worker --queues jobs,checks`.

One worker does one thing at a time. Give jobs and checks a worker each, or a long job holds up every dataset's check.
SIGTERM ends it within `DEFEAT_CANCEL_GRACE_S` and a little: its run is told to save, and the row goes back to the
queue.
"""

import argparse
import os
import tempfile

from app.models import QUEUES


def main() -> None:
    """Parse the command line and become the worker."""
    parser = argparse.ArgumentParser(prog="python -m worker", description="Works on jobs, datasets and checkpoints.")
    parser.add_argument("--queues", default=",".join(QUEUES), help="what to work on, default: %(default)s")
    parser.add_argument("--name", default="worker", help="tells workers on one machine apart, default: %(default)s")
    arguments = parser.parse_args()
    if unknown := set(arguments.queues.split(",")) - set(QUEUES):
        parser.error(f"unknown queue {', '.join(sorted(unknown))}; there are: {', '.join(QUEUES)}")
    # Celery waits for the whole task at SIGTERM, unless it is told to take it as SIGQUIT, which cancels the task: the
    # pool's child gets a signal, by which the supervisor knows. It reads this when it is imported.
    os.environ["REMAP_SIGTERM"] = "SIGQUIT"
    with tempfile.TemporaryDirectory(prefix="defeat-metrics-") as folder:
        # Counters lie in files that the pool's child writes and the parent serves. This is read at import, too.
        os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", folder)
        from worker.main import start

        start(name=arguments.name, queues=arguments.queues.split(","))


if __name__ == "__main__":
    main()
