"""The operator's command for API keys: `python -m app.keys --tenant NAME --name NAME`, `--list`, `--revoke ID`."""

import argparse
import sys

from app.db import Database
from app.errors import NotFound
from app.keys import repository, service
from app.models import MAX_PRIORITY
from app.settings import get_settings


def main(arguments: list[str] | None = None) -> int:
    """Carry out one command; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m app.keys", description="Make, list and revoke API keys.")
    parser.add_argument("--tenant", metavar="NAME", help="team that the new key is for; made if it is not there")
    parser.add_argument("--name", metavar="NAME", help="what the new key is called")
    parser.add_argument(
        "--max-priority", type=int, default=MAX_PRIORITY, metavar="N", help="highest priority that it may give a job"
    )
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--list", action="store_true", help="list the keys, without their secrets")
    other.add_argument("--revoke", metavar="ID", help="end a key and the sessions made from it")
    options = parser.parse_args(arguments)
    creating = options.tenant is not None and options.name is not None
    if creating == bool(options.list or options.revoke):
        parser.error("give --tenant and --name, or --list, or --revoke ID")
    settings = get_settings()
    try:
        with Database(settings.database_url) as database, database.write() as session:
            if options.list:
                for key, tenant in repository.all_keys(session):
                    state = f"revoked {key.revoked_at:%Y-%m-%d}" if key.revoked_at else "good"
                    print(f"{key.id}\t{tenant.name}\t{key.name}\t{key.created_at:%Y-%m-%d}\t{state}")
            elif options.revoke:
                service.revoke_key(session, options.revoke)
            else:
                limit = options.max_priority
                print(service.create_key(session, settings, options.tenant, options.name, max_priority=limit)[1])
    except (NotFound, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
