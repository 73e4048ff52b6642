"""The run directory, from the run's side: what it reads and writes. See docs/architecture.md for the format."""

import json
import os
import reprlib
import signal
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Literal

PROGRESS_EVERY_S = 0.5

FailureClass = Literal["user", "data", "oom", "infra"]
Level = Literal["info", "warn", "error"]
Subject = Literal["teacher", "student"]
Status = Literal["succeeded", "failed", "cancelled"]


_MAX_TEXT = 200  # characters of a value in a message


def shown(value: object) -> str:
    """Return `value` fit for a message: control and undecodable characters escaped, at most 200 characters."""
    text = value if isinstance(value, str) else reprlib.repr(value)  # bounded in depth and length
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: _MAX_TEXT + 1])
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"


class RunError(Exception):
    """A failure that the run can name. `detail` tells the user what was wrong, which value, and what would do."""

    def __init__(self, failure_class: FailureClass, code: str, detail: str) -> None:
        super().__init__(detail)
        self.failure_class = failure_class
        self.code = code
        self.detail = detail


class Cancelled(Exception):
    """The run was asked to end (SIGTERM) and has saved what it wanted to save."""


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data` or leave it as it was: written beside it, synced, renamed.

    Raises `RunError("infra", "disk_full", …)` if there is no room; what stood at `path` is untouched.
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
    """Write one line, with the time, to the run's log (its standard output)."""
    print(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {line}", flush=True)


class Reporter:
    """Writes a run's events, artifacts and result into its directory.

    Attributes:
        directory: the run directory.
        cancelled: True once SIGTERM came; long work checks it, saves, and raises `Cancelled`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cancelled = False
        self._artifacts: dict[str, dict[str, Any]] = {}
        self._stage: tuple[str, int | None] | None = None
        self._progress_at = 0.0
        self._events = (directory / "events.jsonl").open("a", buffering=1, encoding="utf-8")
        (directory / "artifacts").mkdir(exist_ok=True)
        (directory / "checkpoints").mkdir(exist_ok=True)

    def listen_for_cancel(self) -> None:
        """Set `cancelled` when SIGTERM comes, instead of dying."""

        def _on_term(_signal: int, _frame: FrameType | None) -> None:
            self.cancelled = True

        signal.signal(signal.SIGTERM, _on_term)

    def check_cancelled(self) -> None:
        """Raise `Cancelled` if the run was asked to end."""
        if self.cancelled:
            raise Cancelled

    def _event(self, kind: str, **members: Any) -> None:
        line = {"type": kind, "time": datetime.now(UTC).isoformat(), **members}
        # allow_nan=False: NaN is not JSON, and no database or browser takes it; callers turn it into null.
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
        """Say where the run is; `fraction` is of the whole run, 0 to 1.

        At most two a second are written, unless phase or epoch changed: a fast step must not wait for its news.
        """
        now, stage = time.monotonic(), (phase, epoch)
        if stage == self._stage and now - self._progress_at < PROGRESS_EVERY_S and fraction < 1:
            return
        self._stage, self._progress_at = stage, now
        self._event(
            "progress",
            phase=phase,
            fraction=round(min(max(fraction, 0.0), 1.0), 4),
            epoch=epoch,
            epochs=epochs,
            step=step,
            steps=steps,
            eta_s=None if eta_s is None else round(eta_s, 1),
            images_per_s=None if images_per_s is None else round(images_per_s, 2),
        )

    def message(self, level: Level, code: str, message: str) -> None:
        """Tell people something, with a stable code."""
        self._event("message", level=level, code=code, message=message)
        log(f"{level} {code}: {message}")

    def metrics(self, subject: Subject, *, step: int, epoch: float, values: Mapping[str, float | None]) -> None:
        """Log values at one optimiser step; a value that is not finite is logged as null."""
        finite = {
            name: value if value is not None and abs(value) < float("inf") else None for name, value in values.items()
        }
        self._event("metrics", subject=subject, step=step, epoch=round(epoch, 4), values=finite)
        shown = " ".join(f"{name} {value:.4g}" for name, value in finite.items() if value is not None)
        log(f"{subject} step {step} epoch {epoch:.2f}: {shown}")

    def evaluation(self, subject: Subject, *, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Log the COCO metrics of one detector after one epoch."""
        self._event("evaluation", subject=subject, epoch=epoch, metrics=dict(metrics))
        shown = " ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
        log(f"{subject} evaluated after epoch {epoch}: {shown}")

    def checkpoint(self, path: Path) -> None:
        """Offer a complete training checkpoint for another attempt to go on from."""
        self._event("checkpoint", path=str(path.relative_to(self.directory)))

    def artifact(self, name: str, *, kind: str, content_type: str, details: Mapping[str, Any] | None = None) -> Path:
        """Register `artifacts/<name>` as a result and return its path; registering again replaces the details."""
        path = self.directory / "artifacts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._artifacts[name] = {
            "name": name,
            "kind": kind,
            "content_type": content_type,
            "details": dict(details or {}),
        }
        return path

    def finish(
        self,
        status: Status,
        *,
        results: Mapping[str, Any] | None = None,
        failure: RunError | None = None,
    ) -> None:
        """Write `result.json`, last: artifacts that were registered and exist are listed in it."""
        document = {
            "status": status,
            "results": dict(results or {}),
            "failure": failure and {"class": failure.failure_class, "code": failure.code, "detail": failure.detail},
            "artifacts": [
                artifact
                for artifact in self._artifacts.values()
                if (self.directory / "artifacts" / artifact["name"]).is_file()
            ],
        }
        self._events.flush()
        write_atomically(self.directory / "result.json", json.dumps(document).encode())


class Stopwatch:
    """Throughput and remaining time from how long recent units of work took."""

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
