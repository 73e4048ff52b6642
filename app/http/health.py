"""/healthz and /readyz: liveness and readiness probes. They need no API key."""

import math
import threading
import time
from collections.abc import Callable
from typing import Literal

import structlog
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel
from sqlalchemy.exc import SQLAlchemyError

from app.db import Database
from app.http.dependencies import DatabaseDep, QueueDep, StorageDep
from app.queue.messages import BROKER_ERRORS, Queue
from app.storage import Storage

log = structlog.get_logger()
router = APIRouter(tags=["health"])

KEPT_S = 1.0
_NO_ANSWER: tuple[type[Exception], ...] = (SQLAlchemyError, OSError, *BROKER_ERRORS)


class Health(BaseModel):
    """The process is alive."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Whether each dependency of the service responds."""

    status: Literal["ready", "unavailable"]
    checks: dict[str, Literal["ok", "does not answer"]]


@router.get("/healthz")
async def healthz() -> Health:
    """Liveness: always 200."""
    return Health()


class ReadinessCache:
    """Checks at most once a second: anybody may call it, and a check writes to the object store."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked_at = -math.inf
        self._answer: Readiness | None = None

    def get(self, database: Database, queue: Queue, storage: Storage) -> Readiness:
        """Return the state of the dependencies, at most a second old."""
        with self._lock:
            if self._answer is None or time.monotonic() - self._asked_at > KEPT_S:
                self._answer = _ask(database, queue, storage)
                self._asked_at = time.monotonic()
            return self._answer


@router.get("/readyz", responses={503: {"model": Readiness, "description": "A dependency does not respond."}})
def readyz(
    request: Request, response: Response, database: DatabaseDep, queue: QueueDep, storage: StorageDep
) -> Readiness:
    """Readiness: whether database, broker and object store respond."""
    cache: ReadinessCache = request.app.state.readiness
    readiness = cache.get(database, queue, storage)
    response.status_code = 200 if readiness.status == "ready" else 503
    return readiness


def _ask(database: Database, queue: Queue, storage: Storage) -> Readiness:
    pings: dict[str, Callable[[], None]] = {"database": database.ping, "broker": queue.ping, "storage": storage.ping}
    checks: dict[str, Literal["ok", "does not answer"]] = {}
    for name, ping in pings.items():
        try:
            ping()
            checks[name] = "ok"
        except _NO_ANSWER as error:
            log.warning("part_does_not_answer", part=name, error=str(error))
            checks[name] = "does not answer"
    ready = all(state == "ok" for state in checks.values())
    return Readiness(status="ready" if ready else "unavailable", checks=checks)
