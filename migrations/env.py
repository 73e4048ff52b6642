"""Alembic's environment: the connection that `app.migrate` hands over, or one to DATABASE_URL."""

from typing import Any

from alembic import context
from sqlalchemy import Column, Connection

from app.db import make_engine
from app.models import Base
from app.settings import Settings


def _is_compared(item: Any, _name: str | None, kind: str, _reflected: bool, found: Any) -> bool:
    """Leave out an index that SQLite cannot describe: it does not report which columns run downwards."""
    if kind != "index" or found is None or context.get_context().dialect.name != "sqlite":
        return True
    return all(isinstance(expression, Column) for expression in item.expressions)


def _run(connection: Connection) -> None:
    # Batch mode, since SQLite cannot alter most of a table in place.
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=True,
        compare_type=True,
        include_object=_is_compared,
    )
    with context.begin_transaction():
        context.run_migrations()


def _run_offline() -> None:
    context.configure(url=Settings().database_url, target_metadata=Base.metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()


def _run_online() -> None:
    given: Connection | None = context.config.attributes.get("connection")
    if given is not None:
        _run(given)
        return
    engine = make_engine(Settings().database_url)
    with engine.begin() as connection:
        _run(connection)
    engine.dispose()


if context.is_offline_mode():
    _run_offline()
else:
    _run_online()
