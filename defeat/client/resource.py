"""What the resources share: paths, pages, waiting."""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from defeat.client.errors import InvalidInput, WaitTimeout
from defeat.client.transport import Transport

_PAGE = 100
_ID = re.compile(r"[a-z]+_[0-9a-zA-Z]+")

R = TypeVar("R", bound=Mapping[str, Any])


class Resource:
    """A kind of resource at `/v1/<kind>`."""

    KIND: str

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def _path(self, resource_id: str, *rest: str) -> str:
        """Return the path of a resource or of a part of it. Raises `InvalidInput` for a malformed id."""
        # The id becomes a part of the path: `../x` or `?` would change the request.
        if not _ID.fullmatch(resource_id):
            raise InvalidInput(f"{resource_id!r} is not an id of {self.KIND}; ids look like ds_…, ckpt_… or job_…")
        return "/".join((f"/v1/{self.KIND}", resource_id, *rest))

    def _pages(self, path: str, params: Mapping[str, Any] | None = None) -> Iterator[Any]:
        """Yield every item of a list, page by page."""
        after: str | None = None
        while True:
            page = self._transport.get(path, {"limit": _PAGE, **(params or {}), "after": after})
            yield from page["data"]
            if not page["has_more"]:
                return
            after = page["next_cursor"]


def wait_until(
    get: Callable[[], R],
    terminal: frozenset[str],
    *,
    timeout_s: float | None,
    poll_s: float,
    on_update: Callable[[R], None] | None = None,
) -> R:
    """Poll until the resource's status is terminal and return it. Calls `on_update` at every new status.

    Raises `WaitTimeout` after `timeout_s` seconds (None: never).
    """
    end = None if timeout_s is None else time.monotonic() + timeout_s
    status = None
    while True:
        resource = get()
        if resource["status"] != status:
            status = resource["status"]
            if on_update:
                on_update(resource)
        if status in terminal:
            return resource
        if end is not None and time.monotonic() + poll_s > end:
            raise WaitTimeout(f"{resource['id']} is still {status} after {timeout_s:g} s; it continues on the server")
        time.sleep(poll_s)
