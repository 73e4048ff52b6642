"""The outermost middleware: request ids, security headers, the limit of bodies, the request log, unexpected errors."""

import re
import time

import structlog
from opentelemetry import trace
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import PayloadTooLarge
from app.http.problems import render
from app.ids import new_id
from app.metrics import HTTP_REQUESTS

log = structlog.get_logger()

MAX_BODY_BYTES = 1024 * 1024
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# The upload endpoints have a limit of their own, which is a setting.
_UPLOAD = re.compile(r"/v1/(datasets|checkpoints)/[^/]+/content")
_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"})
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
}


class RequestMiddleware:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_id("req")
        scope.setdefault("state", {})["request_id"] = request_id
        trace.get_current_span().set_attribute("defeat.request_id", request_id)
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            await _Exchange(self.app, scope, receive, send, request_id).run()


class _Exchange:
    """One request and its response."""

    def __init__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        self.app, self.scope, self._receive, self._send = app, scope, receive, send
        self.request_id = request_id
        self.status: int | None = None
        self.received = 0
        self.limited = not (scope["method"] == "PUT" and _UPLOAD.fullmatch(scope["path"]))

    async def run(self) -> None:
        start = time.perf_counter()
        try:
            if self._announced() > MAX_BODY_BYTES and self.limited:
                raise PayloadTooLarge(
                    f"the body has {self._announced()} bytes; the limit of this path is {MAX_BODY_BYTES}"
                )
            await self.app(self.scope, self.receive, self.send)
        except ClientDisconnect:
            log.info("client_disconnected")
        except Exception as error:
            if self.status is not None:
                # The response has begun: only a broken connection can still tell the client that it is incomplete.
                log.exception("response_broken_off")
                raise
            await render(Request(self.scope), error)(self.scope, self.receive, self.send)
        finally:
            self._report(time.perf_counter() - start)

    def _report(self, took_s: float) -> None:
        method, path = self.scope["method"], self.scope["path"]
        log.info("request", method=method, path=path, status=self.status, duration_ms=round(took_s * 1000, 1))
        # Labels take values that the service defines: the caller's paths and methods would be unbounded.
        route = getattr(self.scope.get("route"), "path", "none")
        known = method if method in _METHODS else "other"
        HTTP_REQUESTS.labels(known, route, str(self.status or "none")).observe(took_s)

    def _announced(self) -> int:
        value = Headers(scope=self.scope).get("content-length", "")
        return int(value) if value.isdecimal() and len(value) < 20 else 0

    async def receive(self) -> Message:
        message = await self._receive()
        if self.limited and message["type"] == "http.request":
            self.received += len(message.get("body", b""))
            if self.received > MAX_BODY_BYTES:
                # FastAPI turns anything but an HTTPException into a 400 while it reads a body.
                raise HTTPException(413, f"the body has more than {MAX_BODY_BYTES} bytes, the limit of this path")
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            if self.scope["path"].startswith("/v1/"):
                headers.setdefault("cache-control", "no-store")
        await self._send(message)
