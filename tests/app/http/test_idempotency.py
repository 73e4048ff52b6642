from datetime import timedelta

import pytest
from sqlalchemy import select, update
from starlette.testclient import TestClient

from app.db import Database, utcnow
from app.http.idempotency import forget_old
from app.models import IdempotencyKey
from tests.app.conftest import RecordingQueue, Tenant
from tests.app.jobs.test_endpoints import SPEC
from tests.support import rows as seed
from tests.support.racing import race

KEY = {"Idempotency-Key": "0b1c2d3e-1"}


@pytest.fixture
def bodies(database: Database, alice: Tenant) -> dict[str, dict]:
    return {
        "jobs": SPEC | {"dataset": seed.dataset(database, alice.id, name="used").id},
        "datasets": {"name": "cells", "source": {"kind": "upload"}},
        "checkpoints": {"name": "teacher"},
    }


@pytest.mark.parametrize("route", ["jobs", "datasets", "checkpoints"])
def test_the_same_again_makes_nothing_new(api: TestClient, queue: RecordingQueue, bodies, route: str):
    before = len(api.get(f"/v1/{route}").json()["data"])
    first = api.post(f"/v1/{route}", json=bodies[route], headers=KEY)
    assert first.status_code == 201, first.text
    assert "idempotent-replayed" not in first.headers
    again = api.post(f"/v1/{route}", json=dict(reversed(bodies[route].items())), headers=KEY)
    assert (again.status_code, again.json()) == (201, first.json())
    assert again.headers["idempotent-replayed"] == "true"
    assert len(api.get(f"/v1/{route}").json()["data"]) == before + 1
    assert len(queue.sent) == (route == "jobs")
    fresh = api.post(f"/v1/{route}", json=bodies[route], headers={"Idempotency-Key": "another"})
    assert fresh.json()["id"] != first.json()["id"]


def test_a_key_belongs_to_one_body(api: TestClient, bodies):
    api.post("/v1/datasets", json=bodies["datasets"], headers=KEY)
    answer = api.post("/v1/datasets", json=bodies["datasets"] | {"name": "other"}, headers=KEY)
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_key_reused")


def test_a_key_belongs_to_one_tenant_and_route(api: TestClient, bodies, bob: Tenant):
    made = api.post("/v1/datasets", json=bodies["datasets"], headers=KEY).json()
    theirs = api.post("/v1/datasets", json=bodies["datasets"], headers=KEY | bob.headers)
    assert theirs.status_code == 201
    assert theirs.json()["id"] != made["id"]
    assert api.post("/v1/checkpoints", json=bodies["checkpoints"], headers=KEY).status_code == 201


def test_a_mistake_uses_no_key_up(api: TestClient, bodies):
    assert api.post("/v1/jobs", json=bodies["jobs"] | {"seed": -1}, headers=KEY).status_code == 422
    assert api.post("/v1/jobs", json=bodies["jobs"], headers=KEY).status_code == 201


def test_the_same_at_the_same_time_makes_one(api: TestClient, bodies):
    answers = []
    race(lambda _number: answers.append(api.post("/v1/datasets", json=bodies["datasets"], headers=KEY)), 4)
    assert [answer.status_code for answer in answers] == [201] * 4
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 3


@pytest.mark.parametrize("key", ["", "a b", "x" * 201, "é"])
def test_keys_have_a_form(api: TestClient, bodies, key: str):
    answer = api.post("/v1/datasets", json=bodies["datasets"], headers={"Idempotency-Key": key.encode()})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"].lower() == "header:idempotency-key"


def test_keys_are_forgotten_after_a_day(api: TestClient, database: Database, bodies):
    api.post("/v1/datasets", json=bodies["datasets"], headers=KEY)
    api.post("/v1/datasets", json=bodies["datasets"], headers={"Idempotency-Key": "old"})
    with database.write() as session:
        old = update(IdempotencyKey).where(IdempotencyKey.key == "old")
        session.execute(old.values(created_at=utcnow() - timedelta(hours=25)))
        forget_old(session)
    with database.read() as session:
        assert session.scalars(select(IdempotencyKey.key)).all() == [KEY["Idempotency-Key"]]
