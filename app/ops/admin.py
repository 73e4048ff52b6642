"""The operator's command, with the settings of the environment: `defeat admin keys|workers|usage|retention|migrate`.

Exit codes: 0 success; 1 an unknown name, an invalid value, or the database does not respond; 2 invalid arguments.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from sqlalchemy.exc import SQLAlchemyError

from app import logs, migrate
from app.db import Database, utcnow
from app.errors import NotFound
from app.keys import repository as keys_repository
from app.keys import service as keys_service
from app.models import MAX_PRIORITY
from app.retention import service as retention_service
from app.settings import get_settings
from app.storage import Storage
from app.usage import repository as usage_repository
from app.usage import service as usage_service
from app.usage.quotas import QUOTAS
from app.workers import repository as workers_repository
from app.workers import service as workers_service

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Operate the service: keys, workers, quotas, retention, migrations. Reads DATABASE_URL, STORAGE_URL and "
    "DEFEAT_* from the environment.",
)


@contextmanager
def _reported() -> Iterator[None]:
    """Print a service's error to stderr, and exit with 1."""
    try:
        yield
    except (NotFound, ValueError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from error


@app.command()
def keys(
    tenant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Tenant that the new key is for; created if it does not exist.")
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the new key.")] = None,
    max_priority: Annotated[
        int, typer.Option(metavar="N", help="Highest priority that the new key may give a job.")
    ] = MAX_PRIORITY,
    list_all: Annotated[bool, typer.Option("--list", help="List the keys, without their secrets.")] = False,
    revoke: Annotated[str | None, typer.Option(metavar="ID", help="Revoke a key, and end its sessions.")] = None,
) -> None:
    """Create an API key (--tenant and --name; prints the key, once), list keys, or revoke one."""
    creating = tenant is not None and name is not None
    if [creating, list_all, revoke is not None].count(True) != 1:
        raise typer.BadParameter("give --tenant and --name, or --list, or --revoke ID")
    settings = get_settings()
    with _reported(), Database(settings.database_url) as database, database.write() as session:
        if list_all:
            for key, owner in keys_repository.all_keys(session):
                state = f"revoked {key.revoked_at:%Y-%m-%d}" if key.revoked_at else "good"
                print(f"{key.id}\t{owner.name}\t{key.name}\t{key.created_at:%Y-%m-%d}\t{state}")
        elif revoke is not None:
            keys_service.revoke_key(session, revoke)
        elif tenant is not None and name is not None:
            print(keys_service.create_key(session, settings, tenant, name, max_priority=max_priority)[1])


@app.command()
def workers(
    list_all: Annotated[bool, typer.Option("--list", help="List the workers.")] = False,
    drain: Annotated[
        str | None, typer.Option(metavar="NAME", help="Let a worker finish what it has and take nothing new.")
    ] = None,
    undrain: Annotated[str | None, typer.Option(metavar="NAME", help="Let a worker take work again.")] = None,
) -> None:
    """List workers, or drain one by its name."""
    if [list_all, drain is not None, undrain is not None].count(True) != 1:
        raise typer.BadParameter("give --list, or --drain NAME, or --undrain NAME")
    settings = get_settings()
    with _reported(), Database(settings.database_url) as database, database.write() as session:
        if list_all:
            for row in workers_repository.all_workers(session):
                state = "draining" if row.draining else "taking work"
                seen = f"seen {row.seen_at:%Y-%m-%dT%H:%M:%SZ}"
                print(row.name, ",".join(row.queues), f"{row.gpus} GPUs", state, seen, sep="\t")
        else:
            workers_service.set_draining(session, drain or undrain or "", drain is not None)


def _change(text: str) -> tuple[str, int | None]:
    name, found, value = text.partition("=")
    if not found or not (value == "none" or value.isdecimal()):
        raise typer.BadParameter(f"{text!r} is not QUOTA=NUMBER or QUOTA=none")
    return name, None if value == "none" else int(value)


@app.command()
def usage(
    tenant: Annotated[str | None, typer.Option(metavar="NAME", help="Only this tenant.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="QUOTA=N", help=f"Set a limit of the tenant's own: {', '.join(QUOTAS)}; none: no limit."
        ),
    ] = None,
    clear: Annotated[
        list[str] | None, typer.Option(metavar="QUOTA", help="Remove a limit of the tenant's own: the setting holds.")
    ] = None,
) -> None:
    """Print what each tenant uses and may use, a JSON line each; --set and --clear change one tenant's limits."""
    limits = dict(_change(text) for text in changes or [])
    if (limits or clear) and tenant is None:
        raise typer.BadParameter("--set and --clear need --tenant NAME")
    settings = get_settings()
    with _reported(), Database(settings.database_url) as database:
        if tenant is not None and (limits or clear):
            with database.write() as session:
                usage_service.set_limits(session, tenant, limits, clear or [])
        with database.read() as session:
            rows = [row for row in usage_repository.tenants(session) if tenant in (None, row.name)]
            if tenant is not None and not rows:
                raise NotFound(f"there is no tenant {tenant!r}; `defeat admin usage` lists them")
            for row in rows:
                use = usage_service.of_tenant(session, settings, row.id)
                print(json.dumps({"tenant": row.name} | use.model_dump(exclude={"object"})))


@app.command()
def retention(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what the next pass would delete.")] = False,
) -> None:
    """Delete what the retention settings no longer keep, in passes until nothing is left; prints a JSON line each."""
    settings = get_settings()
    logs.configure(settings.log_level)
    storage = Storage(settings.storage_url)
    more = True
    try:
        with Database(settings.database_url) as database:
            while more:
                if not dry_run:
                    with database.write() as session:
                        retention_service.begin(session, utcnow())
                report = retention_service.run(database, storage, settings, dry=dry_run)
                line = {"dry_run": dry_run, "more": report.more, "orphan_bytes": report.orphan_bytes} | report.removed
                print(json.dumps(line))
                more = report.more and not dry_run
    except SQLAlchemyError as error:
        print(f"the database does not respond: {logs.first_line(error)}", file=sys.stderr)
        raise typer.Exit(1) from error


@app.command(name="migrate")
def apply_migrations() -> None:
    """Bring the database's schema up to date. Safe to run by several starters at once."""
    migrate.upgrade(get_settings().database_url)
    print("the database is up to date")


def main() -> None:
    """Run the command."""
    app(prog_name="defeat admin")


if __name__ == "__main__":
    main()
