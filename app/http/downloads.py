"""Downloads from the object store: ranges, conditions, digests, and headers that keep a browser from running them."""

import base64
import re
from collections.abc import Iterator
from typing import Any

from fastapi import Request
from starlette.responses import Response, StreamingResponse

from app.errors import NotFound, RangeNotSatisfiable
from app.storage import ObjectMissing, Storage

_RANGE = re.compile(r"bytes=\s*(\d{0,18})-(\d{0,18})\s*")
_SHOWN_INLINE = frozenset({"image/jpeg", "image/png"})

PARAMETERS: dict[str, Any] = {
    "parameters": [
        {"name": name, "in": "header", "schema": {"type": "string"}, "description": description}
        for name, description in (
            ("Range", "`bytes=first-last`, `bytes=first-` or `bytes=-count`; several ranges return the whole file."),
            ("If-Range", "An `ETag`: `Range` applies only if the file still has it."),
            ("If-None-Match", "`ETag`s of the caller's copies."),
        )
    ]
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The file.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
    206: {
        "description": "The bytes that `Range` requests.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
    304: {"description": "The caller's copy, named by `If-None-Match`, is current."},
}


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Return (start, end) with an exclusive end, or None to return the whole file.

    As RFC 9110 allows, a header that is malformed, uses another unit or requests several ranges is ignored. Raises
    `RangeNotSatisfiable` if the range begins after the end.
    """
    found = _RANGE.fullmatch(header or "")
    if not found or not (found[1] or found[2]):
        return None
    if found[1]:
        start = int(found[1])
        end = min(int(found[2]) + 1, size) if found[2] else size
        if found[2] and int(found[2]) < start:
            return None
    else:
        start, end = max(size - int(found[2]), 0), size
    if start >= end:
        raise RangeNotSatisfiable(
            f"the file has {size} bytes; Range {header!r} requests none of them",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, end


def _matches(header: str | None, etag: str) -> bool:
    """Return whether an If-None-Match header names this tag, by weak comparison (RFC 9110)."""
    if header is None:
        return False
    return any(tag.strip().removeprefix("W/") in (etag, "*") for tag in header.split(","))


def safe_name(name: str) -> str:
    """Return the last part of `name` in plain ASCII: safe in a header, a shell and a file system."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name.rsplit("/", 1)[-1]).lstrip(".") or "file"


def respond(
    request: Request, storage: Storage, *, key: str, size_bytes: int, sha256: str, content_type: str, name: str
) -> Response:
    """Return the response to a GET or HEAD of one object.

    Raises `NotFound` if the store no longer has it, `RangeNotSatisfiable`; `OSError` if the store does not respond.
    """
    etag = f'"{sha256}"'
    kind = "inline" if content_type in _SHOWN_INLINE else "attachment"
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:",
        "Content-Disposition": f'{kind}; filename="{safe_name(name)}"',
        # A run wrote the file: if a browser opens it after all, it may not execute anything.
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "X-Content-Type-Options": "nosniff",
    }
    if _matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    condition = request.headers.get("if-range")
    wanted = None
    if request.method == "GET" and condition in (None, etag):
        wanted = parse_range(request.headers.get("range"), size_bytes)
    start, end = wanted or (0, size_bytes)
    headers["Content-Length"] = str(end - start)
    if wanted:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size_bytes}"
    if request.method == "HEAD":
        return Response(status_code=200, headers=headers, media_type=content_type)
    status = 206 if wanted else 200
    return StreamingResponse(_stream(storage, key, start, end), status, headers=headers, media_type=content_type)


def _stream(storage: Storage, key: str, start: int, end: int) -> Iterator[bytes]:
    try:
        return storage.stream(key, start=start, end=end)
    except ObjectMissing as error:
        raise NotFound("the object store no longer has this file") from error
