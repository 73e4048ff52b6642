"""Every kind of row has a handler."""

from app.models import Checkpoint, Dataset, Job
from worker.tasks import HANDLERS


def test_every_task_has_its_handler() -> None:
    assert set(HANDLERS) == {Job.TASK, Dataset.TASK, Checkpoint.TASK}
