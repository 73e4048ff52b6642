"""The Celery app. Start a worker with `python -m worker --queues jobs,checks`.

A message wakes a worker up and is acknowledged at once; the lease in the database guards the work, so nothing here
depends on the broker to remember a task that runs.
"""

import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import Any

import structlog
from celery import Celery
from celery.signals import celeryd_init, worker_init, worker_ready
from celery.worker import state
from sqlalchemy.exc import SQLAlchemyError

from app import logs
from app.db import Database
from app.metrics import SWEEPS_FAILED
from app.queue import BROKER_ERRORS, Queue
from app.settings import get_settings
from app.storage import Storage
from app.sweep import sweep
from worker import metrics
from worker.supervisor import Supervisor
from worker.tasks import ADAPTERS
from worker.tasks.base import Adapter, Context

log = structlog.get_logger(__name__)

celery = Celery("defeat")
celery.conf.update(
    broker_url=get_settings().redis_url,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,  # for ever
    task_serializer="json",
    accept_content=["json"],
    task_ignore_result=True,
    # Late acknowledgement would deliver a task again and again once it takes longer than the visibility timeout.
    task_acks_late=False,
    # One message at a time: a message behind a long job could be done by an idle worker.
    worker_prefetch_multiplier=1,
    worker_disable_prefetch=True,
    # A run does not need the broker.
    worker_cancel_long_running_tasks_on_connection_loss=False,
    worker_redirect_stdouts=False,
)


@lru_cache(maxsize=1)
def _context() -> Context:
    """Return the process's connections: made in the pool's child, as none of them survives a fork."""
    settings = get_settings()
    return Context(Database(settings.database_url), Storage(settings.storage_url), settings)


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """Give an event that is set when the worker cancels its task in order to end (see `worker/__main__.py`)."""
    stop = threading.Event()

    def _on_signal(_signal: int, _frame: FrameType | None) -> None:
        stop.set()

    previous = {number: signal.signal(number, _on_signal) for number in (signal.SIGQUIT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _register(name: str, adapter: type[Adapter[Any]]) -> None:
    @celery.task(name=name)
    def _task(row_id: str) -> None:
        context = _context()
        owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        with _stop_on_signal() as stop:
            Supervisor(context, owner=owner, stop=stop).work(adapter(context), row_id)


for _name, _adapter in ADAPTERS.items():
    _register(_name, _adapter)


@celeryd_init.connect
def _set_up_logs(**_: object) -> None:
    logs.configure(get_settings().log_level)


@worker_init.connect
def _drain_on_signal(**_: object) -> None:
    """Let SIGUSR2 drain this worker: it finishes what it is at, takes nothing new, and ends.

    This is Celery's warm shutdown. SIGTERM still makes it hand over at once, before and while it drains.
    """

    def _on_signal(_signal: int, _frame: FrameType | None) -> None:
        log.info("draining")
        state.should_stop = 0  # type: ignore[assignment]  # it begins as None, and is read as an exit code

    signal.signal(signal.SIGUSR2, _on_signal)


@worker_ready.connect
def _start_serving_metrics(**_: object) -> None:
    metrics.serve_worker(get_settings())


@worker_ready.connect
def _start_sweeping(**_: object) -> None:
    threading.Thread(target=_sweep_forever, name="sweep", daemon=True).start()


_AWAY: tuple[type[Exception], ...] = (SQLAlchemyError, *BROKER_ERRORS)


def _sweep_forever() -> None:
    settings = get_settings()
    database, queue = Database(settings.database_url), Queue(settings.redis_url)
    never = threading.Event()
    while True:
        try:
            sweep(database, queue, settings)
        except _AWAY as error:
            log.warning("sweep_failed", error=str(error).split("\n", 1)[0])
            SWEEPS_FAILED.inc()
        never.wait(settings.sweep_s)
