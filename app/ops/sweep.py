"""The sweep: sends the messages of rows again whose message or worker was lost, and removes silent workers."""

import structlog

from app.db import Database
from app.metrics import ROWS_RESENT, SWEEPS_FAILED
from app.queue.leases import find_lost
from app.queue.messages import BROKER_ERRORS, Queue
from app.settings import Settings
from app.workers import registry

log = structlog.get_logger()


def sweep(database: Database, queue: Queue, settings: Settings) -> int:
    """Send the message of every lost row again and return their number. It may run anywhere at any time.

    Does nothing while the broker does not answer: the next sweep finds the same rows.
    """
    try:
        untaken = queue.untaken()
    except BROKER_ERRORS as error:
        log.warning("sweep_without_broker", error=str(error))
        SWEEPS_FAILED.inc()
        return 0
    with database.write() as session:
        registry.forget_silent(session, settings)
        lost = find_lost(session, redeliver_s=settings.redeliver_s, max_attempts=settings.max_attempts, untaken=untaken)
    for model, row_id in lost:
        log.info("lost_row_found", row=row_id)
        queue.send(model, row_id)
        ROWS_RESENT.labels(model.QUEUE).inc()
    return len(lost)
