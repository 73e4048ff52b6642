"""The operator's command for workers: `python -m app.workers --list`, `--drain NAME`, `--undrain NAME`."""

import argparse
import sys

from app.db import Database
from app.errors import NotFound
from app.settings import get_settings
from app.workers import repository, service


def main(arguments: list[str] | None = None) -> int:
    """Carry out one command; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m app.workers", description="List and drain workers.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="list the workers")
    action.add_argument("--drain", metavar="NAME", help="let it finish what it has and take nothing new")
    action.add_argument("--undrain", metavar="NAME", help="let it take work again")
    options = parser.parse_args(arguments)
    try:
        with Database(get_settings().database_url) as database, database.write() as session:
            if options.list:
                for row in repository.all_workers(session):
                    state = "draining" if row.draining else "taking work"
                    seen = f"seen {row.seen_at:%Y-%m-%dT%H:%M:%SZ}"
                    print(row.name, ",".join(row.queues), f"{row.gpus} GPUs", state, seen, sep="\t")
            else:
                service.set_draining(session, options.drain or options.undrain, options.drain is not None)
    except NotFound as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
