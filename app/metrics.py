"""Prometheus metrics: counters of this process, and gauges of queues and storage from the database.

Served on a port of its own (`DEFEAT_METRICS_PORT`), never by the API: the numbers cover every tenant.
"""

import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import datetime
from typing import Final, Generic, TypeVar

import structlog
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from sqlalchemy import ColumnElement, case, func, literal, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.db import Database, now
from app.logs import first_line
from app.models import LEASED, Artifact, Checkpoint, Dataset, Job, Worker
from app.queue.scheduling import LeasedModel
from app.settings import Settings
from app.states import ASSET_MOVES, JOB_MOVES

log = structlog.get_logger(__name__)

T = TypeVar("T")
# The value of `label` for jobs whose label no registered worker has: tenants choose labels, and each would be a series.
OTHER_LABEL: Final = "other"
# A scrape costs the database a few small queries; sums over whole tables are cached for longer.
_QUEUES_KEPT_S: Final = 5.0
_SUMS_KEPT_S: Final = 300.0
_LATENCY_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120)

HTTP_REQUESTS: Final = Histogram(
    "defeat_http_request_duration_seconds",
    "Time from the first byte of a request to the last byte of its response, by route template.",
    ["method", "route", "status"],
    buckets=_LATENCY_S,
)
ROWS_RESENT: Final = Counter(
    "defeat_rows_resent",
    "Rows whose message or worker was lost and for which the sweep sent another message.",
    ["queue"],
)
SWEEPS_FAILED: Final = Counter("defeat_sweeps_failed", "Sweeps for lost rows that failed.")


class Kept(Generic[T]):
    """A cached value, computed again when it is older than `kept_s` seconds. Thread-safe."""

    def __init__(self, ask: Callable[[], T], kept_s: float) -> None:
        self._ask, self._kept_s = ask, kept_s
        self._lock = threading.Lock()
        self._value: T | None = None
        self._asked_at = -float("inf")

    def get(self) -> T:
        """Return the value, at most `kept_s` seconds old. Raises what the computation raises."""
        with self._lock:
            if self._value is None or time.monotonic() - self._asked_at > self._kept_s:
                self._value = self._ask()
                self._asked_at = time.monotonic()
            return self._value


class ServiceCollector(Collector):
    """Queue depth, the longest wait and what is stored, from the database; room on this process's disk.

    Every API process reports the same rows: take the maximum over them. A database that does not answer leaves its
    families out and sets `defeat_database_up` to 0.
    """

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database, self._settings = database, settings
        self._queues = Kept(lambda: self._read(_queue_families), _QUEUES_KEPT_S)
        self._stored = Kept(lambda: self._read(_stored_family), _SUMS_KEPT_S)

    def _read(self, query: Callable[[Session], list[Metric]]) -> list[Metric]:
        with self._database.read() as session:
            return query(session)

    def describe(self) -> Iterable[Metric]:
        """Return nothing, so that registration does not query the database."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield the families, as of a few seconds ago."""
        up = GaugeMetricFamily("defeat_database_up", "Whether the database answered this scrape.", value=1)
        try:
            yield from [*self._queues.get(), *self._stored.get()]
        except SQLAlchemyError as error:
            log.warning("metrics_without_database", error=first_line(error))
            up = GaugeMetricFamily("defeat_database_up", "Whether the database answered this scrape.", value=0)
        yield up
        yield from disk_families(self._settings)


def _queue_families(session: Session) -> list[Metric]:
    rows = GaugeMetricFamily(
        "defeat_rows",
        "Jobs, datasets and checkpoints that have not ended, by status and resources.label.",
        labels=["kind", "status", "label"],
    )
    depth = GaugeMetricFamily(
        "defeat_queue_depth", "Rows that wait for a worker, by resources.label.", labels=["queue", "label"]
    )
    oldest = GaugeMetricFamily(
        "defeat_queue_oldest_seconds",
        "Age of the oldest row in the queue, seconds; 0: the queue is empty.",
        labels=["queue"],
    )
    offered = {label for labels in session.scalars(select(Worker.labels)) for label in labels}
    waiting: dict[tuple[str, str], int] = defaultdict(int)
    longest: dict[str, float] = defaultdict(float)
    present = now(session)
    for model in LEASED:
        for (status, label), (count, since) in _alive(session, model, offered).items():
            rows.add_metric([kind_of(model), status, label], count)
            if status == model.CLAIMABLE:
                waiting[model.QUEUE, label] += count
                age = (present - since).total_seconds() if since is not None else 0.0
                longest[model.QUEUE] = max(longest[model.QUEUE], age)
    for key, count in waiting.items():
        depth.add_metric(key, count)
    for queue, age in longest.items():
        oldest.add_metric([queue], age)
    return [rows, depth, oldest]


def _alive(
    session: Session, model: LeasedModel, offered: Collection[str]
) -> dict[tuple[str, str], tuple[int, datetime | None]]:
    """Return the number of rows and the oldest, for each status that is not terminal and each label."""
    # Ended rows are left out: there may be millions, and nobody watches them.
    states = [state for state, onward in (JOB_MOVES if model is Job else ASSET_MOVES).items() if onward]
    labels = {"", OTHER_LABEL, *offered} if model is Job else {""}
    counts: dict[tuple[str, str], tuple[int, datetime | None]]
    counts = {(status, label): (0, None) for status in states for label in sorted(labels)}
    columns = (model.status, _bounded_label(model, offered), func.count(), func.min(model.created_at))
    found = select(*columns).where(model.status.in_(states)).group_by(model.status, "bounded")
    return counts | {(status, label): (count, since) for status, label, count, since in session.execute(found)}


def _bounded_label(model: LeasedModel, offered: Collection[str]) -> ColumnElement[str]:
    """Return the label that a row is counted under: one that a worker has, `other`, or "" for none."""
    if model is not Job:
        return literal("").label("bounded")
    known = (Job.worker_label.in_(sorted(offered)), Job.worker_label)
    return case((Job.worker_label.is_(None), ""), known, else_=OTHER_LABEL).label("bounded")


def kind_of(model: LeasedModel) -> str:
    """Return what a row is called in labels: job, dataset or checkpoint."""
    return model.__name__.lower()


def _stored_family(session: Session) -> list[Metric]:
    stored = GaugeMetricFamily(
        "defeat_stored_bytes", "Bytes of finished objects in the object store, by kind.", labels=["kind"]
    )
    for kind, column in (
        ("artifact", Artifact.size_bytes),
        ("dataset", Dataset.size_bytes),
        ("checkpoint", Checkpoint.size_bytes),
    ):
        stored.add_metric([kind], float(session.scalar(select(func.sum(column))) or 0))
    return [stored]


def disk_families(settings: Settings) -> Iterator[Metric]:
    """Yield the size of the disk under `DEFEAT_HOME`, which need not exist yet, and its free space."""
    place = next(path for path in (settings.home, *settings.home.parents) if path.exists())
    usage = shutil.disk_usage(place)
    yield GaugeMetricFamily("defeat_disk_bytes", "Size of the disk under DEFEAT_HOME.", value=usage.total)
    yield GaugeMetricFamily("defeat_disk_free_bytes", "Free space on the disk under DEFEAT_HOME.", value=usage.free)


def serve(registry: CollectorRegistry, settings: Settings) -> Callable[[], None]:
    """Serve the registry at `/metrics` on `DEFEAT_METRICS_HOST` and `DEFEAT_METRICS_PORT`, if a port is set.

    Returns what ends it; a process that ends anyway need not call it. Raises `OSError` if the port cannot be had.
    """
    if settings.metrics_port is None:
        return lambda: None
    server, thread = start_http_server(settings.metrics_port, settings.metrics_host, registry)
    log.info("metrics_served", host=settings.metrics_host, port=settings.metrics_port)

    def _stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return _stop


def api_registry(database: Database, settings: Settings) -> CollectorRegistry:
    """Return the registry of an API process: its own counters and the gauges from the database."""
    registry = CollectorRegistry()
    registry.register(REGISTRY)
    registry.register(ServiceCollector(database, settings))
    return registry
