import time

import pytest
from starlette.testclient import TestClient

from app.db import Database
from app.http import auth
from app.keys.service import revoke_key
from app.models import ApiKey
from app.settings import Settings
from tests.app.conftest import ONE_DATABASE, Tenant

SAME_ORIGIN = {"Sec-Fetch-Site": "same-origin"}


def _cookie(client: TestClient, settings: Settings, tenant: Tenant) -> None:
    client.cookies.set(auth.SESSION_COOKIE, auth.make_session(settings, tenant.key_id))


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer dk_",
        "Bearer dk_" + "A" * 43,
        "Basic ZGs6eA==",
        "dk_" + "A" * 43,
        "Bearer dk_\x00" + "A" * 42,
        "Bearer " + "é" * 46,
    ],
)
def test_no_good_key_no_entry(client: TestClient, alice: Tenant, header: str | None):
    headers = {} if header is None else {"Authorization": header.encode()}
    answer = client.get("/v1/jobs", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json()["code"] == "unauthorized"


def test_a_key_opens_its_own_tenant(client: TestClient, alice: Tenant):
    assert client.get("/v1/jobs", headers=alice.headers).status_code == 200


def test_only_a_keyed_hash_is_stored(database: Database, settings: Settings, alice: Tenant):
    with database.read() as session:
        row = session.get_one(ApiKey, alice.key_id)
    assert len(alice.key) == 46
    assert row.key_hash == auth.hash_key(settings, alice.key)
    assert alice.key not in repr(vars(row))


def test_a_revoked_key_ends_with_its_sessions(
    client: TestClient, database: Database, settings: Settings, alice: Tenant
):
    with database.write() as session:
        revoke_key(session, alice.key_id)
    assert client.get("/v1/jobs", headers=alice.headers).status_code == 401
    _cookie(client, settings, alice)
    assert client.get("/v1/jobs").status_code == 401


def test_unauthenticated_bodies_are_not_judged(client: TestClient):
    assert client.post("/v1/datasets", json={"nonsense": 1}).status_code == 401


def test_a_session_reads(client: TestClient, settings: Settings, alice: Tenant):
    _cookie(client, settings, alice)
    assert client.get("/v1/jobs").status_code == 200


def test_a_link_from_elsewhere_opens_a_page(client: TestClient, alice: Tenant):
    signed_in = client.post("/login", data={"key": alice.key}, headers=SAME_ORIGIN, follow_redirects=False)
    attributes = signed_in.headers["set-cookie"].lower().split("; ")
    assert {"httponly", "samesite=lax", "path=/"} <= set(attributes)
    assert client.get("/jobs", headers={"Sec-Fetch-Site": "cross-site"}, follow_redirects=False).status_code == 200
    ended = client.post("/logout", headers={"Sec-Fetch-Site": "cross-site"}, follow_redirects=False)
    assert (ended.status_code, "set-cookie" in ended.headers) == (403, False)


@ONE_DATABASE
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (SAME_ORIGIN, 201),
        ({"Origin": "http://testserver"}, 201),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://testserver"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://testserver.evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({}, 403),
    ],
)
def test_a_session_writes_from_our_own_pages_only(
    client: TestClient, settings: Settings, alice: Tenant, headers: dict[str, str], status: int
):
    _cookie(client, settings, alice)
    body = {"name": "a", "source": {"kind": "upload"}}
    answer = client.post("/v1/datasets", json=body, headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["code"] == "cross_site"


def test_a_key_needs_no_origin(client: TestClient, alice: Tenant):
    headers = alice.headers | {"Sec-Fetch-Site": "cross-site"}
    body = {"name": "a", "source": {"kind": "upload"}}
    assert client.post("/v1/datasets", json=body, headers=headers).status_code == 201


def test_a_bad_key_is_not_saved_by_a_good_session(client: TestClient, settings: Settings, alice: Tenant):
    _cookie(client, settings, alice)
    assert client.get("/v1/jobs", headers={"Authorization": "Bearer nonsense"}).status_code == 401


def test_sessions_expire_and_cannot_be_forged(settings: Settings, alice: Tenant, monkeypatch: pytest.MonkeyPatch):
    token = auth.make_session(settings, alice.key_id)
    assert auth.read_session(settings, token) == alice.key_id
    key_id, expires, signature = token.split(".")
    for forged in (
        "",
        ".",
        "..",
        "x",
        f"key_other.{expires}.{signature}",
        f"{key_id}.{int(expires) + 1}.{signature}",
        f"{key_id}.{expires}.",
        f"{key_id}.{expires}.{signature[:-1]}",
        f"{key_id}.{expires}.{signature}é",
    ):
        assert auth.read_session(settings, forged) is None, forged
    other = settings.model_copy(update={"secret": type(settings.secret)("another")})
    assert auth.read_session(other, token) is None
    late = time.time() + auth.SESSION_S + 1
    monkeypatch.setattr(auth.time, "time", lambda: late)
    assert auth.read_session(settings, token) is None


def test_the_server_makes_its_secret_once(tmp_path):
    first = Settings(home=tmp_path).secret_bytes()
    assert len(first) == 64
    assert Settings(home=tmp_path).secret_bytes() == first
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
