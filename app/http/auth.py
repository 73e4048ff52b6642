"""Who is calling: an API key in the Authorization header, or the dashboard's session cookie made from one."""

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
    """A page of another site tried to use the dashboard's session."""

    code, title = "cross_site", "Request from another site"


@dataclass(frozen=True)
class Caller:
    """Whose request this is: every query is limited to `tenant_id`."""

    tenant_id: str
    key_id: str
    max_priority: int


def new_key() -> str:
    """Return a fresh plaintext API key with 256 random bits."""
    return f"dk_{secrets.token_urlsafe(32)}"


def hash_key(settings: Settings, plaintext: str) -> str:
    """Return what is stored of a key: its HMAC-SHA256 under the server's secret, 64 hexadecimal digits."""
    return hmac.new(settings.secret_bytes(), plaintext.encode(), hashlib.sha256).hexdigest()


def find_caller(session: Session, settings: Settings, plaintext: str) -> Caller | None:
    """Return the caller whose key this is; None for an unknown, malformed or revoked one."""
    if not _KEY.fullmatch(plaintext):
        return None
    return _caller(session, ApiKey.key_hash == hash_key(settings, plaintext))


def _caller(session: Session, which: ColumnElement[bool]) -> Caller | None:
    row = session.scalars(select(ApiKey).where(which, ApiKey.revoked_at.is_(None))).one_or_none()
    return Caller(tenant_id=row.tenant_id, key_id=row.id, max_priority=row.max_priority) if row else None


def _sign(settings: Settings, payload: str) -> str:
    # The prefix keeps these signatures apart from key hashes, which are made with the same secret.
    digest = hmac.new(settings.secret_bytes(), f"session:{payload}".encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def make_session(settings: Settings, key_id: str) -> str:
    """Return a session token for the key, good for 12 hours or until the key is revoked."""
    payload = f"{key_id}.{int(time.time()) + SESSION_S}"
    return f"{payload}.{_sign(settings, payload)}"


def read_session(settings: Settings, token: str) -> str | None:
    """Return the key id of a session token that we signed and that has not expired, else None."""
    payload, _, signature = token.rpartition(".")
    key_id, _, expires = payload.rpartition(".")
    if not hmac.compare_digest(_sign(settings, payload).encode(), signature.encode()):
        return None
    return key_id if int(expires) > time.time() else None


def start_session(response: Response, request: Request, settings: Settings, key_id: str) -> None:
    """Set the session cookie: out of reach of scripts.

    Lax, so that a link to a job in a mail opens it. Another site's page can thereby read nothing, and change nothing:
    unsafe methods go through `check_same_origin`.
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
    """Raise `CrossSite` unless the browser says that one of our own pages made this request."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        same = site == "same-origin"
    else:
        same = request.headers.get("origin", "").partition("://")[2] == request.headers.get("host", "") != ""
    if not same:
        raise CrossSite("a session cookie works from the dashboard's own pages only; other programs use an API key")


def current_caller(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    database: DatabaseDep,
    settings: SettingsDep,
) -> Caller:
    """Return who calls. Raises `Unauthorized`, or `CrossSite` for an unsafe method with a cookie from elsewhere."""
    if "authorization" in request.headers:
        if credentials is None:
            raise Unauthorized("the Authorization header must be `Bearer dk_…`")
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
    """Return whose session token this is. Raises `Unauthorized` if it has expired or its key has been revoked."""
    key_id = read_session(settings, token)
    if key_id is not None:
        with database.read() as session:
            caller = _caller(session, ApiKey.id == key_id)
        if caller is not None:
            return caller
    raise Unauthorized("the session has expired; log in again")


CurrentCaller = Annotated[Caller, Depends(current_caller)]
