"""A worker's metrics, and those of its machine's GPUs.

The pool's child counts and the parent serves; they share a directory of files that `worker/__main__.py` creates.
"""

import csv
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from typing import Any, Final

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from app.metrics import Kept, disk_families, kind_of, serve
from app.models import Job
from app.settings import Settings
from defeat.engine.events import Progress
from worker.rundir import RecordedEvent
from worker.tasks.base import Outcome

log = structlog.get_logger(__name__)

_GPUS_KEPT_S: Final = 5.0
_GPU_ANSWER_S: Final = 5.0
_MIB: Final = 1024 * 1024
_QUERY: Final = ("uuid", "name", "utilization.gpu", "memory.used", "memory.total")
_WAIT_S: Final = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600, 72 * 3600)
_RUN_S: Final = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 72 * 3600, 168 * 3600)

WAITED: Final = Histogram(
    "defeat_wait_seconds", "Time from a row's creation or upload to its first claim.", ["kind"], buckets=_WAIT_S
)
RAN: Final = Histogram(
    "defeat_attempt_seconds",
    "Time from a claim to its recorded end. `failure_class` is empty unless it failed.",
    ["kind", "status", "failure_class"],
    buckets=_RUN_S,
)
CLAIMS: Final = Counter(
    "defeat_claims", "Claims of rows; `again`: whether the row had an earlier attempt.", ["kind", "again"]
)
HANDED_BACK: Final = Counter("defeat_handed_back", "Rows that a worker returned to the queue when it ended.", ["kind"])
LEASES_LOST: Final = Counter(
    "defeat_leases_lost", "Attempts that stopped because another attempt holds the row.", ["kind"]
)
DATABASE_ERRORS: Final = Counter("defeat_database_errors", "Transactions that failed and were postponed.")
STORAGE_RETRIES: Final = Counter("defeat_storage_retries", "Object transfers that failed and were repeated.")
WORKING: Final = Gauge("defeat_working", "Rows in work.", ["kind"], multiprocess_mode="livesum")
IMAGES_PER_S: Final = Gauge(
    "defeat_images_per_second", "Training images per second of the current run; 0: no run.", multiprocess_mode="livesum"
)


def claimed(row: Any) -> None:
    """Count a claim; of the first claim also observe how long the row waited."""
    kind = kind_of(type(row))
    CLAIMS.labels(kind, "yes" if row.attempt > 1 else "no").inc()
    WORKING.labels(kind).set(1)
    # An asset's row is created before its upload begins, and the user causes that wait.
    since = row.created_at if isinstance(row, Job) else row.enqueued_at
    if row.attempt == 1 and since is not None:
        WAITED.labels(kind).observe(max(0.0, (row.started_at - since).total_seconds()))


def observe(events: Iterable[RecordedEvent]) -> None:
    """Set the throughput to the last one that the run reported."""
    for event in events:
        if isinstance(event, Progress):
            IMAGES_PER_S.set(event.images_per_s or 0.0)


def finished(row: Any, outcome: Outcome, took_s: float) -> None:
    """Count an attempt whose end was recorded, with its duration."""
    failure_class = outcome.failure["class"] if outcome.failure else ""
    RAN.labels(kind_of(type(row)), outcome.status, failure_class).observe(took_s)


def lease_lost(row: Any) -> None:
    """Count an attempt that lost its lease."""
    LEASES_LOST.labels(kind_of(type(row))).inc()


def handed_back(row: Any) -> None:
    """Count a row that returned to the queue because this worker ends."""
    HANDED_BACK.labels(kind_of(type(row))).inc()


def released(row: Any) -> None:
    """Set the gauges to zero after an attempt, however it ended."""
    WORKING.labels(kind_of(type(row))).set(0)
    IMAGES_PER_S.set(0.0)


class GpuCollector(Collector):
    """Utilisation and memory of this machine's NVIDIA GPUs, by nvidia-smi; nothing where there is none."""

    def __init__(self, command: str | None) -> None:
        self._command = command
        self._families = Kept(self._ask, _GPUS_KEPT_S)

    def describe(self) -> Iterable[Metric]:
        """Return nothing, because registration must not start a program."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield the families, at most a few seconds old."""
        if self._command is not None:
            yield from self._families.get()

    def _ask(self) -> list[Metric]:
        arguments = [str(self._command), f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=_GPU_ANSWER_S)
        except (OSError, subprocess.SubprocessError) as error:
            log.warning("gpus_not_asked", error=str(error))
            return [GaugeMetricFamily("defeat_gpu_up", "Whether nvidia-smi answered.", value=0)]
        return _gpu_families(done.stdout)


def _gpu_families(answer: str) -> list[Metric]:
    labels = ["gpu", "name"]
    families = [
        (
            GaugeMetricFamily(
                "defeat_gpu_utilization_ratio",
                "Busy share of the last interval, 0 to 1.",
                labels=labels,
            ),
            0.01,
        ),
        (GaugeMetricFamily("defeat_gpu_memory_used_bytes", "GPU memory in use.", labels=labels), _MIB),
        (GaugeMetricFamily("defeat_gpu_memory_bytes", "GPU memory in total.", labels=labels), _MIB),
    ]
    for uuid, name, *values in csv.reader(answer.splitlines(), skipinitialspace=True):
        for (family, unit), value in zip(families, values, strict=True):
            # `[N/A]` for example for the utilisation of a GPU that is partitioned into instances (MIG).
            if value.isdecimal():
                family.add_metric([uuid, name], int(value) * unit)
    up = GaugeMetricFamily("defeat_gpu_up", "Whether nvidia-smi answered.", value=1)
    return [up, *(family for family, _ in families)]


class _DiskCollector(Collector):
    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        yield from disk_families(self._settings)


def worker_registry(settings: Settings) -> CollectorRegistry:
    """Return the metrics that a worker serves: the counters of all its processes, its GPUs and its disk."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, os.environ["PROMETHEUS_MULTIPROC_DIR"])
    registry.register(GpuCollector(shutil.which("nvidia-smi")))
    registry.register(_DiskCollector(settings))
    return registry


def serve_worker(settings: Settings) -> None:
    """Serve this worker's metrics until the process ends, if a port is set. Raises `OSError` if the port is in use."""
    # Never stopped: at the interpreter's end and in children that are forked later the serving thread is gone, so a
    # wait for it would never return.
    serve(worker_registry(settings), settings)
