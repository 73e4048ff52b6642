"""The operator's command for quotas: `python -m app.usage [--tenant NAME [--set QUOTA=N|none] [--clear QUOTA]]`."""

import argparse
import json
import sys

from app.db import Database
from app.errors import NotFound
from app.settings import get_settings
from app.usage import repository, service
from app.usage.quotas import QUOTAS


def _change(text: str) -> tuple[str, int | None]:
    name, found, value = text.partition("=")
    if not found or not (value == "none" or value.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not QUOTA=NUMBER or QUOTA=none")
    return name, None if value == "none" else int(value)


def main(arguments: list[str] | None = None) -> int:
    """Carry out one command; return the exit code."""
    names = ", ".join(QUOTAS)
    parser = argparse.ArgumentParser(prog="python -m app.usage", description="Show and set what tenants may use.")
    parser.add_argument("--tenant", metavar="NAME", help="only this team")
    parser.add_argument(
        "--set", metavar="QUOTA=N", type=_change, action="append", default=[], help=f"{names}; none: no limit"
    )
    parser.add_argument(
        "--clear", metavar="QUOTA", action="append", default=[], help="let the service's setting hold again"
    )
    options = parser.parse_args(arguments)
    if (options.set or options.clear) and options.tenant is None:
        parser.error("--set and --clear need --tenant NAME")
    settings = get_settings()
    try:
        with Database(settings.database_url) as database:
            if options.set or options.clear:
                with database.write() as session:
                    service.set_limits(session, options.tenant, dict(options.set), options.clear)
            with database.read() as session:
                tenants = [row for row in repository.tenants(session) if options.tenant in (None, row.name)]
                if options.tenant is not None and not tenants:
                    raise NotFound(f"there is no tenant {options.tenant!r}")
                for row in tenants:
                    use = service.of_tenant(session, settings, row.id)
                    print(json.dumps({"tenant": row.name} | use.model_dump(exclude={"object"})))
    except (NotFound, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
