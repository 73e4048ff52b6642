"""What a run writes into its directory: events, artifacts and the result. docs/architecture.md has the format."""

import json
import os
import reprlib
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from defeat.engine.events import (
    CheckpointOffer,
    Evaluation,
    Event,
    Failure,
    FailureClass,
    Level,
    Message,
    Metrics,
    Progress,
    Result,
    ResultArtifact,
    Status,
    Subject,
)

PROGRESS_EVERY_S = 0.5


_MAX_TEXT = 200  # characters of a value in a message


def shown(value: object) -> str:
    """Return `value` fit for a message: control and undecodable characters escaped, at most 200 characters."""
    text = value if isinstance(value, str) else reprlib.repr(value)  # bounded in depth and length
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: _MAX_TEXT + 1])
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"


class RunError(Exception):
    """A failure with a known cause.

    Attributes:
        failure_class: user, data, oom or infra.
        code: stable, for programs.
        detail: what was wrong, which value, and what to use instead.
    """

    def __init__(self, failure_class: FailureClass, code: str, detail: str) -> None:
        super().__init__(detail)
        self.failure_class = failure_class
        self.code = code
        self.detail = detail


class Cancelled(Exception):
    """The run received SIGTERM and has saved its state."""


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the content of `path` by `data`, or leave it unchanged: writes a second file, syncs it and renames it.

    Raises `RunError("infra", "disk_full", …)` if the disk is full; the old content of `path` then stays.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunError(
            "infra", "disk_full", f"could not write {path.name} ({len(data)} bytes): {error.strerror}; free some space"
        ) from error


def log(line: str) -> None:
    """Write one line with the time to the run's log, which is its standard output."""
    print(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {line}", flush=True)


class Reporter:
    """Writes a run's events, artifacts and result into its directory.

    Attributes:
        directory: the run directory.
        cancelled: True once the process received SIGTERM; long work checks it, saves, and raises `Cancelled`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cancelled = False
        self._artifacts: dict[str, ResultArtifact] = {}
        self._stage: tuple[str, int | None] | None = None
        self._progress_at = 0.0
        self._events = (directory / "events.jsonl").open("a", buffering=1, encoding="utf-8")
        (directory / "artifacts").mkdir(exist_ok=True)
        (directory / "checkpoints").mkdir(exist_ok=True)

    def listen_for_cancel(self) -> None:
        """Set `cancelled` on SIGTERM instead of ending the process."""

        def _on_term(_signal: int, _frame: FrameType | None) -> None:
            self.cancelled = True

        signal.signal(signal.SIGTERM, _on_term)

    def check_cancelled(self) -> None:
        """Raise `Cancelled` if the process received SIGTERM."""
        if self.cancelled:
            raise Cancelled

    def _write(self, event: Event) -> None:
        line = asdict(event) | {"time": datetime.now(UTC).isoformat()}
        # allow_nan=False: NaN is not JSON, and databases and browsers reject it; callers write null instead.
        self._events.write(json.dumps(line, allow_nan=False) + "\n")

    def progress(
        self,
        phase: str,
        *,
        fraction: float,
        epoch: int | None = None,
        epochs: int | None = None,
        step: int | None = None,
        steps: int | None = None,
        eta_s: float | None = None,
        images_per_s: float | None = None,
    ) -> None:
        """Report where the run is, by the members of `Progress`; `fraction` is clipped to 0 to 1.

        Writes at most two events a second unless phase or epoch has changed: a fast step must not wait for them.
        """
        now, stage = time.monotonic(), (phase, epoch)
        if stage == self._stage and now - self._progress_at < PROGRESS_EVERY_S and fraction < 1:
            return
        self._stage, self._progress_at = stage, now
        self._write(
            Progress(
                phase=phase,
                fraction=round(min(max(fraction, 0.0), 1.0), 4),
                epoch=epoch,
                epochs=epochs,
                step=step,
                steps=steps,
                eta_s=None if eta_s is None else round(eta_s, 1),
                images_per_s=None if images_per_s is None else round(images_per_s, 2),
            )
        )

    def message(self, level: Level, code: str, message: str) -> None:
        """Report a text for people, with a stable code."""
        self._write(Message(level=level, code=code, message=message))
        log(f"{level} {code}: {message}")

    def metrics(self, subject: Subject, *, step: int, epoch: float, values: Mapping[str, float | None]) -> None:
        """Log values of one optimiser step; a value that is not finite is logged as null."""
        finite = {
            name: value if value is not None and abs(value) < float("inf") else None for name, value in values.items()
        }
        self._write(Metrics(subject=subject, step=step, epoch=round(epoch, 4), values=finite))
        shown = " ".join(f"{name} {value:.4g}" for name, value in finite.items() if value is not None)
        log(f"{subject} step {step} epoch {epoch:.2f}: {shown}")

    def evaluation(self, subject: Subject, *, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Log the COCO metrics of one detector after one epoch."""
        self._write(Evaluation(subject=subject, epoch=epoch, metrics=dict(metrics)))
        shown = " ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
        log(f"{subject} evaluated after epoch {epoch}: {shown}")

    def checkpoint(self, path: Path) -> None:
        """Offer a complete training checkpoint from which another attempt can resume."""
        self._write(CheckpointOffer(path=str(path.relative_to(self.directory))))

    def artifact(self, name: str, *, kind: str, content_type: str, details: Mapping[str, Any] | None = None) -> Path:
        """Register `artifacts/<name>` as a result and return its path; a second registration replaces the first."""
        path = self.directory / "artifacts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._artifacts[name] = ResultArtifact(
            name=name, kind=kind, content_type=content_type, details=dict(details or {})
        )
        return path

    def finish(
        self,
        status: Status,
        *,
        results: Mapping[str, Any] | None = None,
        failure: RunError | None = None,
    ) -> None:
        """Write `result.json`; call it last. It lists the registered artifacts whose files exist."""
        reason: Failure | None = None
        if failure is not None:
            reason = {"class": failure.failure_class, "code": failure.code, "detail": failure.detail}
        folder = self.directory / "artifacts"
        result = Result(
            status=status,
            results=dict(results or {}),
            failure=reason,
            artifacts=[artifact for artifact in self._artifacts.values() if (folder / artifact.name).is_file()],
        )
        self._events.flush()
        write_atomically(self.directory / "result.json", json.dumps(asdict(result)).encode())


class Stopwatch:
    """Throughput and remaining time, from the duration of recent units of work."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._last = self._start
        self._rate: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the stopwatch was made."""
        return time.monotonic() - self._start

    def lap(self, units: float) -> float:
        """Count `units` of work since the last lap; return the smoothed rate, units per second."""
        now = time.monotonic()
        rate = units / max(now - self._last, 1e-9)
        self._rate = rate if self._rate is None else 0.8 * self._rate + 0.2 * rate
        self._last = now
        return self._rate
