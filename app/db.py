"""Engine, sessions, and the rule of one commit at the boundary with messages sent only after it."""

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
    """Return the present by this machine's clock, aware, in UTC. See `now`."""
    return datetime.now(UTC)


def now(session: Session) -> datetime:
    """Return the present by the database's clock, aware, in UTC.

    What one machine writes and another compares with the present goes by this clock: a lease, a worker's last beat. A
    machine's own may be minutes off. SQLite has no clock of its own, and serves one machine.
    """
    if session.get_bind().dialect.name == "sqlite":
        return utcnow()
    present: datetime = session.execute(select(func.clock_timestamp())).scalar_one()
    return present.astimezone(UTC)


class UTCDateTime(TypeDecorator[datetime]):
    """An aware UTC time on every database: SQLite drops the zone, so it is put back on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: D102, ARG002
        if value is not None and value.tzinfo is None:
            raise ValueError(f"naive time {value!r}: pass an aware one")
        return value.astimezone(UTC) if value is not None else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: D102, ARG002
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# A machine or a network that is gone says nothing: without these a connection waits for an answer for many minutes.
_NETWORK = {
    "connect_timeout": "5",  # s
    "keepalives_idle": "10",  # s
    "keepalives_interval": "5",  # s
    "keepalives_count": "3",
    "tcp_user_timeout": "20000",  # ms
}


def _patient_within_reason(url: str) -> URL:
    """Return the URL with libpq's time limits of the network, except for those that it sets itself."""
    parsed = make_url(url)
    return parsed.update_query_dict({name: value for name, value in _NETWORK.items() if name not in parsed.query})


_SQLITE_PATIENCE_S = 30
"""How long a connection waits for SQLite's write lock before it fails."""


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Put the file in write-ahead mode, in which it then stays.

    While another connection writes to a file that is not in that mode yet, as when several processes start on a new
    one, SQLite refuses this statement at once, whatever the busy timeout: it is tried again for as long.
    """
    deadline = time.monotonic() + _SQLITE_PATIENCE_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                raise
        time.sleep(0.01)


def make_engine(url: str) -> Engine:
    """Return an engine for PostgreSQL (psycopg 3) or SQLite, set up so that two writers lose no update."""
    if not url.startswith("sqlite"):
        return create_engine(_patient_within_reason(url), pool_pre_ping=True)
    engine = create_engine(url, connect_args={"check_same_thread": False})

    @event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _record: Any) -> None:
        # The driver's own transaction control begins lazily and upgrades read locks to write locks, which fails
        # under two writers; we begin ourselves, below.
        connection.isolation_level = None
        connection.execute(f"PRAGMA busy_timeout={_SQLITE_PATIENCE_S * 1000}")
        _write_ahead(connection)
        for pragma in ("synchronous=NORMAL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        read_only = connection.get_execution_options().get(_READ_ONLY, False)
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


class Database:
    """The engine and its two kinds of session. In a `with` statement its connections are closed at the end."""

    def __init__(self, url: str) -> None:
        self.engine = make_engine(url)
        self._reading = self.engine.execution_options(**{_READ_ONLY: True})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.dispose()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Give a session for reading: on SQLite it takes no write lock. Never committed."""
        with Session(self._reading, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Give a session that commits once, at the end, and then runs what `after_commit` collected.

        An exception rolls back and drops what was collected.
        """
        with Session(self.engine, expire_on_commit=False) as session:
            with session.begin():
                yield session
            # A per-session listener would fire for nested transactions and survive a rollback, sending messages
            # about rows that do not exist; a plain list at the boundary cannot.
            for action in session.info.pop(_AFTER_COMMIT, []):
                action()

    def ping(self) -> None:
        """Raise the driver's error if the database does not answer."""
        with self.engine.connect() as connection:
            connection.exec_driver_sql("SELECT 1")

    def dispose(self) -> None:
        """Close every pooled connection."""
        self.engine.dispose()


def after_commit(session: Session, action: Callable[[], None]) -> None:
    """Run `action` once the session's transaction has been committed; never if it is rolled back."""
    session.info.setdefault(_AFTER_COMMIT, []).append(action)


def update_count(session: Session, statement: Executable) -> int:
    """Execute an UPDATE or DELETE and return how many rows it touched."""
    result: Any = session.execute(statement, execution_options={"synchronize_session": False})
    return int(result.rowcount)
