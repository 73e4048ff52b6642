"""What can go wrong between a caller and the service. Every message says what to do next."""

from collections.abc import Sequence
from typing import Any

from defeat.client.types import Problem


class ClientError(Exception):
    """Base of every error that this package raises on purpose."""


class ApiError(ClientError):
    """The service answered with an error.

    Attributes:
        status: the HTTP status.
        code: a stable name to branch on, such as `dataset_not_ready`.
        detail: what was wrong, which value, and what would do.
        errors: one `{"pointer", "code", "detail"}` for each mistake in the request; may be empty.
        request_id: what the operator needs to find the request in the logs; None if the answer had none.
    """

    def __init__(
        self, status: int, code: str, detail: str, errors: Sequence[Problem] = (), request_id: str | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = list(errors)
        self.request_id = request_id

    def __str__(self) -> str:
        lines = [f"{self.detail} ({self.code}, HTTP {self.status})"]
        lines += [f"  {error['pointer'] or '/'}: {error['detail']} ({error['code']})" for error in self.errors]
        if self.status == 401:
            lines.append("set DEFEAT_API_KEY to a key of this server; `defeat up --new-key` prints one")
        if self.status >= 500 and self.request_id:
            lines.append(f"request id {self.request_id}: the server's log has more under it")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes, for machines."""
        return {
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            "errors": self.errors,
            "request_id": self.request_id,
        }


class ConnectionFailed(ClientError):
    """No answer came: nobody listens at `url`, or the connection broke and kept breaking."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(
            f"cannot reach the server at {url} ({reason}); "
            "start one with `defeat up`, or set DEFEAT_URL to the address of a running one"
        )
        self.url = url
        self.reason = reason


class DigestMismatch(ClientError):
    """What was downloaded is not what the service has; the file was not kept."""

    def __init__(self, name: str, expected: str, actual: str) -> None:
        super().__init__(
            f"{name} arrived damaged: its SHA-256 is {actual} and should be {expected}; nothing was kept, try again"
        )
        self.expected = expected
        self.actual = actual


class InvalidInput(ClientError):
    """An argument, a file or a setting on this side cannot be used; nothing was sent."""


class WaitTimeout(ClientError):
    """The resource did not end within the time that the caller gave; it goes on."""
