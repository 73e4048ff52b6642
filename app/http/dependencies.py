"""Dependencies of endpoints: the objects that `app.main` made when the process started, and the catalog."""

from typing import Annotated

from fastapi import Depends, Request

from app.db import Database
from app.queue.messages import Queue
from app.settings import Settings
from app.specs.catalog import Catalog, load_catalog
from app.storage import Storage


async def _settings(request: Request) -> Settings:
    return request.app.state.settings


async def _database(request: Request) -> Database:
    return request.app.state.database


async def _storage(request: Request) -> Storage:
    return request.app.state.storage


async def _queue(request: Request) -> Queue:
    return request.app.state.queue


SettingsDep = Annotated[Settings, Depends(_settings)]
DatabaseDep = Annotated[Database, Depends(_database)]
StorageDep = Annotated[Storage, Depends(_storage)]
QueueDep = Annotated[Queue, Depends(_queue)]
CatalogDep = Annotated[Catalog, Depends(load_catalog)]
