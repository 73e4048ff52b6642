"""A world with the object store of the command line, on SQLite or on every database."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.worker_world import World


@pytest.fixture
def world(tmp_path: Path, storage_url: str) -> World:
    return World(tmp_path / "home", storage_url=storage_url)


@pytest.fixture
def each_world(tmp_path: Path, database_url: str, storage_url: str) -> Iterator[World]:
    """A world on SQLite, and one on PostgreSQL."""
    world = World(tmp_path / "home", database_url=database_url, storage_url=storage_url)
    yield world
    world.database.dispose()
