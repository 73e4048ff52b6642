"""The Python client.

from defeat import Client

with Client() as client:
    dataset = client.datasets.wait(client.datasets.add("cells.zip")["id"])
    job = client.jobs.submit({"name": "cells-small", "dataset": dataset["id"], ...})
    for update in client.jobs.watch(job["id"]):
        print(update["job"]["progress"])
    client.jobs.download(job["id"], "student-best.safetensors", "student.safetensors")
"""

import os
from types import TracebackType
from typing import Any, Self, cast

from defeat.client.checkpoints import Checkpoints
from defeat.client.datasets import Datasets
from defeat.client.errors import ApiError, ClientError, ConnectionFailed, DigestMismatch, InvalidInput, WaitTimeout
from defeat.client.jobs import Jobs
from defeat.client.transport import Transport
from defeat.client.types import Worker

__all__ = ["ApiError", "Client", "ClientError", "ConnectionFailed", "DigestMismatch", "InvalidInput", "WaitTimeout"]

DEFAULT_URL = "http://127.0.0.1:8765"


class Client:
    """A client of one server with one API key. Not thread-safe.

    Args:
        url: the server's address; default: `DEFEAT_URL`, else `http://127.0.0.1:8765`.
        api_key: default: `DEFEAT_API_KEY`.
        patience_s: how long a request is retried after a broken connection or status 502, 503 or 504, seconds.

    Requests that create a resource carry an idempotency key, so that they can be retried too.
    Every method raises `ApiError` if the service returns an error, and `ConnectionFailed` if it does not respond.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None, *, patience_s: float = 60.0) -> None:
        self._transport = Transport(
            url or os.environ.get("DEFEAT_URL") or DEFAULT_URL,
            api_key or os.environ.get("DEFEAT_API_KEY"),
            patience_s=patience_s,
            first_patience_s=min(patience_s, 2.0),
        )
        self.datasets = Datasets(self._transport)
        self.checkpoints = Checkpoints(self._transport)
        self.jobs = Jobs(self._transport)

    @property
    def url(self) -> str:
        """The server's address."""
        return self._transport.url

    def catalog(self) -> dict[str, Any]:
        """Return what job specs may name: detectors, backbones, methods, schedule parameters, dataset formats."""
        return cast(dict[str, Any], self._transport.get("/v1/catalog"))

    def usage(self) -> dict[str, Any]:
        """Return what the key's tenant stores, in bytes by kind, and its use of each quota."""
        return cast(dict[str, Any], self._transport.get("/v1/usage"))

    def workers(self) -> list[Worker]:
        """Return the service's workers, by name."""
        return cast(list[Worker], self._transport.get("/v1/workers")["data"])

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
