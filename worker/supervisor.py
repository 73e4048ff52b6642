"""Works on leased rows: claims one, starts its run, records what the run writes, and records the end.

All database work and the start of the run happen in the calling thread, which must be the main one. One other thread
works on the object store, so that the lease is renewed while a transfer blocks.
"""

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from contextlib import ExitStack
from typing import Any, Generic, TypeVar

import structlog
from sqlalchemy.orm import Session

from app.db import now
from app.queue import leases
from app.queue.leases import LeaseLost, Row
from app.queue.scheduling import WorkerResources
from app.stack.processes import locked
from app.states import CANCELLING, PAUSED, PAUSING, QUEUED
from app.storage import Stored
from app.traces import span
from defeat.engine.events import FailureClass
from defeat.engine.report import RunError
from worker import metrics
from worker.attempts import attempt, ended
from worker.checkpoint_uploader import CheckpointUploader
from worker.patience import DatabaseBackoff, Deadline, Stopped, StoreThread
from worker.process import RUN_COMMAND, RunProcess
from worker.recorder import Recorder
from worker.retry import RETRYABLE, next_attempt, with_advice, worker_error
from worker.rundir import BadResult, RecordedMessage, RunDirectory, remove_dead_runs
from worker.tasks.base import Context, Handler, Outcome, Request

log = structlog.get_logger(__name__)

T = TypeVar("T")


class Supervisor:
    """Works on rows, one at a time.

    Args:
        context: database, object store and settings.
        owner: the holder of the lease: the worker's id, and then whatever helps people to find the worker.
        resources: what the worker has for a job.
        stop: set when the worker must end soon: the run then saves and the row returns to the queue.
        command: starts a run; the supervisor appends the run directory.
        tick_s: pause between two looks at the run's events and at the row, seconds; less where the lease is short. The
            end of the run is noticed at once.
        backoff_s: pause before the first repetition of what failed, seconds; doubled each time.
    """

    def __init__(
        self,
        context: Context,
        *,
        owner: str,
        stop: threading.Event,
        resources: WorkerResources = WorkerResources(),  # noqa: B008 - frozen
        command: Sequence[str] = RUN_COMMAND,
        tick_s: float = 2.0,
        backoff_s: float = 1.0,
    ) -> None:
        self.context = context
        self.owner = owner
        self.resources = resources
        self.stop = stop
        self.command = command
        # Each look costs some milliseconds of this machine's processor time: `benchmarks/supervisor.py`.
        self.tick_s = min(tick_s, context.settings.lease_s / 6)
        self.backoff_s = backoff_s

    def serve(self, handlers: Sequence[Handler[Any]]) -> bool:
        """Work on one row after another until none is left or the worker must end; the first handler's rows come first.

        A worker that becomes free thus finds the rows that wait, even if their messages went to another worker or the
        broker does not answer. Returns whether there was any row; raises as `work` does.
        """
        served = False
        while not self.stop.is_set() and any(self.work(handler) for handler in handlers):
            served = True
        return served

    def work(self, handler: Handler[Row]) -> bool:
        """Claim the next row and work on it until its end is recorded; return False if there is no row to claim.

        Raises the database's error if it does not answer the claim. Raises what is a defect of this program after it
        was recorded as the row's failure.
        """
        settings = self.context.settings
        with self.context.database.write() as session:
            row = leases.claim_next(
                session,
                handler.model,
                self.resources,
                owner=self.owner,
                lease_s=settings.lease_s,
                max_attempts=settings.max_attempts,
            )
            if row is not None:
                handler.record(session, row, [_claimed(row.attempt)])
        if row is None:
            return False
        with attempt(row):
            log.info("claimed")
            metrics.claimed(row)
            try:
                _Attempt(self, handler, row).carry_out()
            except LeaseLost as error:
                log.warning("lease_lost", error=str(error))
                metrics.lease_lost(row)
                ended("lease_lost")
            except Stopped as error:
                log.warning("stopped", error=str(error))
                ended("stopped")
            finally:
                metrics.released(row)
        return True


def _claimed(attempt: int) -> RecordedMessage:
    if attempt == 1:
        return RecordedMessage(level="info", code="claimed", message="a worker started the job")
    return RecordedMessage(level="info", code="resumed", message=f"a worker started attempt {attempt}")


class _Attempt(Generic[Row]):
    """One claim of one row, from the claim to the recorded end."""

    def __init__(self, supervisor: Supervisor, handler: Handler[Row], row: Row) -> None:
        settings = supervisor.context.settings
        self._supervisor = supervisor
        self._settings = settings
        self._handler: Handler[Row] = handler
        self._row: Row = row
        self._claimed_at = time.monotonic()
        self._directory = RunDirectory(settings.scratch / "runs" / f"{row.id}-{row.attempt}")
        self._store_thread = StoreThread(
            patience_s=settings.storage_patience_s, first_s=supervisor.backoff_s, stop=supervisor.stop
        )
        uploader = CheckpointUploader(
            supervisor.context.storage,
            self._directory,
            self._store_thread.executor,
            backoff_s=supervisor.backoff_s,
            key_of=lambda number: handler.checkpoint_key(row, number),
        )
        self._recorder: Recorder[Row] = Recorder(
            row,
            handler,
            self._directory.events,
            uploader,
            DatabaseBackoff(supervisor.backoff_s, supervisor.stop),
            tick_s=supervisor.tick_s,
        )

    def carry_out(self) -> None:
        """Run the row's task and record the end. Raises `LeaseLost`, `Stopped`, and defects of this program."""
        with ExitStack() as cleanup:
            try:
                outcome = self._execute(cleanup)
                if outcome is not None:
                    outcome = self._conclude(outcome)
            except (LeaseLost, Stopped):
                raise
            except Exception as error:
                log.exception("supervisor_failed")
                failed = worker_error(error)
                if not self._retry(failed):
                    self._record_end(failed, {})
                raise
            if outcome is None:
                self._hand_back()

    # ---- what others request ----

    @property
    def _cancelled(self) -> bool:
        return self._recorder.status == CANCELLING

    @property
    def _interrupted(self) -> bool:
        """Whether the run must end now and another attempt will resume it."""
        return (self._supervisor.stop.is_set() or self._recorder.status == PAUSING) and not self._cancelled

    @property
    def _must_end(self) -> bool:
        return self._cancelled or self._interrupted

    # ---- the run ----

    def _execute(self, cleanup: ExitStack) -> Outcome | None:
        """Return how the run ended; None: it was interrupted, and another attempt will resume it."""
        self._make_directory(cleanup)
        if self._cancelled:
            return Outcome("cancelled")
        try:
            request = self._prepare(cleanup)
        except RunError as error:
            if self._must_end and error.failure_class == "infra":
                return Outcome("cancelled") if self._cancelled else None
            return Outcome.failed(error.failure_class, error.code, error.detail)
        outcome = self._classify(None if self._must_end else self._run(request))
        self._recorder.drain(keep_checkpoint=_may_be_resumed(outcome))
        try:
            return outcome and self._handler.complete(outcome, self._directory)
        except BadResult as error:
            return self._failed("bad_result", str(error))

    def _make_directory(self, cleanup: ExitStack) -> None:
        path = self._directory.path
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_dead_runs(path.parent)
        lock = path.with_name(path.name + ".lock")
        cleanup.enter_context(locked(lock))
        cleanup.callback(lock.unlink, missing_ok=True)
        cleanup.callback(shutil.rmtree, path, ignore_errors=True)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        # Registered last, so called first: the other thread has ended before the directory is removed.
        cleanup.callback(self._store_thread.close)

    @span("prepare")
    def _prepare(self, cleanup: ExitStack) -> Request:
        def _fetch() -> Request:
            return self._handler.prepare(self._row, self._directory.path, cleanup)

        try:
            return self._with_store(_fetch, must_end=lambda: self._must_end)
        except OSError as error:
            raise RunError("infra", "inputs_unavailable", f"the run's inputs could not be fetched: {error}") from error

    @span("run")
    def _run(self, request: Request) -> RunError:
        """Wait for the end of the run; return the failure that it is if the run left no result."""
        self._directory.write_request(
            {
                "kind": request.kind,
                "id": self._row.id,
                "attempt": self._row.attempt,
                "request_id": self._row.request_id,
                "spec": dict(request.spec),
                "inputs": dict(request.inputs),
            }
        )
        process = RunProcess(self._supervisor.command, self._directory.path, log=self._directory.log)
        log.info("run_started", pid=process.pid)
        try:
            return self._watch(process)
        finally:
            process.kill()

    def _watch(self, process: RunProcess) -> RunError:
        grace: Deadline | None = None
        while (code := process.wait(self._supervisor.tick_s)) is None:
            self._recorder.tick()
            if self._must_end and grace is None:
                log.info("run_asked_to_end", cancelled=self._cancelled)
                process.terminate()
                grace = Deadline(self._settings.cancel_grace_s)
            if grace is not None and grace.passed:
                log.warning("run_killed", grace_s=self._settings.cancel_grace_s)
                process.kill()
        log.info("run_ended", exit_code=code)
        return process.death(code)

    def _classify(self, death: RunError | None) -> Outcome | None:
        """Return the outcome by the run's result, or by its death if it left none; None: it was interrupted."""
        try:
            result = self._directory.result()
        except BadResult as error:
            return self._failed("bad_result", str(error))
        if result is not None and result.status == "succeeded":
            return Outcome("succeeded", result.results, None, result.artifacts)
        if result is not None and result.failure is not None and result.status == "failed":
            failure = {**result.failure, "log_tail": self._directory.log_tail()}
            return Outcome("failed", result.results, failure, result.artifacts)
        if self._cancelled:
            kept = (result.results, None, result.artifacts) if result is not None else ()
            return Outcome("cancelled", *kept)
        if self._interrupted:
            return None
        if result is not None and result.status == "cancelled":
            return self._failed("run_terminated", "the run received SIGTERM, but not from its worker")
        assert death is not None, "a row whose run was not started is cancelled or interrupted"
        return self._failed(death.code, death.detail, death.failure_class)

    def _failed(self, code: str, detail: str, failure_class: FailureClass = "infra") -> Outcome:
        return Outcome.failed(failure_class, code, detail, log_tail=self._directory.log_tail())

    def _with_store(self, work: Callable[[], T], *, must_end: Callable[[], bool]) -> T:
        """Do `work` in the other thread, repeated while the object store does not answer, and keep the lease meanwhile.

        The attempt waits for the store because it could do nothing else without it. Raises the store's error once the
        patience is over; `must_end` shortens it.
        """
        future = self._store_thread.submit(work, must_end=must_end)
        while not wait([future], timeout=self._supervisor.tick_s).done:
            self._recorder.tick()
        return future.result()

    # ---- the end ----

    def _conclude(self, outcome: Outcome) -> Outcome | None:
        """Store what the run left and record its end, or return the row for a retry; None: interrupted before that."""
        if self._retry(outcome):
            return outcome
        try:
            uploaded = self._store(outcome)
        except (OSError, ValueError) as error:
            if self._interrupted:
                return None
            detail = f"the run {outcome.status}, but its results could not be stored: {error}"
            uploaded = {}
            outcome = Outcome("cancelled") if self._cancelled else self._failed("storage_failed", detail)
            if self._retry(outcome):
                return outcome
        self._record_end(outcome, uploaded)
        try:
            self._handler.clean_up(self._row, outcome, uploaded)
        except OSError as error:
            log.warning("not_tidied", error=str(error))
        return outcome

    @span("store")
    def _store(self, outcome: Outcome) -> dict[str, Stored]:
        def _upload() -> dict[str, Stored]:
            return self._handler.upload(self._row, outcome, self._directory)

        return self._with_store(_upload, must_end=lambda: self._cancelled)

    def _record_end(self, outcome: Outcome, uploaded: dict[str, Stored]) -> None:
        def _finish(session: Session, fresh: Row) -> None:
            self._handler.finish(session, fresh, with_advice(self._handler, fresh, outcome), uploaded)

        self._recorder.write(_finish)
        log.info("finished", status=outcome.status, failure=outcome.failure and outcome.failure["code"])
        metrics.finished(self._row, outcome, time.monotonic() - self._claimed_at)
        ended(outcome.status, outcome.failure)

    def _retry(self, outcome: Outcome) -> bool:
        """Return the row to the queue if another attempt may succeed; return whether it did."""
        failure = outcome.failure
        if failure is None or failure["class"] not in RETRYABLE:
            return False
        planned = None

        def _plan(session: Session, fresh: Row) -> None:
            nonlocal planned
            planned = None
            if fresh.status != CANCELLING:
                planned = next_attempt(self._handler, fresh, failure, self._settings, present=now(session))
            if planned is not None:
                self._give_back(session, fresh, planned.status, planned.message, **planned.values)

        self._recorder.write(_plan)
        if planned is not None:
            log.info("to_be_tried_again", failure=failure["code"])
            ended("retrying", failure)
        return planned is not None

    def _hand_back(self) -> None:
        """Pause the row if its owner requested that, else return it to the queue without a failed attempt."""

        def _release(session: Session, fresh: Row) -> None:
            where = self._handler.resume_point(fresh)
            if fresh.status == CANCELLING:
                self._handler.finish(session, fresh, Outcome("cancelled"), {})
            elif fresh.status == PAUSING:
                text = f"the job is paused; after a resume it continues {where}"
                self._give_back(session, fresh, PAUSED, RecordedMessage(level="info", code="paused", message=text))
            else:
                text = f"the worker shut down; another one continues {where}"
                self._give_back(session, fresh, QUEUED, RecordedMessage(level="info", code="interrupted", message=text))

        self._recorder.write(_release)
        log.info("handed_back")
        metrics.handed_back(self._row)
        ended("handed_back")

    def _give_back(self, session: Session, fresh: Row, status: str, message: RecordedMessage, **values: Any) -> None:
        """Release the row; where it is queued, the sweep sends its message."""
        self._handler.record(session, fresh, [message])
        leases.give_back(session, fresh, status=status, **values, **self._handler.idle_values(fresh))


def _may_be_resumed(outcome: Outcome | None) -> bool:
    """Return whether another attempt may need the newest training checkpoint; None: the run was interrupted."""
    if outcome is None or outcome.status == "cancelled":
        return True
    return outcome.failure is not None and outcome.failure["class"] in RETRYABLE
