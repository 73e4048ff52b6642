"""Errors that the API returns; `app.http.problems` renders them as RFC 9457 problem documents."""

from typing import Any


class ServiceError(Exception):
    """An error with an HTTP status and a stable code. Services raise it, `app.http.problems` renders it.

    Subclasses set `status`, `code` and `title`; `detail` names the wrong value and the remedy.
    """

    status: int = 500
    code: str = "internal_error"
    title: str = "Internal error"

    def __init__(
        self,
        detail: str,
        *,
        errors: list[dict[str, str]] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = errors or []
        self.headers = headers or {}

    def problem(self, *, instance: str, request_id: str) -> dict[str, Any]:
        """Return the problem document's members."""
        document: dict[str, Any] = {
            "type": f"urn:defeat:problem:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "instance": instance,
            "code": self.code,
            "request_id": request_id,
        }
        if self.errors:
            document["errors"] = self.errors
        return document


class Unauthorized(ServiceError):
    """The API key is missing, unknown or revoked."""

    status, code, title = 401, "unauthorized", "Authentication required"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"WWW-Authenticate": "Bearer"})


class Forbidden(ServiceError):
    """The caller is authenticated, but not permitted to do this."""

    status, code, title = 403, "forbidden", "Not allowed"


class NotFound(ServiceError):
    """The tenant has no such resource."""

    status, code, title = 404, "not_found", "Not found"


class Conflict(ServiceError):
    """The resource's state does not allow the operation. `code` may name the case."""

    status, code, title = 409, "conflict", "State does not allow this"

    def __init__(self, detail: str, *, code: str | None = None) -> None:
        super().__init__(detail)
        self.code = code or type(self).code


class PayloadTooLarge(ServiceError):
    """The body is larger than the limit."""

    status, code, title = 413, "payload_too_large", "Payload too large"


class RangeNotSatisfiable(ServiceError):
    """The Range header requests bytes beyond the end of the file."""

    status, code, title = 416, "range_not_satisfiable", "Range not satisfiable"


class Invalid(ServiceError):
    """The request's content is invalid. `errors` holds one `{pointer, code, detail}` for each error."""

    status, code, title = 422, "validation_failed", "Invalid request"

    def __init__(self, detail: str, *, code: str | None = None, errors: list[dict[str, str]] | None = None) -> None:
        super().__init__(detail, errors=errors)
        self.code = code or type(self).code


class UploadIncomplete(ServiceError):
    """The body is shorter than its Content-Length, or does not match its Content-Digest."""

    status, code, title = 400, "upload_incomplete", "Upload incomplete"


class StorageFull(ServiceError):
    """The service's disk is full; nothing was changed."""

    status, code, title = 507, "storage_full", "No space left"


class Unavailable(ServiceError):
    """A dependency of the service (database, broker, object store) does not respond."""

    status, code, title = 503, "unavailable", "Temporarily unavailable"

    def __init__(self, detail: str, *, retry_after_s: int = 5) -> None:
        super().__init__(detail, headers={"Retry-After": str(retry_after_s)})
