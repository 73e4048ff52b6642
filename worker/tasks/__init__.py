"""The kinds of rows that workers work on, by the name of their task."""

from typing import Any, Final

from worker.tasks.base import Adapter
from worker.tasks.checkpoints import CheckpointAdapter
from worker.tasks.datasets import DatasetAdapter
from worker.tasks.jobs import JobAdapter

ADAPTERS: Final[dict[str, type[Adapter[Any]]]] = {
    adapter.model.TASK: adapter for adapter in (JobAdapter, DatasetAdapter, CheckpointAdapter)
}
