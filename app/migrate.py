"""Bring the database's schema up to date (`defeat admin migrate`). Safe to run by several starters at once."""

from collections.abc import Callable
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url

import migrations
from app import deprecated
from app.db import make_engine

# Any number will do, as long as all starters take the same and nobody else does.
_ADVISORY_LOCK = 5_281_904_417_733_190


def upgrade(database_url: str, revision: str = "head") -> None:
    """Apply every migration that is missing, in one transaction.

    A second starter waits for the first: on an advisory lock (PostgreSQL) or for the write lock (SQLite). Raises the
    driver's error if the database does not answer, and Alembic's if its revision is unknown to this version.
    """
    _run(database_url, lambda config: command.upgrade(config, revision))


def downgrade(database_url: str, revision: str) -> None:
    """Take migrations back until `revision` (`base`: all of them). Data in what they made is lost."""
    _run(database_url, lambda config: command.downgrade(config, revision))


def revisions(connection: Connection) -> tuple[str | None, str]:
    """Return the database's revision (None: it has no tables of ours) and the one that this version needs."""
    head = ScriptDirectory.from_config(_config(connection)).get_current_head()
    if head is None:
        raise RuntimeError("this installation has no migrations")
    return MigrationContext.configure(connection).get_current_revision(), head


def _run(database_url: str, action: Callable[[Config], None]) -> None:
    url = make_url(database_url)
    if url.get_backend_name() == "sqlite" and url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = make_engine(database_url)
    try:
        with engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _ADVISORY_LOCK})
            action(_config(connection))
    finally:
        engine.dispose()


def _config(connection: Connection) -> Config:
    config = Config()
    # A plain set_main_option would take % in the path for an interpolation.
    config.set_main_option("script_location", str(migrations.__path__[0]).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


if __name__ == "__main__":
    deprecated.run("app.migrate", "defeat admin migrate", "app.ops.admin", "migrate")
