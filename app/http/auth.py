"""Authentication: an API key in the Authorization header, or the dashboard's session cookie, made from a key."""

import base64
import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from app.db import Database
from app.errors import Forbidden, Unauthorized
from app.http.dependencies import DatabaseDep, SettingsDep
from app.models import ApiKey
from app.settings import Settings

SESSION_COOKIE = "defeat_session"
SESSION_S = 12 * 60 * 60
_KEY = re.compile(r"dk_[A-Za-z0-9_-]{43}")
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

_bearer = HTTPBearer(auto_error=False, description="An API key: `dk_…`.")


class CrossSite(Forbidden):
    """A page of another site tried to use the dashboard's session cookie."""

    code, title = "cross_site", "Request from another site"


@dataclass(frozen=True)
class Caller:
    """The authenticated caller. Every query is limited to its `tenant_id`."""

    tenant_id: str
    key_id: str
    max_priority: int


def new_key() -> str:
    """Return a fresh plaintext API key with 256 random bits."""
    return f"dk_{secrets.token_urlsafe(32)}"


def hash_key(settings: Settings, plaintext: str) -> str:
    """Return the stored form of a key: its HMAC-SHA256 with the server's secret, 64 hexadecimal digits."""
    return hmac.new(settings.secret_bytes(), plaintext.encode(), hashlib.sha256).hexdigest()


def find_caller(session: Session, settings: Settings, plaintext: str) -> Caller | None:
    """Return the caller with this key; None if the key is unknown, malformed or revoked."""
    if not _KEY.fullmatch(plaintext):
        return None
    return _caller(session, ApiKey.key_hash == hash_key(settings, plaintext))


def _caller(session: Session, which: ColumnElement[bool]) -> Caller | None:
    row = session.scalars(select(ApiKey).where(which, ApiKey.revoked_at.is_(None))).one_or_none()
    return Caller(tenant_id=row.tenant_id, key_id=row.id, max_priority=row.max_priority) if row else None


def _sign(settings: Settings, payload: str) -> str:
    # The prefix separates these signatures from key hashes, which use the same secret.
    digest = hmac.new(settings.secret_bytes(), f"session:{payload}".encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def make_session(settings: Settings, key_id: str) -> str:
    """Return a session token for the key, valid for 12 hours or until the key is revoked."""
    payload = f"{key_id}.{int(time.time()) + SESSION_S}"
    return f"{payload}.{_sign(settings, payload)}"


def read_session(settings: Settings, token: str) -> str | None:
    """Return the key id of a session token; None if its signature is wrong or it has expired."""
    payload, _, signature = token.rpartition(".")
    key_id, _, expires = payload.rpartition(".")
    if not hmac.compare_digest(_sign(settings, payload).encode(), signature.encode()):
        return None
    return key_id if int(expires) > time.time() else None


def start_session(response: Response, request: Request, settings: Settings, key_id: str) -> None:
    """Set the session cookie; scripts cannot read it.

    `SameSite=Lax`, so that a link to a job in an e-mail opens it. Other sites can neither read a response nor change
    anything: unsafe methods go through `check_same_origin`.
    """
    response.set_cookie(
        SESSION_COOKIE,
        make_session(settings, key_id),
        max_age=SESSION_S,
        path="/",
        httponly=True,
        samesite="lax",
        secure=request.url.scheme == "https",
    )


def check_same_origin(request: Request) -> None:
    """Raise `CrossSite` unless the browser's headers show that a page of the dashboard made this request."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        same = site == "same-origin"
    else:
        same = request.headers.get("origin", "").partition("://")[2] == request.headers.get("host", "") != ""
    if not same:
        raise CrossSite("the session cookie is only accepted from the dashboard's own pages; use an API key elsewhere")


def current_caller(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    database: DatabaseDep,
    settings: SettingsDep,
) -> Caller:
    """Return the caller. Raises `Unauthorized`; `CrossSite` for an unsafe method with a cookie from another site."""
    if "authorization" in request.headers:
        if credentials is None:
            raise Unauthorized("the Authorization header must have the form `Bearer dk_…`")
        with database.read() as session:
            caller = find_caller(session, settings, credentials.credentials)
        if caller is None:
            raise Unauthorized("this API key is unknown or has been revoked")
        return caller
    token = request.cookies.get(SESSION_COOKIE)
    if token is None:
        raise Unauthorized("send an API key: `Authorization: Bearer dk_…`")
    caller = session_caller(database, settings, token)
    if request.method not in _SAFE_METHODS:
        check_same_origin(request)
    return caller


def session_caller(database: Database, settings: Settings, token: str) -> Caller:
    """Return the caller of a session token. Raises `Unauthorized` if it has expired or its key is revoked."""
    key_id = read_session(settings, token)
    if key_id is not None:
        with database.read() as session:
            caller = _caller(session, ApiKey.id == key_id)
        if caller is not None:
            return caller
    raise Unauthorized("the session has expired; log in again")


CurrentCaller = Annotated[Caller, Depends(current_caller)]
