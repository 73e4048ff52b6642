"""The operator's command for retention: `python -m app.retention [--dry-run]`."""

import argparse
import json
import sys

from sqlalchemy.exc import SQLAlchemyError

from app import logs
from app.db import Database, utcnow
from app.retention import service
from app.settings import get_settings
from app.storage import Storage


def main(arguments: list[str] | None = None) -> int:
    """Run passes until nothing is left to remove, each printed as one JSON line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m app.retention", description="Delete what the operator's rules let go."
    )
    parser.add_argument("--dry-run", action="store_true", help="only print what the next pass would delete")
    dry = parser.parse_args(arguments).dry_run
    settings = get_settings()
    logs.configure(settings.log_level)
    storage = Storage(settings.storage_url)
    more = True
    try:
        with Database(settings.database_url) as database:
            while more:
                if not dry:
                    with database.write() as session:
                        service.begin(session, utcnow())
                report = service.run(database, storage, settings, dry=dry)
                said = {"dry_run": dry, "more": report.more, "orphan_bytes": report.orphan_bytes} | report.removed
                print(json.dumps(said))
                more = report.more and not dry
    except SQLAlchemyError as error:
        print(f"the database does not answer: {logs.first_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
