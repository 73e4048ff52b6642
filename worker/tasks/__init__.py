"""The handlers of all kinds of rows that workers work on, by the name of their Celery task."""

from typing import Any, Final

from worker.tasks.base import Handler
from worker.tasks.checkpoints import CheckpointHandler
from worker.tasks.datasets import DatasetHandler
from worker.tasks.jobs import JobHandler

HANDLERS: Final[dict[str, type[Handler[Any]]]] = {
    handler.model.TASK: handler for handler in (JobHandler, DatasetHandler, CheckpointHandler)
}
