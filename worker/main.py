"""The Celery app. Start a worker with `python -m worker --queues jobs,checks`.

A message wakes a worker and is acknowledged at once. The lease in the database protects the work, so the broker need
not remember a task that runs. The worker then claims the row that is next for it (see `app.queue.scheduling`). If its
resources do not satisfy the row of the message, it sends the message on to other workers.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from types import FrameType
from typing import Any

import structlog
from celery import Celery, Task
from celery.signals import (
    celeryd_init,
    worker_init,
    worker_process_init,
    worker_process_shutdown,
    worker_ready,
)
from celery.worker import state
from celery.worker.control import inspect_command
from sqlalchemy.exc import SQLAlchemyError

from app import logs, traces
from app.db import Database
from app.metrics import SWEEPS_FAILED
from app.models import LEASED, Worker
from app.ops.sweep import sweep
from app.queue import scheduling
from app.queue.messages import BROKER_ERRORS, WORKER_COMMAND, Queue
from app.queue.scheduling import WorkerResources
from app.settings import get_settings
from app.storage import Storage
from app.workers import registry, repository
from worker import metrics
from worker.hardware import describe
from worker.supervisor import Supervisor
from worker.tasks import HANDLERS
from worker.tasks.base import Context, Handler

log = structlog.get_logger(__name__)

_DRAIN_AGAIN_S = 1.0

celery = Celery("defeat")
celery.conf.update(
    broker_url=get_settings().redis_url,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,  # no limit
    task_serializer="json",
    accept_content=["json"],
    task_ignore_result=True,
    # With late acknowledgement the broker would deliver a task again once it takes longer than the visibility timeout.
    task_acks_late=False,
    # One message at a time, because an idle worker could take a message that waits behind a long job.
    worker_prefetch_multiplier=1,
    worker_disable_prefetch=True,
    # A run does not need the broker.
    worker_cancel_long_running_tasks_on_connection_loss=False,
    worker_redirect_stdouts=False,
)


@lru_cache(maxsize=1)
def _context() -> Context:
    """Return the process's connections; called in the pool's child, because none of them survives a fork."""
    settings = get_settings()
    return Context(Database(settings.database_url), Storage(settings.storage_url), settings)


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """Return an event that is set when the worker ends and so cancels its task (see `worker/__main__.py`)."""
    stop = threading.Event()

    def _on_signal(_signal: int, _frame: FrameType | None) -> None:
        stop.set()

    previous = {number: signal.signal(number, _on_signal) for number in (signal.SIGQUIT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@lru_cache(maxsize=1)
def _queue() -> Queue:
    """Return the process's connection to the broker; likewise."""
    return Queue(get_settings().redis_url)


class _Presence:
    """This worker's row, created before the fork of the pool's child, so that both have the same."""

    def __init__(self) -> None:
        self.worker: Worker | None = None
        self.draining = threading.Event()
        self.ended = threading.Event()

    @property
    def registered(self) -> Worker:
        assert self.worker is not None, "start a worker with `python -m worker`"
        return self.worker


_presence = _Presence()


def start(*, name: str, queues: Sequence[str]) -> None:
    """Run as the worker of this name on these queues until it is stopped."""
    _presence.worker = describe(get_settings(), name=name, queues=queues)
    options = ("--pool", "prefork", "--concurrency", "1", "--without-gossip", "--without-mingle", "--without-heartbeat")
    try:
        celery.worker_main(["worker", "--queues", ",".join(queues), "--hostname", f"{name}@%h", *options])
    finally:
        _presence.ended.set()
        _forget(_presence.registered)


def _register(name: str, handler: type[Handler[Any]]) -> None:
    @celery.task(name=name, bind=True)
    def _task(self: "Task[Any, Any]", row_id: str, hops: int = 0) -> None:
        context, worker = _context(), _presence.registered
        owner = f"{worker.id}/{socket.gethostname()}:{os.getpid()}"
        # Checks first, because they are short and a long job would delay them.
        kinds = [kind for kind in reversed(HANDLERS.values()) if kind.model.QUEUE in worker.queues]
        # No span here: a worker that finds one row after another may work on one message for days.
        with _stop_on_signal() as stop, traces.within(self.request.get("traceparent")):
            supervisor = Supervisor(context, owner=owner, stop=stop, resources=WorkerResources.of(worker))
            if not supervisor.serve([kind(context) for kind in kinds]) and not stop.is_set():
                _pass_on(context, worker, handler.model, row_id, hops)


def _pass_on(context: Context, worker: Worker, model: Any, row_id: str, hops: int) -> None:
    """Send the message of a row that still waits to the next worker; the broker gives it to the one idle longest.

    The message visits each worker at most once. A worker that can take the row finds it when it becomes free or starts.
    """
    with context.database.read() as session:
        waits = scheduling.waits(session, model, row_id)
        present = registry.present(session, context.settings, queue=model.QUEUE)
    # Workers that drain are not counted, but receive messages until they end.
    others = sum(other.id != worker.id for other in present)
    if not waits or hops >= others:
        log.info("nothing_to_do", row=row_id)
        return
    try:
        _queue().send(model, row_id, hops=hops + 1)
    except BROKER_ERRORS as error:
        log.warning("message_not_sent", row=row_id, error=str(error))


for _name, _handler in HANDLERS.items():
    _register(_name, _handler)


@celeryd_init.connect
def _set_up_logs(**_: object) -> None:
    logs.configure(get_settings().log_level)


@inspect_command(name=WORKER_COMMAND)
def _answer(panel: Any) -> dict[str, Any]:
    """Answer on the broker with this worker's queues and version; see `Queue.workers`."""
    consumer = panel.consumer.task_consumer
    queues = [queue.name for queue in consumer.queues] if consumer else []
    return {"queues": queues, "version": version("defeat-service")}


@worker_process_init.connect
def _set_up_traces(**_: object) -> None:
    """Configure traces in the pool's child, because an exporter's thread and connections do not survive the fork."""
    traces.configure("defeat-worker")


@worker_process_shutdown.connect
def _export_the_rest(**_: object) -> None:
    traces.flush()


@worker_init.connect
def _drain_on_signal(**_: object) -> None:
    """Let SIGUSR2 drain this worker: it finishes its row, claims no other, and ends.

    It sets the same flag in the worker's row as `defeat admin workers --drain`, which stops the claims of the pool's
    child, and then ends with Celery's warm shutdown. SIGTERM still ends the worker at once, also while it drains.
    """

    def _on_signal(_signal: int, _frame: FrameType | None) -> None:
        if not _presence.draining.is_set():
            _presence.draining.set()
            threading.Thread(target=_drain, name="drain", daemon=True).start()

    signal.signal(signal.SIGUSR2, _on_signal)


def _drain() -> None:
    """Let Celery end after its task, and set the flag as soon as the database answers."""
    database = Database(get_settings().database_url)
    while not _presence.ended.is_set():
        try:
            with database.write() as session:
                registry.beat(session, _presence.registered, draining=True)
        except SQLAlchemyError as error:
            log.warning("drain_not_recorded", error=logs.first_line(error))
        else:
            break
        finally:
            state.should_stop = 0  # type: ignore[assignment]  # it begins as None, and is read as an exit code
        _presence.ended.wait(_DRAIN_AGAIN_S)
    log.info("draining")


@worker_ready.connect
def _start_threads(**_: object) -> None:
    settings = get_settings()
    database, queue = Database(settings.database_url), Queue(settings.redis_url)
    worker = _presence.registered

    def _beat() -> None:
        with database.write() as session:
            registry.beat(session, worker, draining=_presence.draining.is_set())

    def _begin() -> None:
        _beat()
        _wake(database, queue, worker)

    _repeat("heartbeat", _beat, settings.lease_s / 3, first=_begin)
    _repeat("sweep", lambda: sweep(database, queue, settings), settings.sweep_s, failed=SWEEPS_FAILED.inc)
    metrics.serve_worker(settings)


def _forget(worker: Worker) -> None:
    database = Database(get_settings().database_url)
    try:
        with database.write() as session:
            repository.forget(session, worker.id)
    except SQLAlchemyError as error:
        log.warning("not_forgotten", error=logs.first_line(error))


def _wake(database: Database, queue: Queue, worker: Worker) -> None:
    """Send a message for each queue with a row that waits for a worker like this one: earlier messages found none."""
    for model in LEASED:
        if model.QUEUE in worker.queues:
            with database.read() as session:
                row_id = scheduling.next_id(session, model, WorkerResources.of(worker))
            if row_id is not None:
                queue.send(model, row_id)


_NOT_ANSWERING: tuple[type[Exception], ...] = (SQLAlchemyError, *BROKER_ERRORS)


def _repeat(
    name: str,
    action: Callable[[], object],
    every_s: float,
    *,
    first: Callable[[], object] | None = None,
    failed: Callable[[], object] = lambda: None,
) -> None:
    """Call `action` in a thread every `every_s` seconds until the worker ends; the first time call `first` instead.

    If database or broker do not answer, it calls `failed` and tries again after the same pause.
    """

    def _loop() -> None:
        current = first or action
        while not _presence.ended.is_set():
            try:
                current()
                current = action
            except _NOT_ANSWERING as error:
                log.warning(f"{name}_failed", error=logs.first_line(error))
                failed()
            _presence.ended.wait(every_s)

    threading.Thread(target=_loop, name=name, daemon=True).start()
