"""Works on one leased row: claims it, starts its run, tells the database what the run says, and records the end.

All database work and the start of the run happen in the calling thread, which must be the main one; what may block on
the object store happens in one other thread, so that the lease is renewed meanwhile.
"""

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from itertools import count
from typing import Any, Generic, TypeVar

import structlog
from sqlalchemy import select
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from app.db import now
from app.logs import first_line
from app.queue import leases
from app.queue.leases import LeaseLost, Row
from app.queue.scheduling import Offer
from app.stack.processes import locked
from app.states import CANCELLING, PAUSED, PAUSING, QUEUED
from app.storage import Stored
from app.traces import span
from defeat.engine.report import FailureClass, RunError
from worker import metrics
from worker.attempts import attempt, ended
from worker.checkpoint_uploader import CheckpointKeeper
from worker.process import RUN_COMMAND, RunProcess
from worker.retry import PASSING, another, explained, pause_s, worker_error
from worker.rundir import BadResult, CheckpointOffer, Event, Message, RunDirectory, remove_dead_runs
from worker.tasks.base import Adapter, Context, Outcome, Request

log = structlog.get_logger(__name__)

T = TypeVar("T")
DATABASE_AWAY = (OperationalError, InterfaceError, PoolTimeout)
_TRIES = 4
_MAX_BACKOFF_S = 5.0
# How long somebody who waits for an attempt's end waits for the object store.
_HURRY_S = 10.0


class Stopped(Exception):
    """The worker must end and cannot wait any longer; the row is left to its lease."""


class Supervisor:
    """Works on rows, one at a time.

    Args:
        context: database, object store and settings.
        owner: who holds the lease: the worker's id, then what helps people.
        offer: what the worker has for a job.
        stop: set when the worker is to end soon: the run is told to save and the row goes back to the queue.
        command: starts a run when its directory is appended.
        tick_s: time between two looks at what the run says and at the row; less where the lease is short. The run's end
            is seen at once.
        backoff_s: first pause before something that failed is tried again; doubled each time.
    """

    def __init__(
        self,
        context: Context,
        *,
        owner: str,
        stop: threading.Event,
        offer: Offer = Offer(),  # noqa: B008 - frozen
        command: Sequence[str] = RUN_COMMAND,
        tick_s: float = 2.0,
        backoff_s: float = 1.0,
    ) -> None:
        self.context = context
        self.owner = owner
        self.offer = offer
        self.stop = stop
        self.command = command
        # Each look costs some milliseconds of this machine's processor time: `benchmarks/supervisor.py`.
        self.tick_s = min(tick_s, context.settings.lease_s / 6)
        self.backoff_s = backoff_s

    def serve(self, adapters: Sequence[Adapter[Any]]) -> bool:
        """Work on one row after the other, of the first adapter that has one, until there is none or it must end.

        A worker that has come free so finds what waits for it even if the message has gone to another one, or the
        broker is away. Returns whether there was any; raises as `work` does.
        """
        served = False
        while not self.stop.is_set() and any(self.work(adapter) for adapter in adapters):
            served = True
        return served

    def work(self, adapter: Adapter[Row]) -> bool:
        """Claim the row that is next and see its run through; return False at once if there is none to be had.

        Raises the database's error if it is away when claiming, and whatever is a mistake in this program, after it
        was recorded as the row's failure.
        """
        settings = self.context.settings
        with self.context.database.write() as session:
            row = leases.claim_next(
                session,
                adapter.model,
                self.offer,
                owner=self.owner,
                lease_s=settings.lease_s,
                max_attempts=settings.max_attempts,
            )
            if row is not None:
                adapter.record(session, row, [_claimed(row.attempt)])
        if row is None:
            return False
        with attempt(row):
            log.info("claimed")
            metrics.claimed(row)
            try:
                _Attempt(self, adapter, row).carry_out()
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


def _claimed(attempt: int) -> Message:
    if attempt == 1:
        return Message(level="info", code="claimed", message="a worker has begun")
    return Message(level="info", code="resumed", message=f"a worker has begun attempt {attempt}")


class _Attempt(Generic[Row]):
    """One claim of one row, from the claim to the recorded end."""

    def __init__(self, supervisor: Supervisor, adapter: Adapter[Row], row: Row) -> None:
        self._supervisor = supervisor
        self._settings = supervisor.context.settings
        self._database = supervisor.context.database
        self._adapter: Adapter[Row] = adapter
        self._row: Row = row
        self._status = row.status  # as it was last seen: its owner may ask for a pause, or for the end
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="storage")
        self._left = threading.Event()  # nobody waits for that thread any more
        self._directory = RunDirectory(self._settings.scratch / "runs" / f"{row.id}-{row.attempt}")
        self._keeper = CheckpointKeeper(
            supervisor.context.storage,
            self._directory,
            self._executor,
            backoff_s=supervisor.backoff_s,
            key_of=lambda number: adapter.checkpoint_key(row, number),
        )
        self._begun_at = time.monotonic()
        self._renew_at = self._begun_at + self._settings.lease_s / 3
        self._database_errors = 0
        self._database_at = 0.0

    def carry_out(self) -> None:
        with ExitStack() as resources:
            try:
                outcome = self._outcome(resources)
                if outcome is not None:
                    outcome = self._conclude(outcome)
            except (LeaseLost, Stopped):
                raise
            except Exception as error:
                log.exception("supervisor_failed")
                failed = worker_error(error)
                if not self._try_again(failed):
                    self._record_end(failed, {})
                raise
            if outcome is None:
                self._hand_back()

    def _make_directory(self, resources: ExitStack) -> None:
        path = self._directory.path
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_dead_runs(path.parent)
        lock = path.with_name(path.name + ".lock")
        resources.enter_context(locked(lock))
        resources.callback(lock.unlink, missing_ok=True)
        resources.callback(shutil.rmtree, path, ignore_errors=True)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        # Last in, first out: the other thread has ended before the directory goes.
        resources.callback(self._executor.shutdown, wait=True, cancel_futures=True)
        resources.callback(self._left.set)

    # ---- the run ----

    @property
    def _cancelled(self) -> bool:
        return self._status == CANCELLING

    @property
    def _must_end(self) -> bool:
        return self._cancelled or self._interrupted

    def _outcome(self, resources: ExitStack) -> Outcome | None:
        """Return how the run ended; None: it was interrupted, and another attempt is to go on with it."""
        self._make_directory(resources)
        if self._cancelled:
            return Outcome("cancelled")
        try:
            request = self._prepare(resources)
        except RunError as error:
            if self._must_end and error.failure_class == "infra":
                return Outcome("cancelled") if self._cancelled else None
            return Outcome.failed(error.failure_class, error.code, error.detail)
        outcome = self._classify(None if self._must_end else self._run(request))
        self._drain(outcome)
        try:
            return outcome and self._adapter.complete(outcome, self._directory)
        except BadResult as error:
            return self._failed("bad_result", str(error))

    @span("prepare")
    def _prepare(self, resources: ExitStack) -> Request:
        def _fetch() -> Request:
            return self._adapter.prepare(self._row, self._directory.path, resources)

        try:
            return self._patiently_with_store(_fetch, hurry=lambda: self._must_end)
        except OSError as error:
            raise RunError("infra", "inputs_unavailable", f"the run's inputs could not be fetched: {error}") from error

    @span("run")
    def _run(self, request: Request) -> RunError:
        """See the run to its end and return what that is to be called if there is no result."""
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
        kill_at: float | None = None
        while (code := process.wait(self._supervisor.tick_s)) is None:
            self._tick()
            if self._must_end and kill_at is None:
                log.info("run_asked_to_end", cancelled=self._cancelled)
                process.terminate()
                kill_at = time.monotonic() + self._settings.cancel_grace_s
            if kill_at is not None and time.monotonic() > kill_at:
                log.warning("run_killed", grace_s=self._settings.cancel_grace_s)
                process.kill()
        log.info("run_ended", exit_code=code)
        return process.death(code)

    def _drain(self, outcome: Outcome | None) -> None:
        """Record what the run said last. A checkpoint is worth waiting for only if another attempt may need it.

        One that cannot be stored at once is left out.
        """
        failure = None if outcome is None else outcome.failure
        passing = failure is not None and failure["class"] in PASSING
        needed = passing or outcome is None or outcome.status == "cancelled"
        patience = time.monotonic() + _HURRY_S
        while not self._directory.events.exhausted or not self._keeper.idle:
            if not needed or time.monotonic() > patience:
                self._keeper.drop_waiting()
            self._tick()
            self._pause_unless_stopping("the run's last events could not be recorded")

    @property
    def _interrupted(self) -> bool:
        """Whether the run is to end before its time, for another attempt to go on."""
        return (self._supervisor.stop.is_set() or self._status == PAUSING) and not self._cancelled

    def _classify(self, death: RunError | None) -> Outcome | None:
        try:
            result = self._directory.result()
        except BadResult as error:
            return self._failed("bad_result", str(error))
        if result is not None and result.status == "succeeded":
            return Outcome("succeeded", result.results, None, result.artifacts)
        if result is not None and result.failure is not None and result.status == "failed":
            failure = {**result.failure.model_dump(by_alias=True), "log_tail": self._directory.log_tail()}
            return Outcome("failed", result.results, failure, result.artifacts)
        if self._cancelled:
            kept = (result.results, None, result.artifacts) if result is not None else ()
            return Outcome("cancelled", *kept)
        if self._interrupted:
            return None
        if result is not None and result.status == "cancelled":
            return self._failed("run_terminated", "the run was told to end (SIGTERM) by somebody else than its worker")
        assert death is not None, "a row whose run was not started is cancelled or interrupted"
        return self._failed(death.code, death.detail, death.failure_class)

    def _failed(self, code: str, detail: str, failure_class: FailureClass = "infra") -> Outcome:
        return Outcome.failed(failure_class, code, detail, log_tail=self._directory.log_tail())

    # ---- the end ----

    def _conclude(self, outcome: Outcome) -> Outcome | None:
        """Store what the run left and record its end, or have it tried again; None: interrupted before that."""
        if self._try_again(outcome):
            return outcome
        try:
            uploaded = self._store(outcome)
        except (OSError, ValueError) as error:
            if self._interrupted:
                return None
            detail = f"the run {outcome.status}, but what it left could not be stored: {error}"
            uploaded = {}
            outcome = Outcome("cancelled") if self._cancelled else self._failed("storage_failed", detail)
            if self._try_again(outcome):
                return outcome
        self._record_end(outcome, uploaded)
        try:
            self._adapter.tidy(self._row, outcome, uploaded)
        except OSError as error:
            log.warning("not_tidied", error=str(error))
        return outcome

    @span("store")
    def _store(self, outcome: Outcome) -> dict[str, Stored]:
        def _upload() -> dict[str, Stored]:
            return self._adapter.upload(self._row, outcome, self._directory)

        return self._patiently_with_store(_upload, hurry=lambda: self._cancelled)

    def _record_end(self, outcome: Outcome, uploaded: dict[str, Stored]) -> None:
        def _finish(session: Session, fresh: Row) -> None:
            told = explained(self._adapter, fresh, outcome)
            self._adapter.finish(session, fresh, told, uploaded)

        self._patiently(_finish)
        log.info("finished", status=outcome.status, failure=outcome.failure and outcome.failure["code"])
        metrics.finished(self._row, outcome, time.monotonic() - self._begun_at)
        ended(outcome.status, outcome.failure)

    def _try_again(self, outcome: Outcome) -> bool:
        """Give the row back to be tried again if its failure may pass; return whether it was."""
        failure = outcome.failure
        if failure is None or failure["class"] not in PASSING:
            return False
        again = None

        def _decide(session: Session, fresh: Row) -> None:
            nonlocal again
            again = None
            if fresh.status != CANCELLING:
                again = another(self._adapter, fresh, failure, self._settings, present=now(session))
            if again is not None:
                self._give_back(session, fresh, again.status, again.message, **again.values)

        self._patiently(_decide)
        if again is not None:
            log.info("to_be_tried_again", failure=failure["code"])
            ended("retrying", failure)
        return again is not None

    def _hand_back(self) -> None:
        """Pause the row if that was asked for, else put it back into the queue: it has lost nothing."""

        def _rest(session: Session, fresh: Row) -> None:
            where = self._adapter.goes_on(fresh)
            if fresh.status == CANCELLING:
                self._adapter.finish(session, fresh, Outcome("cancelled"), {})
            elif fresh.status == PAUSING:
                note = Message(level="info", code="paused", message=f"the job is paused; resumed, it goes on {where}")
                self._give_back(session, fresh, PAUSED, note)
            else:
                text = f"its worker ended; another one will go on {where}"
                self._give_back(session, fresh, QUEUED, Message(level="info", code="interrupted", message=text))

        self._patiently(_rest)
        log.info("handed_back")
        metrics.handed_back(self._row)
        ended("handed_back")

    def _give_back(self, session: Session, fresh: Row, status: str, note: Message, **values: Any) -> None:
        """Let go of the row; where it is queued, the sweep sends its message."""
        self._adapter.record(session, fresh, [note])
        leases.give_back(session, fresh, status=status, **values, **self._adapter.at_rest(fresh))

    # ---- the database and the object store ----

    def _tick(self) -> None:
        """Record what is new, renew the lease if it is time, and learn what its owner asks for.

        A database that is away is asked again later; nothing is lost meanwhile. Raises `LeaseLost`.
        """
        if time.monotonic() < self._database_at:
            return
        try:
            self._exchange()
        except DATABASE_AWAY as error:
            self._count_database_error(error)
        else:
            self._database_errors = 0

    def _count_database_error(self, error: Exception) -> None:
        pause = pause_s(self._supervisor.backoff_s, self._database_errors, most_s=_MAX_BACKOFF_S)
        self._database_errors += 1
        self._database_at = time.monotonic() + pause
        metrics.DATABASE_ERRORS.inc()
        log.warning("database_away", error=first_line(error), retry_in_s=pause)

    def _exchange(self) -> None:
        kept = self._keeper.ready()
        warnings: list[Event] = [*self._keeper.warnings]
        events: list[Event] = self._directory.events.read()
        if not events and not warnings and kept is None and time.monotonic() < self._renew_at:
            self._look()
            self._directory.events.commit()  # what was read may be the inside of a line that is too long
            return
        replaced = self._record([*events, *warnings], kept)
        self._directory.events.commit()
        del self._keeper.warnings[: len(warnings)]
        metrics.heard(events)
        if kept is not None:
            self._keeper.recorded(replaced)
        for event in events:
            if isinstance(event, CheckpointOffer):
                self._keeper.offer(event)

    def _look(self) -> None:
        model = self._adapter.model
        columns = select(model.status, model.attempt, model.lease_owner).where(model.id == self._row.id)
        with self._database.read() as session:
            fresh = session.execute(columns).one_or_none()
        if fresh is None or (fresh.attempt, fresh.lease_owner) != (self._row.attempt, self._row.lease_owner):
            raise LeaseLost(f"{self._row.id}: attempt {self._row.attempt} no longer holds the lease")
        self._status = fresh.status

    def _record(self, events: Sequence[Event], kept: str | None) -> str | None:
        replaced = None
        with self._database.write() as session:
            fresh = leases.renew(session, self._row, lease_s=self._settings.lease_s)
            if events:
                self._adapter.record(session, fresh, events)
            if kept is not None:
                replaced = self._adapter.keep_checkpoint(session, fresh, kept)
        self._status = fresh.status
        self._renew_at = time.monotonic() + self._settings.lease_s / 3
        return replaced

    def _patiently(self, action: Callable[[Session, Row], None]) -> None:
        """Do `action` in one transaction that has verified the lease, as soon as the database is there."""
        while True:
            try:
                with self._database.write() as session:
                    action(session, leases.renew(session, self._row, lease_s=self._settings.lease_s))
                return
            except DATABASE_AWAY as error:
                self._count_database_error(error)
                self._pause_unless_stopping("its end could not be recorded")
                time.sleep(max(0.0, self._database_at - time.monotonic()))

    def _pause_unless_stopping(self, what: str) -> None:
        if self._supervisor.stop.is_set() and self._database_errors > _TRIES:
            raise Stopped(f"{what}: the database is away and the worker must end")
        time.sleep(min(self._supervisor.tick_s, 0.1))

    def _meanwhile(self, work: Callable[[], T]) -> T:
        """Do blocking work in the other thread while this one keeps the lease."""
        future = self._executor.submit(work)
        while not wait([future], timeout=self._supervisor.tick_s).done:
            self._tick()
        return future.result()

    def _patiently_with_store(self, work: Callable[[], T], *, hurry: Callable[[], bool]) -> T:
        """Do `work` as soon as the object store lets it; nothing else could be done without the store either.

        Raises its error once patience has ended: `hurry` says whether somebody waits for this attempt's end.
        """
        begun, stop = time.monotonic(), self._supervisor.stop

        def _repeat() -> T:
            for number in count():
                pause = pause_s(self._supervisor.backoff_s, number, most_s=_MAX_BACKOFF_S)
                try:
                    return work()
                except OSError as error:
                    patience_s = self._settings.storage_patience_s
                    patience_s = min(patience_s, _HURRY_S) if hurry() else patience_s
                    given_up = stop.is_set() or self._left.is_set()
                    if given_up or time.monotonic() + pause > begun + patience_s:
                        raise
                    log.warning("storage_retry", error=str(error))
                    metrics.STORAGE_RETRIES.inc()
                    stop.wait(pause)
            raise AssertionError("unreachable")

        return self._meanwhile(_repeat)
