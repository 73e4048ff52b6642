"""Every query on a tenant's rows, made on behalf of a request, is limited to that tenant.

All operations of the API and all pages are called while every SQL statement is looked at. A statement on a table that
belongs to tenants must have a condition, among those joined by AND, on the tenant, or on the id of a row that the same
request found by its tenant or inserted before.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import ColumnElement, Delete, Engine, Insert, Select, Table, Update, event, select, update
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.elements import BinaryExpression, BindParameter, BooleanClauseList
from sqlalchemy.sql.selectable import Join
from sqlalchemy.sql.util import find_tables
from starlette.testclient import TestClient

from app.dashboard.endpoints import pages
from app.db import Database, update_count
from app.http.auth import SESSION_COOKIE, make_session
from app.models import Artifact, Base, Dataset, Job, JobEvaluation, JobEvent, JobMetric
from app.settings import Settings
from app.storage import Storage
from tests.app.conftest import Tenant
from tests.app.jobs.test_endpoints import SPEC
from tests.app.workers.test_workers import worker
from tests.support import rows as seed

EXCEPTIONS = {
    "app.http.auth._caller": "finds whose key it is: the tenant is its answer",
    "app.jobs.waiting.Waiting._merged": "a place in the queue counts every tenant's jobs; numbers alone are shown",
    "app.jobs.waiting.Waiting._rows": "the same",
    "app.jobs.waiting.Waiting._later": "the same",
    "app.queue.scheduling.in_work": "the same",
    "app.jobs.durations.Durations._learn": "durations are learnt from every tenant's jobs; seconds alone are shown",
    "app.workers.repository.held_rows": "whether a worker is busy is everybody's; what with, the caller's own alone",
}


def _owned() -> dict[str, str]:
    """Return the tables that belong to tenants, each with the column that leads to its owner."""
    owned = {"tenants": "id"}
    for table in Base.metadata.sorted_tables:
        parents = {key.column.table.name: key.parent.name for key in table.foreign_keys}
        if owner := next((parents[name] for name in ("tenants", "jobs") if name in parents), None):
            owned[table.name] = owner
    return owned


OWNED = _owned()


def test_the_tables_of_tenants_are_known():
    assert OWNED == {
        "tenants": "id",
        "api_keys": "tenant_id",
        "datasets": "tenant_id",
        "checkpoints": "tenant_id",
        "jobs": "tenant_id",
        "idempotency_keys": "tenant_id",
        "job_events": "job_id",
        "job_metrics": "job_id",
        "job_evaluations": "job_id",
        "artifacts": "job_id",
    }
    assert set(Base.metadata.tables) - set(OWNED) == {"workers", "sweep_passes"}


def _conjuncts(clause: ColumnElement[Any] | None) -> Iterator[ColumnElement[Any]]:
    if isinstance(clause, BooleanClauseList) and clause.operator is operators.and_:
        for part in clause.clauses:
            yield from _conjuncts(part)
    elif clause is not None:
        yield clause


def _conditions(statement: Any) -> Iterator[ColumnElement[Any]]:
    """Yield what must hold of every row of the statement, and of those of the statements in it."""
    for element in visitors.iterate(statement):
        if isinstance(element, (Select, Update, Delete)):
            yield from _conjuncts(element.whereclause)
        if isinstance(element, Select):
            for source in element.get_final_froms():
                if isinstance(source, Join) and not source.isouter:
                    yield from _conjuncts(source.onclause)


@dataclass
class Recorder:
    """Looks at each statement of one tenant's requests."""

    tenant_id: str
    known: set[Any] = field(default_factory=set)
    violations: list[str] = field(default_factory=list)
    excepted: set[str] = field(default_factory=set)

    def look(self, _connection: Any, statement: Any, multiparams: Any, params: Any, _options: Any) -> None:
        given = [*multiparams, params] if params else [*multiparams]
        if isinstance(statement, Insert):
            rows = given or [statement.compile().params]
            self.known.update(row["id"] for row in rows if "id" in row)
        elif isinstance(statement, (Select, Update, Delete)):
            self._judge(statement, given)

    def _judge(self, statement: Any, given: list[dict[str, Any]]) -> None:
        tables = find_tables(statement, check_columns=True, include_joins=True, include_selects=True, include_crud=True)
        owned = {table.name for table in tables if isinstance(table, Table)} & set(OWNED)
        limited: set[str] = set()
        found: set[Any] = set()
        links: list[tuple[str, str]] = []
        for condition in _conditions(statement):
            if not isinstance(condition, BinaryExpression):
                continue
            table = getattr(getattr(condition.left, "table", None), "name", None)
            column = getattr(condition.left, "key", None)
            if table is None or condition.operator not in (operators.eq, operators.in_op):
                continue
            if isinstance(condition.right, BindParameter):
                values = self._values(condition.right, given)
                if (column == OWNED.get(table) and values == {self.tenant_id}) or (values and values <= self.known):
                    limited.add(table)
                if column == "id":
                    found |= values
            elif (other := getattr(getattr(condition.right, "table", None), "name", None)) is not None:
                links += [(table, other), (other, table)]
        for _ in links:
            limited |= {other for table, other in links if table in limited}
        if owned <= limited:
            self.known |= found
            return
        origin = _origin()
        if origin in EXCEPTIONS:
            self.excepted.add(origin)
        else:
            self.violations.append(f"{origin}: {', '.join(sorted(owned - limited))}: {statement}")

    @staticmethod
    def _values(bound: BindParameter[Any], given: list[dict[str, Any]]) -> set[Any]:
        passed = [row[bound.key] for row in given if bound.key in row] or [bound.effective_value]
        return {one for value in passed for one in (value if isinstance(value, (list, tuple)) else [value])}


def _origin() -> str:
    """Return the function of the service that made the statement."""
    frame = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("app.") and module != "app.db":
            return f"{module}.{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "none"


@dataclass
class Calls:
    """Calls operations as one tenant and has each one's statements looked at."""

    client: TestClient
    tenant: Tenant
    done: set[tuple[str, str]] = field(default_factory=set)
    violations: list[str] = field(default_factory=list)
    excepted: set[str] = field(default_factory=set)

    def __call__(self, method: str, path: str, status: int = 200, *, headers: Any = None, **given: Any) -> Any:
        names = {name: given.pop(name) for name in list(given) if "{" + name in path}
        with self.recording():
            headers = self.tenant.headers | (headers or {})
            answer = self.client.request(method, path.format(**names), headers=headers, follow_redirects=False, **given)
        assert answer.status_code == status, answer.text
        self.done.add((method, path))
        return answer

    @contextmanager
    def recording(self) -> Iterator[None]:
        recorder = Recorder(self.tenant.id)
        event.listen(Engine, "before_execute", recorder.look)
        try:
            yield
        finally:
            event.remove(Engine, "before_execute", recorder.look)
        self.violations += recorder.violations
        self.excepted |= recorder.excepted


@pytest.fixture
def calls(client: TestClient, alice: Tenant, bob: Tenant, database: Database) -> Calls:
    other = seed.dataset(database, bob.id)
    # A job of somebody else's is ahead, and is waited for by what jobs like it took: the queue looks at everybody's.
    seed.job(database, bob.id, other.id, recipe="r", workload=1.0, priority=1)
    seed.add(database, worker())
    return Calls(client, alice)


def _file(storage: Storage, settings: Settings, key: str) -> dict[str, Any]:
    path = Path(settings.home.parent) / "a file"
    path.write_bytes(b"content")
    stored = storage.put_file(key, path)
    return {"storage_key": stored.key, "size_bytes": stored.size_bytes, "sha256": stored.sha256}


def test_every_operation_and_page_keeps_to_its_tenant(
    calls: Calls, app: FastAPI, database: Database, settings: Settings, storage: Storage, alice: Tenant
):
    key = {"Idempotency-Key": "one"}
    for path in ("/healthz", "/readyz", "/v1/catalog", "/v1/usage", "/v1/workers"):
        calls("GET", path)

    for _ in range(2):
        body = {"name": "cells", "source": {"kind": "upload"}}
        made = calls("POST", "/v1/datasets", 201, json=body, headers=key).json()["id"]
        checkpoint = calls("POST", "/v1/checkpoints", 201, json={"name": "teacher"}, headers=key).json()["id"]
    calls("PUT", "/v1/datasets/{dataset_id}/content", 202, dataset_id=made, content=b"x")
    calls("PUT", "/v1/checkpoints/{checkpoint_id}/content", 202, checkpoint_id=checkpoint, content=b"x")
    uri = (settings.dataset_roots[0] / "cells").as_uri()
    (settings.dataset_roots[0] / "cells").mkdir()
    calls("POST", "/v1/datasets", 201, json={"name": "cells", "source": {"kind": "reference", "uri": uri}})
    for _ in range(2):
        page = calls("GET", "/v1/datasets", params={"limit": 1}).json()
    calls("GET", "/v1/datasets", params={"limit": 1, "after": page["next_cursor"]})
    report = {"format": "coco", "images": 0, "boxes": 0, "classes": [], "splits": {}, "problems": []}
    report |= {"dropped_fraction": 0.0, "max_dropped_fraction": 0.1}
    ready = seed.dataset(database, alice.id, report=report).id
    calls("GET", "/v1/datasets/{dataset_id}", dataset_id=ready)
    calls("GET", "/v1/datasets/{dataset_id}/report", dataset_id=ready)
    calls("DELETE", "/v1/datasets/{dataset_id}", 204, dataset_id=made)

    weights = seed.checkpoint(database, alice.id, **_file(storage, settings, "checkpoints/a")).id
    calls("GET", "/v1/checkpoints")
    calls("GET", "/v1/checkpoints/{checkpoint_id}", checkpoint_id=weights)
    calls("GET", "/v1/checkpoints/{checkpoint_id}/content", checkpoint_id=weights)

    spec = SPEC | {"dataset": ready}
    calls("POST", "/v1/jobs/validate", json=spec)
    taught = spec | {"teacher": {"source": "checkpoint", "id": weights}, "distillation": {"method": "defeat"}}
    calls("POST", "/v1/jobs/validate", json=taught)
    for _ in range(2):
        job = calls("POST", "/v1/jobs", 201, json=taught, headers=key).json()["id"]
    calls("GET", "/v1/jobs", params={"name": "cells", "status": "queued", "dataset": ready})
    calls("GET", "/v1/jobs/{job_id}", job_id=job)
    calls("PATCH", "/v1/jobs/{job_id}", job_id=job, json={"priority": -1})
    for move in ("pause", "resume", "cancel"):
        calls("POST", f"/v1/jobs/{{job_id}}/{move}", 202, job_id=job)
    for _ in range(2):
        calls("POST", "/v1/jobs/{job_id}/retry", 202, job_id=job, json={"from": "beginning"}, headers=key)
    calls("POST", "/v1/jobs/{job_id}/cancel", 202, job_id=job)
    running = seed.job(database, alice.id, ready, status="running", attempt=1).id
    calls("POST", "/v1/jobs/{job_id}/pause", 202, job_id=running)
    with database.write() as session:
        session.add(JobMetric(job_id=job, subject="student", step=1, epoch=1.0, values={}))
        session.add(JobEvaluation(job_id=job, subject="student", epoch=1, metrics={}))
        session.add(
            Artifact(
                id="art_1", job_id=job, name="a.bin", kind="log", content_type="text/plain", details={},
                **_file(storage, settings, "jobs/a"),
            )
        )  # fmt: skip
    for part in ("events", "metrics", "evaluations", "artifacts"):
        calls("GET", f"/v1/jobs/{{job_id}}/{part}", job_id=job)
    calls("GET", "/v1/jobs/{job_id}/artifacts/{name}", job_id=job, name="a.bin")
    calls("DELETE", "/v1/checkpoints/{checkpoint_id}", 204, checkpoint_id=weights)

    same = {"Sec-Fetch-Site": "same-origin"}
    calls("GET", "/", 303)
    calls("GET", "/login")
    calls("POST", "/login", 303, data={"key": alice.key}, headers=same)
    calls("POST", "/logout", 303, headers=same)
    for path in ("/jobs", "/datasets", "/workers"):
        calls("GET", path)
    calls("GET", "/jobs/{job_id}", job_id=job)
    calls("GET", "/datasets/{dataset_id}", dataset_id=ready)
    cookie = {SESSION_COOKIE: make_session(settings, alice.key_id)}
    with calls.recording():
        assert TestClient(app, cookies=cookie).get("/v1/usage").status_code == 200

    assert not calls.violations, "\n".join(calls.violations)
    assert calls.excepted == set(EXCEPTIONS)
    operations = {(method.upper(), path) for path, item in app.openapi()["paths"].items() for method in item}
    shown = {(method, route.path) for route in pages.routes for method in route.methods - {"HEAD"}}
    assert calls.done == operations | shown


def _any_job(session: Any, tenant_id: str, job_id: str) -> Job | None:
    return session.scalars(select(Job).where(Job.id == job_id)).one_or_none()


def _or_job(session: Any, tenant_id: str, job_id: str) -> Job | None:
    return session.scalars(select(Job).where((Job.tenant_id == tenant_id) | (Job.id == job_id))).first()


def _all_events(session: Any, job_id: str, **_which: Any) -> list[JobEvent]:
    return list(session.scalars(select(JobEvent)))


def _every_dataset(session: Any, tenant_id: str, dataset_id: str) -> Dataset | None:
    update_count(session, update(Dataset).values(name="mine"))
    return session.get(Dataset, dataset_id)


@pytest.mark.parametrize(
    ("replaced", "by", "path", "table"),
    [
        ("app.jobs.repository.find", _any_job, "/v1/jobs/{job_id}", "jobs"),
        ("app.jobs.repository.find", _or_job, "/v1/jobs/{job_id}", "jobs"),
        ("app.jobs.repository.events", _all_events, "/v1/jobs/{job_id}/events", "job_events"),
        ("app.datasets.repository.find_to_delete", _every_dataset, "/v1/datasets/{dataset_id}", "datasets"),
    ],
)
def test_a_query_without_its_tenant_is_found(
    calls: Calls, database: Database, monkeypatch: pytest.MonkeyPatch, replaced, by, path: str, table: str
):
    dataset = seed.dataset(database, calls.tenant.id)
    job = seed.job(database, calls.tenant.id, dataset.id)
    monkeypatch.setattr(replaced, by)
    method, status = ("DELETE", 409) if "delete" in replaced else ("GET", 200)
    if method == "DELETE":
        calls(method, path, status, dataset_id=dataset.id)
    else:
        calls(method, path, status, job_id=job.id)
    assert f": {table}: " in calls.violations[0]
