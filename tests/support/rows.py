"""Rows as workers leave them."""

from typing import Any

from app.db import Database
from app.ids import new_id
from app.models import Checkpoint, Dataset, Job
from tests.support.catalog import TEACHER_DETECTOR

SPLITS = {"train": {"images": 10, "boxes": 30}, "val": {"images": 4, "boxes": 9}}


def add(database: Database, row: Any) -> Any:
    with database.write() as session:
        session.add(row)
    return row


def dataset(database: Database, tenant_id: str, **values: Any) -> Dataset:
    """A dataset that is ready, except for `values`."""
    defaults = {
        "id": new_id("ds"),
        "name": "cells",
        "status": "ready",
        "source": {"kind": "upload"},
        "max_dropped_fraction": 0.05,
        "classes": ["car", "person"],
        "splits": SPLITS,
        "attempt": 0,
    }
    return add(database, Dataset(tenant_id=tenant_id, **defaults | values))


def checkpoint(database: Database, tenant_id: str, **values: Any) -> Checkpoint:
    """A checkpoint that is ready, except for `values`."""
    defaults = {
        "id": new_id("ckpt"),
        "name": "teacher",
        "status": "ready",
        "detector": TEACHER_DETECTOR,
        "classes": ["person", "car", "dog"],
        "attempt": 0,
    }
    return add(database, Checkpoint(tenant_id=tenant_id, **defaults | values))


def job(database: Database, tenant_id: str, dataset_id: str, **values: Any) -> Job:
    """A queued job, except for `values`."""
    defaults = {
        "id": new_id("job"),
        "name": "cells-small",
        "status": "queued",
        "spec": {"teacher": None, "student": {}},
        "labels": {},
        "attempt": 0,
    }
    return add(database, Job(tenant_id=tenant_id, dataset_id=dataset_id, **defaults | values))
