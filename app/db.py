"""Engine and sessions. A write session commits once, at its end, and messages are sent only after the commit."""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Self

from sqlalchemy import DateTime, Engine, Executable, create_engine, event, func, select
from sqlalchemy.engine import URL, Connection, Dialect, make_url
from sqlalchemy.orm import Session
from sqlalchemy.types import TypeDecorator

_READ_ONLY = "defeat_read_only"
_AFTER_COMMIT = "defeat_after_commit"


def utcnow() -> datetime:
    """Return the current time of this machine's clock, aware, in UTC. See `now`."""
    return datetime.now(UTC)


def now(session: Session) -> datetime:
    """Return the current time of the database's clock, aware, in UTC.

    Times that one machine writes and another compares use this clock: leases and workers' heartbeats. A machine's own
    clock may be minutes off. SQLite has no clock of its own, and serves one machine.
    """
    if session.get_bind().dialect.name == "sqlite":
        return utcnow()
    present: datetime = session.execute(select(func.clock_timestamp())).scalar_one()
    return present.astimezone(UTC)


class UTCDateTime(TypeDecorator[datetime]):
    """An aware UTC time on every database: SQLite drops the zone, so it is restored when a value is read."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: D102, ARG002
        if value is not None and value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone; pass an aware datetime")
        return value.astimezone(UTC) if value is not None else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: D102, ARG002
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# Without these limits a connection to a machine that is gone waits for many minutes.
_NETWORK = {
    "connect_timeout": "5",  # s
    "keepalives_idle": "10",  # s
    "keepalives_interval": "5",  # s
    "keepalives_count": "3",
    "tcp_user_timeout": "20000",  # ms
}


def _with_network_limits(url: str) -> URL:
    """Return the URL with libpq's time limits of the network, except for those that it sets itself."""
    parsed = make_url(url)
    return parsed.update_query_dict({name: value for name, value in _NETWORK.items() if name not in parsed.query})


_SQLITE_BUSY_TIMEOUT_S = 30
"""How long a connection waits for SQLite's write lock before it fails."""


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Set the file's journal mode to WAL, which is permanent.

    While another connection writes to a file that is not in WAL mode yet, as when several processes start on a new
    file, SQLite rejects this statement at once and ignores the busy timeout: so it is repeated here for that long.
    """
    deadline = time.monotonic() + _SQLITE_BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                raise
        time.sleep(0.01)


def make_engine(url: str) -> Engine:
    """Return an engine for PostgreSQL (psycopg 3) or SQLite, configured so that concurrent writers lose no update."""
    if not url.startswith("sqlite"):
        return create_engine(_with_network_limits(url), pool_pre_ping=True)
    engine = create_engine(url, connect_args={"check_same_thread": False})

    @event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _record: Any) -> None:
        # The driver begins transactions lazily and upgrades read locks to write locks, which fails with two writers.
        # `_begin` below takes over.
        connection.isolation_level = None
        connection.execute(f"PRAGMA busy_timeout={_SQLITE_BUSY_TIMEOUT_S * 1000}")
        _write_ahead(connection)
        for pragma in ("synchronous=NORMAL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        read_only = connection.get_execution_options().get(_READ_ONLY, False)
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


class Database:
    """The engine and its two kinds of session. As a context manager it closes its connections at the end."""

    def __init__(self, url: str) -> None:
        self.engine = make_engine(url)
        self._reading = self.engine.execution_options(**{_READ_ONLY: True})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.dispose()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Give a session for reading, which is never committed; on SQLite it takes no write lock."""
        with Session(self._reading, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Give a session that commits once, at the end, and then runs the actions of `after_commit`.

        An exception rolls back and discards the actions.
        """
        with Session(self.engine, expire_on_commit=False) as session:
            with session.begin():
                yield session
            # An event listener on the session would also run for nested transactions and after a rollback, and send
            # messages about rows that do not exist.
            for action in session.info.pop(_AFTER_COMMIT, []):
                action()

    def ping(self) -> None:
        """Raise the driver's error if the database does not respond."""
        with self.engine.connect() as connection:
            connection.exec_driver_sql("SELECT 1")

    def dispose(self) -> None:
        """Close every pooled connection."""
        self.engine.dispose()


def after_commit(session: Session, action: Callable[[], None]) -> None:
    """Run `action` after the session's transaction is committed; never after a rollback."""
    session.info.setdefault(_AFTER_COMMIT, []).append(action)


def update_count(session: Session, statement: Executable) -> int:
    """Execute an UPDATE or DELETE and return the number of rows it affected."""
    result: Any = session.execute(statement, execution_options={"synchronize_session": False})
    return int(result.rowcount)
