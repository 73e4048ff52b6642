"""Every job spec among the examples is taken as it stands, but for the dataset."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.db import Database
from app.specs.catalog import load_catalog
from defeat.client.specs import load_spec
from tests.app.conftest import ONE_DATABASE, Tenant
from tests.support import rows as seed

EXAMPLES = Path(__file__).parents[3] / "examples"
SPECS = sorted(EXAMPLES.rglob("*.yaml"))


@pytest.fixture
def _with_all_families(app) -> Iterator[None]:
    small = app.dependency_overrides.pop(load_catalog)
    yield
    app.dependency_overrides[load_catalog] = small


@ONE_DATABASE
@pytest.mark.usefixtures("_with_all_families")
@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.relative_to(EXAMPLES).as_posix())
def test_it_is_taken(path: Path, api: TestClient, database: Database, alice: Tenant):
    splits = {name: {"images": 100, "boxes": 300} for name in ("train", "val", "test")}
    row = seed.dataset(database, alice.id, splits=splits)
    answer = api.post("/v1/jobs/validate", json=load_spec(path, [f"dataset={row.id}"]))
    assert answer.status_code == 200, answer.text
