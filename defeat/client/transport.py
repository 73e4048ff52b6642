"""HTTP requests: the API key, errors, and retries."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx2

from defeat.client.errors import ApiError, ConnectionFailed, InvalidInput

# The service, or a proxy before it, is restarting: retry.
RETRIED_STATUSES = frozenset({HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT})
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.2, 5.0
_NEVER_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_TIMEOUT = httpx2.Timeout(60.0, connect=10.0)


class Patience:
    """A period of retries with increasing delays."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._delay = _FIRST_DELAY_S

    def wait(self, at_least_s: float = 0.0) -> bool:
        """Wait before the next attempt; return False at once if the period would be over by then."""
        delay = max(self._delay, at_least_s)
        if time.monotonic() + delay > self._end:
            return False
        time.sleep(delay)
        self._delay = min(self._delay * 2, _LONGEST_DELAY_S)
        return True


class Transport:
    """HTTP requests to one server with one API key.

    Args:
        url: the server's address, `http://…` or `https://…`, without `/v1`.
        api_key: sent as a bearer token; None sends none.
        patience_s: how long temporary failures are retried once the server has responded, seconds.
        first_patience_s: the same before its first response, short, so that a wrong address is reported soon.

    Raises `InvalidInput` for an invalid address or key.
    """

    def __init__(
        self, url: str, api_key: str | None, *, patience_s: float = 60.0, first_patience_s: float = 2.0
    ) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidInput(f"{url!r} is not a server's address; it must look like http://127.0.0.1:8765")
        headers = {"Accept": "application/json", "User-Agent": "defeat-client"}
        if api_key:
            if not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
                raise InvalidInput(
                    "the API key contains characters that no key has; copy it again, without spaces and line breaks"
                )
            headers["Authorization"] = f"Bearer {api_key}"
        self._patience_s = patience_s
        self._first_patience_s = first_patience_s
        self._reached = False
        # No redirects, so that the key goes to no other server. No proxy for loopback addresses: it cannot reach them.
        self._http = httpx2.Client(
            base_url=self.url, headers=headers, timeout=_TIMEOUT, trust_env=parts.hostname not in _LOOPBACK
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def patience(self) -> Patience:
        """Return the period in which a failing request is retried."""
        return Patience(self._patience_s if self._reached else self._first_patience_s)

    def get(self, path: str, params: Mapping[str, Any] | None = None) -> Any:
        """Return the JSON response to a GET; omits parameters that are None."""
        kept = {name: value for name, value in (params or {}).items() if value is not None}
        return self._decoded(self._repeated("GET", path, repeatable=True, params=kept))

    def post(self, path: str, body: Any = None) -> Any:
        """Return the JSON response to a POST that is idempotent or creates nothing."""
        return self._decoded(self._repeated("POST", path, repeatable=True, content=_encoded(body), headers=_JSON))

    def create(self, path: str, body: Any) -> Any:
        """Return the JSON response to a POST that creates; an idempotency key makes retries safe."""
        headers = {**_JSON, "Idempotency-Key": str(uuid4())}
        return self._decoded(self._repeated("POST", path, repeatable=True, content=_encoded(body), headers=headers))

    def patch(self, path: str, body: Any) -> Any:
        """Return the JSON response to a PATCH, which is idempotent."""
        return self._decoded(self._repeated("PATCH", path, repeatable=True, content=_encoded(body), headers=_JSON))

    def delete(self, path: str) -> None:
        """Send a DELETE. Not retried once sent: the second response would be a 404 that means success."""
        self._repeated("DELETE", path, repeatable=False)

    def put_once(self, path: str, content: Iterable[bytes], headers: Mapping[str, str]) -> Any:
        """PUT a body, without retries, and return the JSON response. Raises httpx2's `TransportError`."""
        # The server may hash and store the whole body before it responds.
        timeout = httpx2.Timeout(60.0, connect=10.0, read=900.0)
        response = self._http.put(path, content=content, headers=dict(headers), timeout=timeout)
        self._reached = True
        _raise_for_problem(response)
        return self._decoded(response)

    @contextmanager
    def stream_once(self, path: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """Give the streaming response to a GET, without retries. Raises httpx2's `TransportError`."""
        with self._http.stream("GET", path, headers={"Accept": "*/*", **headers}) as response:
            self._reached = True
            if not response.is_success:
                response.read()
                _raise_for_problem(response)
            yield response

    def failed(self, error: httpx2.TransportError) -> ConnectionFailed:
        """Return the exception to raise when the retries are over."""
        return ConnectionFailed(self.url, str(error) or type(error).__name__)

    def _repeated(self, method: str, path: str, *, repeatable: bool, **request: Any) -> httpx2.Response:
        patience = self.patience()
        while True:
            try:
                response = self._http.request(method, path, **request)
            except httpx2.TransportError as error:
                if not (repeatable or isinstance(error, _NEVER_SENT)) or not patience.wait():
                    raise self.failed(error) from error
                continue
            except httpx2.InvalidURL as error:
                raise InvalidInput(f"{self.url + path!r} is not a valid URL: {error}") from error
            self._reached = True
            if response.status_code in RETRIED_STATUSES and repeatable and patience.wait(_retry_after_s(response)):
                continue
            _raise_for_problem(response)
            return response

    def _decoded(self, response: httpx2.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            kind = response.headers.get("content-type", "nothing")
            raise ApiError(
                response.status_code,
                "not_this_service",
                f"{self.url} returned {kind} instead of JSON; check that it is the address of a DeFeat server",
            ) from error


_JSON = {"Content-Type": "application/json"}


def _encoded(body: Any) -> bytes:
    return b"" if body is None else json.dumps(body, allow_nan=False).encode()


def _retry_after_s(response: httpx2.Response) -> float:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdecimal() else 0.0


def _raise_for_problem(response: httpx2.Response) -> None:
    """Raise `ApiError` for an unsuccessful response of the service or of a proxy before it."""
    if response.is_success:
        return
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {}
    reason = response.reason_phrase or "request failed"
    raise ApiError(
        response.status_code,
        str(problem.get("code", "http_error")),
        str(problem.get("detail") or f"{response.request.method} {response.request.url.path}: {reason}"),
        [
            {name: str(error.get(name, "")) for name in ("pointer", "code", "detail")}  # type: ignore[misc]
            for error in problem.get("errors") or []
            if isinstance(error, dict)
        ],
        str(problem.get("request_id") or response.headers.get("x-request-id") or "") or None,
    )
