"""Claims jobs as fast as possible until none is left; prints their ids. `python -m tests.faults.claimer NAME URL`."""

import sys

from app.db import Database
from app.models import Job
from app.queue.leases import claim_next
from app.queue.scheduling import WorkerResources


def main(name: str, url: str) -> None:
    """Wait for a line on standard input, so that several processes start together, and claim."""
    database = Database(url)
    database.ping()
    print("ready", flush=True)
    sys.stdin.readline()
    while True:
        with database.write() as session:
            job = claim_next(session, Job, WorkerResources(), owner=name, lease_s=600.0, max_attempts=5)
        if job is None:
            return
        print(job.id, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
