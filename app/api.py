"""Every router, in one list."""

from typing import Any

from fastapi import APIRouter

from app.artifacts.endpoints import router as artifacts
from app.checkpoints.endpoints import router as checkpoints
from app.dashboard.endpoints import router as dashboard
from app.datasets.endpoints import router as datasets
from app.http.auth import CurrentCaller
from app.http.dependencies import CatalogDep
from app.http.health import router as health
from app.http.problems import problems
from app.jobs.endpoints import router as jobs
from app.usage.endpoints import router as usage
from app.workers.endpoints import router as workers

catalog = APIRouter(prefix="/v1/catalog", tags=["catalog"])


@catalog.get("", responses=problems())
def get_catalog(caller: CurrentCaller, contents: CatalogDep) -> dict[str, Any]:  # noqa: ARG001
    """Return the detectors, backbones, methods and schedules of job specs, with JSON Schemas; and dataset formats."""
    return contents.document


ROUTERS: tuple[APIRouter, ...] = (health, catalog, datasets, checkpoints, jobs, artifacts, usage, workers, dashboard)
