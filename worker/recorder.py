"""Records in a leased row what its run writes, and renews the lease meanwhile."""

import time
from collections.abc import Callable, Sequence
from typing import Generic

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.queue import leases
from app.queue.leases import LeaseLost, Row
from defeat.engine.events import CheckpointOffer
from worker import metrics
from worker.checkpoint_uploader import CheckpointUploader
from worker.patience import DATABASE_ERRORS, DatabaseBackoff, hurry
from worker.rundir import EventTail, RecordedEvent
from worker.tasks.base import Handler


class Recorder(Generic[Row]):
    """The connection between one attempt and its row in the database.

    Args:
        row: as it was claimed.
        handler: writes the events.
        events: of the run.
        uploader: of the run's training checkpoints.
        backoff: pauses after errors of the database.
        tick_s: the longest pause between two looks at events and row, seconds.

    Attributes:
        status: the row's status when it was last read; its owner may have requested a pause or a cancellation.
    """

    def __init__(
        self,
        row: Row,
        handler: Handler[Row],
        events: EventTail,
        uploader: CheckpointUploader,
        backoff: DatabaseBackoff,
        *,
        tick_s: float,
    ) -> None:
        self.status = row.status
        self._row: Row = row
        self._handler: Handler[Row] = handler
        self._events = events
        self._uploader = uploader
        self._backoff = backoff
        self._tick_s = tick_s
        self._database = handler.database
        self._lease_s = handler.settings.lease_s
        self._renew_at = time.monotonic() + self._lease_s / 3

    def tick(self) -> None:
        """Record new events, renew the lease if it is time, and read the row's status.

        Does nothing while the database does not answer: a later call records the same events. Raises `LeaseLost`.
        """
        if self._backoff.pausing:
            return
        try:
            self._exchange()
        except DATABASE_ERRORS as error:
            self._backoff.failed(error)
        else:
            self._backoff.succeeded()

    def drain(self, *, keep_checkpoint: bool) -> None:
        """Record the events that are left, and the newest training checkpoint if another attempt may need it.

        Leaves the checkpoint out if it cannot be stored in a short time. Raises `LeaseLost` or `Stopped`.
        """
        patience = hurry()
        while not self._events.exhausted or not self._uploader.idle:
            if not keep_checkpoint or patience.passed:
                self._uploader.drop_waiting()
            self.tick()
            self._backoff.wait("the run's last events could not be recorded", at_most_s=self._tick_s)

    def write(self, action: Callable[[Session, Row], None]) -> None:
        """Call `action` in a transaction that has verified the lease; repeat it while the database does not answer.

        Raises `LeaseLost` or `Stopped`.
        """
        while True:
            try:
                with self._database.write() as session:
                    action(session, leases.renew(session, self._row, lease_s=self._lease_s))
                return
            except DATABASE_ERRORS as error:
                self._backoff.failed(error)
                self._backoff.wait_out("the attempt's end could not be recorded", at_most_s=self._tick_s)

    def _exchange(self) -> None:
        uploaded = self._uploader.finished()
        warnings: list[RecordedEvent] = [*self._uploader.warnings]
        events: list[RecordedEvent] = self._events.read()
        if not events and not warnings and uploaded is None and time.monotonic() < self._renew_at:
            self._read_status()
            self._events.commit()  # what was read may be a part of a line that is too long
            return
        replaced = self._record([*events, *warnings], uploaded)
        self._events.commit()
        del self._uploader.warnings[: len(warnings)]
        metrics.observe(events)
        if uploaded is not None:
            self._uploader.recorded(replaced)
        for event in events:
            if isinstance(event, CheckpointOffer):
                self._uploader.offer(event)

    def _read_status(self) -> None:
        """Read the row without writing, which costs the database less than a renewal."""
        model = self._handler.model
        columns = select(model.status, model.attempt, model.lease_owner).where(model.id == self._row.id)
        with self._database.read() as session:
            fresh = session.execute(columns).one_or_none()
        if fresh is None or (fresh.attempt, fresh.lease_owner) != (self._row.attempt, self._row.lease_owner):
            raise LeaseLost(f"{self._row.id}: attempt {self._row.attempt} no longer holds the lease")
        self.status = fresh.status

    def _record(self, events: Sequence[RecordedEvent], checkpoint_key: str | None) -> str | None:
        replaced = None
        with self._database.write() as session:
            fresh = leases.renew(session, self._row, lease_s=self._lease_s)
            if events:
                self._handler.record(session, fresh, events)
            if checkpoint_key is not None:
                replaced = self._handler.keep_checkpoint(session, fresh, checkpoint_key)
        self.status = fresh.status
        self._renew_at = time.monotonic() + self._lease_s / 3
        return replaced
