"""The HTTP service: `uvicorn app.main:create_app --factory`."""

import threading
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.openapi.utils import get_openapi
from sqlalchemy.exc import DBAPIError

from app import logs, traces
from app.api import ROUTERS
from app.db import Database
from app.http import problems
from app.http.health import ReadinessCache
from app.http.idempotency import forget_old
from app.http.middleware import RequestMiddleware
from app.http.problems import ProblemDocument
from app.http.uploads import remove_abandoned
from app.metrics import SWEEPS_FAILED, api_registry, serve
from app.ops.sweep import sweep
from app.queue.messages import Queue
from app.retention import service as retention
from app.settings import Settings, get_settings
from app.specs.job import JobSpec
from app.storage import Storage

log = structlog.get_logger()

_STOP_S = 10.0
_PROBES = frozenset({"/healthz", "/readyz"})


def create_app(settings: Settings | None = None) -> FastAPI:
    """Return the application, which opens its database, broker and object store when it starts."""
    settings = settings or get_settings()
    logs.configure(settings.log_level)
    traces.configure("defeat-api")
    app = _Api(
        title="DeFeat: distillation as a service",
        version=version("defeat-service"),
        description="Trains small object detectors with the help of large ones.",
        lifespan=_lifespan,
        # FastAPI's pages run a third party's script on the origin that holds the dashboard's session cookie.
        docs_url=None,
        redoc_url=None,
        telemetry={"auto_configure": False, "exclude": _is_probe},
    )
    app.state.settings = settings
    app.add_middleware(RequestMiddleware)
    problems.install(app)
    for router in ROUTERS:
        app.include_router(router)
    return app


def _is_probe(scope: MutableMapping[str, Any]) -> bool:
    """Return whether this is a probe's request: it comes every few seconds, and its traces would only take space."""
    return scope.get("path") in _PROBES


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    app.state.database = database = Database(settings.database_url)
    app.state.storage = Storage(settings.storage_url)
    app.state.queue = queue = Queue(settings.redis_url)
    app.state.readiness = ReadinessCache()
    stop_serving = serve(api_registry(database, settings), settings)
    sweeper = _Sweeper(database, queue, app.state.storage, settings)
    sweeper.start()
    try:
        yield
    finally:
        await run_in_threadpool(stop_serving)
        await run_in_threadpool(sweeper.stop)
        queue.close()
        database.dispose()
        await run_in_threadpool(traces.flush)  # uvicorn ends by re-raising its signal: no exit handler would run


class _Sweeper(threading.Thread):
    """Periodically finds lost work, old idempotency keys and abandoned uploads, and runs retention."""

    def __init__(self, database: Database, queue: Queue, storage: Storage, settings: Settings) -> None:
        super().__init__(name="sweep", daemon=True)
        self._database, self._queue, self._storage, self._settings = database, queue, storage, settings
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(self._settings.sweep_s):
            try:
                self._sweep()
            except DBAPIError as error:
                log.warning("sweep_failed", error=logs.first_line(error))
                SWEEPS_FAILED.inc()
            except Exception:
                # The thread must survive any error, so that the next sweep runs.
                log.exception("sweep_failed")
                SWEEPS_FAILED.inc()

    def _sweep(self) -> None:
        sweep(self._database, self._queue, self._settings)
        with self._database.write() as session:
            forget_old(session)
        remove_abandoned(self._settings)
        retention.run_if_due(self._database, self._storage, self._settings)

    def stop(self) -> None:
        """End the thread; waits up to `_STOP_S` for a sweep that is running."""
        self._stopped.set()
        self.join(_STOP_S)


class _Api(FastAPI):
    """FastAPI whose OpenAPI document also describes the errors."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document, built once."""
        if self.openapi_schema is None:
            document = get_openapi(
                title=self.title, version=self.version, description=self.description, routes=self.routes
            )
            schemas: dict[str, Any] = document["components"]["schemas"]
            for model in (ProblemDocument, JobSpec):
                schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas |= schema.pop("$defs", {}) | {model.__name__: schema}
            # Validation errors are problem documents too; the service never sends FastAPI's own shape.
            for operation in (item for path in document["paths"].values() for item in path.values()):
                if "HTTPValidationError" in str(operation.get("responses", {}).get("422")):
                    del operation["responses"]["422"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            self.openapi_schema = document
        return self.openapi_schema
