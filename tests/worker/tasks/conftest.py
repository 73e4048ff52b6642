"""A world without retries, and the requests of its rows."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.worker_world import World
from worker.tasks import HANDLERS
from worker.tasks.base import Request


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "home")


def prepare(world: World, row: Any, directory: Path) -> Request:
    directory.mkdir(exist_ok=True)
    with ExitStack() as resources:
        return HANDLERS[type(row).TASK](world.context).prepare(row, directory, resources)


@pytest.fixture
def scripted(world: World, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a dataset's or checkpoint's run follow a script."""

    def _scripted(row: Any, *script: Any) -> Any:
        handler = HANDLERS[type(row).TASK]
        prepare = handler.prepare

        def _prepare(self: Any, *args: Any) -> Request:
            request = prepare(self, *args)
            return Request(request.kind, {**request.spec, "script": script}, request.inputs)

        monkeypatch.setattr(handler, "prepare", _prepare)
        world.work(row)
        return world.now(row)

    return _scripted
