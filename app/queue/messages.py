"""Messages to workers. A message carries a row's id and wakes a worker; the row itself is the truth."""

from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qs, urlencode, urlsplit

import redis
import structlog
from celery import Celery
from kombu.exceptions import OperationalError
from opentelemetry.trace import SpanKind
from sqlalchemy import Connection, Engine, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app import traces
from app.db import after_commit, now, update_count
from app.models import QUEUES, Checkpoint, Dataset, Job, Leased

log = structlog.get_logger()

CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 3.0
WORKER_COMMAND: Final = "defeat_worker"
"""The control message that a worker answers with the members of `Answer`."""
BROKER_ERRORS: tuple[type[Exception], ...] = (OperationalError, redis.RedisError, OSError)
"""What `Queue` raises if the broker does not answer."""


@dataclass(frozen=True)
class Answer:
    """A worker's answer on the broker.

    Attributes:
        queues: the queues from which it takes messages.
        version: of the service; None: a version that is too old to report it.
    """

    queues: tuple[str, ...]
    version: str | None


def client_url(url: str) -> str:
    """Return the broker's URL in the form of redis-py: kombu's `redis+socket:///path` becomes `unix:///path`."""
    parts = urlsplit(url)
    if parts.scheme != "redis+socket":
        return url
    options = parse_qs(parts.query)
    database = options.pop("virtual_host", ["0"])[0].lstrip("/")
    return f"unix://{parts.netloc}{parts.path}?{urlencode({'db': database})}"


class Queue:
    """The producer's connection to the broker at `redis://…` or `redis+socket:///path`; it connects at first use.

    A broker that does not answer delays a request by a few seconds at most. The row is not lost: the sweep sends its
    message again.
    """

    def __init__(self, redis_url: str) -> None:
        self._client_url = client_url(redis_url)
        self._celery = Celery("defeat", broker=redis_url, set_as_current=False)
        self._celery.conf.update(
            task_ignore_result=True,
            task_serializer="json",
            accept_content=["json"],
            broker_connection_timeout=CONNECT_TIMEOUT_S,
            broker_transport_options={
                "socket_connect_timeout": CONNECT_TIMEOUT_S,
                "socket_timeout": ANSWER_TIMEOUT_S,
                # Without a limit kombu would try to connect forever, inside the request.
                "max_retries": 1,
                "interval_start": 0.1,
                "interval_step": 0,
            },
        )

    def send(self, model: type[Leased], row_id: str, *, hops: int = 0) -> None:
        """Send the row's id to the queue of its model; `hops` counts the workers that could not use the message.

        Raises one of `BROKER_ERRORS` if the broker does not answer.
        """
        # One repetition, because a pooled connection may belong to a broker that was restarted since.
        policy = {"max_retries": 1, "interval_start": 0.1, "interval_step": 0}
        attributes = {"messaging.destination.name": model.QUEUE, "defeat.row": row_id}
        with traces.span(f"send {model.TASK}", kind=SpanKind.PRODUCER, attributes=attributes):
            self._celery.send_task(
                model.TASK,
                args=[row_id, hops],
                queue=model.QUEUE,
                headers={"traceparent": traces.current_traceparent()},
                retry=True,
                retry_policy=policy,
            )

    def enqueue(self, session: Session, row: Dataset | Checkpoint | Job) -> None:
        """Send the row's id after the session's commit. If the broker does not answer, the sweep sends it later."""
        row.enqueued_at = now(session)
        model, row_id, bind = type(row), row.id, session.get_bind()

        def _send() -> None:
            try:
                self.send(model, row_id)
            except BROKER_ERRORS as error:
                log.warning("message_not_sent", row=row_id, error=str(error))
                _mark_unsent(bind, model, row_id)

        after_commit(session, _send)

    def _client(self) -> redis.Redis:
        return redis.Redis.from_url(
            self._client_url, socket_connect_timeout=CONNECT_TIMEOUT_S, socket_timeout=ANSWER_TIMEOUT_S
        )

    def ping(self) -> None:
        """Raise one of `BROKER_ERRORS` if the broker does not answer within seconds."""
        with self._client() as client:
            client.ping()

    def untaken(self) -> frozenset[str]:
        """Return the queues that hold messages, which means that none of their workers is idle.

        Raises one of `BROKER_ERRORS` if the broker does not answer within seconds.
        """
        with self._client() as client:
            return frozenset(name for name in QUEUES if client.llen(name))

    def workers(self, *, timeout_s: float = 2.0) -> dict[str, Answer]:
        """Return the answers of all workers that answer within `timeout_s`, by name; always waits that long.

        Raises one of `BROKER_ERRORS` if the broker does not answer.
        """
        replies = self._celery.control.broadcast(WORKER_COMMAND, reply=True, timeout=timeout_s) or []
        return {
            str(name): Answer(tuple(sorted(answer.get("queues", ()))), answer.get("version"))
            for reply in replies
            for name, answer in reply.items()
        }

    def server(self) -> dict[str, str]:
        """Return the broker's `version` and `eviction` policy. Raises one of `BROKER_ERRORS`."""
        with self._client() as client:
            found: dict[str, Any] = client.info()
        version = found.get("valkey_version") or found["redis_version"]
        return {"version": str(version), "eviction": str(found.get("maxmemory_policy", "noeviction"))}

    def close(self) -> None:
        """Close every connection."""
        self._celery.close()


def _mark_unsent(bind: Engine | Connection, model: type[Leased], row_id: str) -> None:
    """Mark the row as not sent, so that the next sweep sends it, and not the one after `redeliver_s`."""
    statement = update(model).where(model.id == row_id, model.status == model.CLAIMABLE).values(enqueued_at=None)
    try:
        with Session(bind) as session, session.begin():
            update_count(session, statement)
    except SQLAlchemyError as error:
        # The request has succeeded: the row is committed, and the sweep will find it after `redeliver_s`.
        log.warning("row_not_marked_unsent", row=row_id, error=str(error))
