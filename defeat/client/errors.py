"""The client's exceptions. Every message names the remedy."""

from collections.abc import Sequence
from typing import Any

from defeat.client.types import Problem


class ClientError(Exception):
    """Base class of the client's exceptions."""


class ApiError(ClientError):
    """The service returned an error.

    Attributes:
        status: the HTTP status.
        code: a stable code to branch on, such as `dataset_not_ready`.
        detail: what is wrong, the value, and the remedy.
        errors: one `{"pointer", "code", "detail"}` for each error in the request; may be empty.
        request_id: identifies the request in the server's log; None if the response had none.
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
            lines.append(f"request id {self.request_id}: search the server's log for it")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes as a JSON object."""
        return {
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            "errors": self.errors,
            "request_id": self.request_id,
        }


class ConnectionFailed(ClientError):
    """The server did not respond: nothing listens at `url`, or the connection broke repeatedly."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(
            f"cannot reach the server at {url} ({reason}); "
            "start one with `defeat up`, or set DEFEAT_URL to the address of a running one"
        )
        self.url = url
        self.reason = reason


class DigestMismatch(ClientError):
    """The download's digest is not the service's; the file was deleted."""

    def __init__(self, name: str, expected: str, actual: str) -> None:
        super().__init__(
            f"{name} was damaged: its SHA-256 is {actual}, expected {expected}; it was deleted, download it again"
        )
        self.expected = expected
        self.actual = actual


class InvalidInput(ClientError):
    """An argument, a file or a setting of the client is invalid; nothing was sent."""


class WaitTimeout(ClientError):
    """The resource did not reach a final status within the timeout. The service continues its work."""
