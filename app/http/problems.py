"""Renders every error as a problem document (RFC 9457). Endpoints declare their errors with `problems`."""

import errno
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from app.errors import Invalid, NotFound, PayloadTooLarge, ServiceError, StorageFull, Unauthorized, Unavailable
from app.request_models import Problem, explain, invalid, pointer, problem

log = structlog.get_logger()

MEDIA_TYPE = "application/problem+json"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class ErrorItem(BaseModel):
    """One error in a request."""

    pointer: str
    code: str
    detail: str


class ProblemDocument(BaseModel):
    """An error. Branch on `code`, which is stable; `detail` is text for people."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    request_id: str
    errors: list[ErrorItem] | None = None


class BadRequest(ServiceError):
    """The request cannot be parsed."""

    status, code, title = 400, "bad_request", "Bad request"


class MethodNotAllowed(ServiceError):
    """The path exists, but does not support the method."""

    status, code, title = 405, "method_not_allowed", "Method not allowed"


class InternalError(ServiceError):
    """An error of the service: it logs the traceback, and the caller gets the request id."""


_BY_STATUS: dict[int, type[ServiceError]] = {
    400: BadRequest,
    404: NotFound,
    405: MethodNotAllowed,
    413: PayloadTooLarge,
    422: Invalid,
}


def problems(*kinds: type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """Return `responses=` for an endpoint's errors, with those that every endpoint can return."""
    by_status: dict[int, list[type[ServiceError]]] = {}
    every: tuple[type[ServiceError], ...] = (*kinds, Unauthorized, Unavailable)
    for kind in every:
        by_status.setdefault(kind.status, []).append(kind)
    return {
        status: {
            "description": "; ".join(f"`{kind.code}`: {kind.title}" for kind in group),
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}},
        }
        for status, group in sorted(by_status.items())
    }


def as_service_error(error: Exception) -> ServiceError:
    """Return the error to send for any exception. Logs the ones that an operator must look at."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, RequestValidationError):
        return invalid([_item(item) for item in error.errors()])
    if isinstance(error, HTTPException):
        return _from_http(error)
    if _disk_full(error):
        log.error("disk_full", exc_info=error)
        return StorageFull("the service's disk is full; nothing was changed")
    if isinstance(error, (OperationalError, InterfaceError, PoolTimeout)):
        log.error("database_unavailable", exc_info=error)
        return Unavailable("the database does not respond; try again")
    if isinstance(error, OSError):
        log.error("storage_unavailable", exc_info=error)
        return Unavailable("the object store does not respond; try again")
    log.error("unexpected_error", exc_info=error)
    return InternalError("the service failed; the operator finds the cause in the service's log under this request id")


def _disk_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    if isinstance(error, DBAPIError):
        return getattr(error.orig, "sqlstate", None) == "53100" or "disk is full" in str(error.orig)
    return False


def _from_http(error: HTTPException) -> ServiceError:
    kind = _BY_STATUS.get(error.status_code)
    details = {
        404: "no such path; /openapi.json lists every path",
        405: "this path does not support this method; /openapi.json lists every path and its methods",
    }
    if kind is None:
        known = ServiceError(str(error.detail))
        known.status, known.code, known.title = error.status_code, f"http_{error.status_code}", str(error.detail)
    else:
        known = kind(details.get(error.status_code, str(error.detail)))
    known.headers = dict(error.headers or {})
    return known


def _item(item: dict[str, Any]) -> Problem:
    code, detail = explain(item) if "detail" not in item.get("ctx", {}) else (item["type"], item["msg"])
    place, *path = item["loc"]
    if place == "body":
        return problem("" if code == "bad_json" else pointer(path), code, detail)
    # Not a JSON pointer: it must not look like a key of the body.
    return problem(f"{place}:{'.'.join(str(token) for token in path)}", code, detail)


def render(request: Request, error: Exception) -> JSONResponse:
    """Return the problem document for `error`."""
    known = as_service_error(error)
    request_id = getattr(request.state, "request_id", "")
    document = known.problem(instance=request.url.path, request_id=request_id)
    return JSONResponse(document, status_code=known.status, headers=known.headers, media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Register `render` as the handler of these errors; `RequestMiddleware` calls it for all others."""

    async def _handler(request: Request, error: Exception) -> JSONResponse:
        return render(request, error)

    for kind in (ServiceError, RequestValidationError, HTTPException, OperationalError, InterfaceError, OSError):
        app.add_exception_handler(kind, _handler)
