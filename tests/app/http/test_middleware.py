import json
from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from app.db import Database
from app.http.middleware import MAX_BODY_BYTES
from app.models import Dataset
from tests.app.conftest import ONE_DATABASE, Tenant

GOOD = {"name": "a", "source": {"kind": "upload"}}


def _problem(answer, status: int, code: str) -> dict:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert document["code"] == code
    assert document["status"] == status
    assert document["type"] == f"urn:defeat:problem:{code}"
    assert document["request_id"] == answer.headers["x-request-id"]
    return document


def test_unknown_paths_and_methods_are_problems(api: TestClient):
    assert _problem(api.get("/v1/nothing"), 404, "not_found")["instance"] == "/v1/nothing"
    _problem(api.get("/v1/jobs/job_1/nothing/here"), 404, "not_found")
    _problem(api.put("/v1/jobs"), 405, "method_not_allowed")


@ONE_DATABASE
@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1.2_3", True), ("", False), ("a b", False), ("a" * 65, False), ("a\r\nb", False)]
)
def test_request_ids_come_in_and_go_out(client: TestClient, given: str, kept: bool):
    headers = {"X-Request-Id": given.replace("\r\n", "%0d%0a")}
    answer = client.get("/healthz", headers=headers).headers["x-request-id"]
    assert (answer == given) is kept
    assert kept or answer.startswith("req_")


def test_every_answer_carries_security_headers(api: TestClient):
    for path in ("/healthz", "/v1/jobs", "/v1/nothing"):
        headers = api.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
    assert api.get("/v1/jobs").headers["cache-control"] == "no-store"


def test_a_json_body_has_a_limit_however_it_comes(api: TestClient):
    body = json.dumps(GOOD | {"name": "x" * MAX_BODY_BYTES}).encode()
    _problem(
        api.post("/v1/datasets", content=body, headers={"Content-Type": "application/json"}), 413, "payload_too_large"
    )

    def _chunks() -> Iterator[bytes]:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    _problem(
        api.post("/v1/datasets", content=_chunks(), headers={"Content-Type": "application/json"}),
        413,
        "payload_too_large",
    )


@ONE_DATABASE
@pytest.mark.parametrize(
    ("body", "errors"),
    [
        ({}, [("/name", "missing_key"), ("/source", "missing_key")]),
        ([], [("", "wrong_type")]),
        (GOOD | {"colour": 1}, [("/colour", "unknown_key")]),
        (GOOD | {"a/b~c": 1}, [("/a~1b~0c", "unknown_key")]),
        (GOOD | {"name": 5}, [("/name", "wrong_type")]),
        (GOOD | {"name": ""}, [("/name", "out_of_range")]),
        (GOOD | {"name": "  "}, [("/name", "wrong_format")]),
        (GOOD | {"name": "a\nb"}, [("/name", "wrong_format")]),
        (GOOD | {"name": "a\0b"}, [("/name", "unfit_value")]),
        (GOOD | {"name": "a" * 201}, [("/name", "out_of_range")]),
        (GOOD | {"max_dropped_fraction": 1.5}, [("/max_dropped_fraction", "out_of_range")]),
        (GOOD | {"max_dropped_fraction": "much"}, [("/max_dropped_fraction", "wrong_type")]),
        (GOOD | {"source": {"kind": "ftp"}}, [("/source", "unknown_choice")]),
        (GOOD | {"source": {}}, [("/source", "missing_key")]),
        (GOOD | {"source": {"kind": "reference"}}, [("/source/uri", "missing_key")]),
        (GOOD | {"source": {"kind": "upload", "uri": "x"}}, [("/source/uri", "unknown_key")]),
    ],
)
def test_each_mistake_has_its_place_and_code(api: TestClient, body, errors):
    document = _problem(api.post("/v1/datasets", json=body), 422, "validation_failed")
    assert sorted((item["pointer"], item["code"]) for item in document["errors"]) == errors
    assert all(item["detail"] for item in document["errors"])


def test_an_unknown_key_tells_the_known_ones(api: TestClient):
    document = api.post("/v1/datasets", json=GOOD | {"colour": 1}).json()
    assert document["errors"][0]["detail"] == "unknown key; known keys: max_dropped_fraction, name, source"
    assert document["detail"].startswith("/colour: unknown key")


@pytest.mark.parametrize(
    ("body", "content_type", "code"),
    [
        (b"{", "application/json", "bad_json"),
        (b"", "application/json", "missing_key"),
        (b"{}", "text/plain", "wrong_type"),
        (b'{"name": "\\ud800", "source": {"kind": "upload"}}', "application/json", "unfit_value"),
        (
            b'{"name": "a", "source": {"kind": "upload"}, "max_dropped_fraction": NaN}',
            "application/json",
            "unfit_value",
        ),
        (b'{"\\ud800": 1}', "application/json", "unfit_value"),
    ],
)
def test_unreadable_bodies(api: TestClient, body: bytes, content_type: str, code: str):
    answer = api.post("/v1/datasets", content=body, headers={"Content-Type": content_type})
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"][0]["code"] == code


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"name": ' + b"9" * 5000 + b"}", b"\xff\xfe"])
def test_bodies_that_break_parsers_are_bad_requests(api: TestClient, body: bytes):
    answer = api.post("/v1/datasets", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422), answer.text
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("row_id", ["ds_%00", "ds_'; --", "nonsense", "ds_" + "a" * 100, "DS_1", "%F0%9F%A6%8A"])
def test_ids_that_cannot_be_are_not_there(api: TestClient, row_id: str):
    for path in (
        "/v1/datasets/{}",
        "/v1/datasets/{}/report",
        "/v1/checkpoints/{}",
        "/v1/jobs/{}",
        "/v1/jobs/{}/events",
    ):
        _problem(api.get(path.format(row_id)), 404, "not_found")
    _problem(api.put(f"/v1/datasets/{row_id}/content", content=b"x"), 404, "not_found")
    _problem(api.delete(f"/v1/datasets/{row_id}"), 404, "not_found")


def test_query_mistakes_name_the_parameter(api: TestClient):
    document = _problem(api.get("/v1/jobs?limit=0&status=lost"), 422, "validation_failed")
    found = {item["pointer"]: item for item in document["errors"]}
    assert found["query:limit"]["code"] == "out_of_range"
    assert found["query:status"]["code"] == "unknown_choice"
    assert "'queued'" in found["query:status"]["detail"]
    _problem(api.get("/v1/jobs?name=%00"), 422, "validation_failed")
    _problem(api.get("/v1/jobs?dataset=%00"), 422, "validation_failed")


def test_an_unexpected_error_tells_nothing_and_is_logged(
    api: TestClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def _broken(*_args: object) -> None:
        raise RuntimeError("the password is tr0ub4dor")

    monkeypatch.setattr("app.jobs.repository.find", _broken)
    document = _problem(api.get("/v1/jobs/job_1"), 500, "internal_error")
    assert "tr0ub4dor" not in json.dumps(document)
    logged = capsys.readouterr().err
    assert "the password is tr0ub4dor" in logged
    assert document["request_id"] in logged


def test_a_database_that_is_away_is_503(
    api: TestClient, database: Database, alice: Tenant, monkeypatch: pytest.MonkeyPatch
):
    def _away(*_args: object) -> None:
        raise OperationalError("SELECT 1", {}, Exception("connection refused by db.internal"))

    monkeypatch.setattr("app.jobs.repository.find", _away)
    answer = api.get("/v1/jobs/job_1")
    document = _problem(answer, 503, "unavailable")
    assert "db.internal" not in json.dumps(document)
    assert answer.headers["retry-after"] == "5"


def test_a_full_database_is_507(api: TestClient, monkeypatch: pytest.MonkeyPatch):
    def _full(*_args: object) -> None:
        raise OperationalError("INSERT", {}, Exception("database or disk is full"))

    monkeypatch.setattr("app.datasets.service.create", _full)
    _problem(api.post("/v1/datasets", json=GOOD), 507, "storage_full")


def test_health_and_readiness(app: FastAPI, client: TestClient, monkeypatch: pytest.MonkeyPatch):
    assert client.get("/healthz").json() == {"status": "ok"}
    answer = client.get("/readyz")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ready", "checks": dict.fromkeys(("database", "broker", "storage"), "ok")}

    def _away() -> None:
        raise ConnectionRefusedError("valkey.internal")

    monkeypatch.setattr(app.state.queue, "ping", _away)
    monkeypatch.setattr("app.http.health.KEPT_S", -1)
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["checks"] == {"database": "ok", "broker": "does not answer", "storage": "ok"}


def test_the_catalog_is_served(api: TestClient):
    document = api.get("/v1/catalog").json()
    assert set(document["methods"]) == {"defeat", "baseline", "hints"}


def test_the_document_describes_every_problem(client: TestClient):
    document = client.get("/openapi.json").json()
    assert "HTTPValidationError" not in json.dumps(document)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if path.startswith("/v1/"):
                for status in ("401", "503"):
                    assert "application/problem+json" in operation["responses"][status]["content"], (method, path)
    upload = document["paths"]["/v1/datasets/{dataset_id}/content"]["put"]
    assert set(upload["responses"]) == {"202", "400", "401", "403", "404", "409", "413", "422", "503", "507"}
    spec = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert spec["$ref"] == "#/components/schemas/JobSpec"
    assert {"name", "dataset", "student", "distillation"} <= set(
        document["components"]["schemas"]["JobSpec"]["properties"]
    )


def test_references_in_the_document_lead_somewhere(client: TestClient):
    document = client.get("/openapi.json").json()
    schemas = set(document["components"]["schemas"])
    text = json.dumps(document)
    named = {part.split('"', 1)[0] for part in text.split('"#/components/schemas/')[1:]}
    assert named <= schemas


def test_a_row_keeps_the_id_of_the_request_that_made_it(api: TestClient, database: Database) -> None:
    body = {"name": "cells", "source": {"kind": "upload"}}
    answer = api.post("/v1/datasets", json=body, headers={"X-Request-Id": "my-request-1"})
    with database.read() as session:
        assert session.get(Dataset, answer.json()["id"]).request_id == "my-request-1"
