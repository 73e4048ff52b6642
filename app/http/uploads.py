"""Uploads: a raw request body is streamed to a part file, checked, and then stored in the object store."""

import asyncio
import base64
import binascii
import errno
import hashlib
import re
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog
from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from app.errors import Invalid, PayloadTooLarge, StorageFull, Unavailable, UploadIncomplete
from app.settings import MIB, Settings
from app.storage import Storage

log = structlog.get_logger()

BUFFER_BYTES = 1 * MIB
IDLE_S = 60.0
"""An upload is aborted when the client sends nothing for this long."""
ABANDONED_S = 60 * 60.0
_MAX_DIGITS = 20
_DIGEST = re.compile(r"\s*([a-z0-9*._-]+)=:([A-Za-z0-9+/=]*):\s*")


class UploadTooLarge(PayloadTooLarge):
    """The upload is larger than `max_upload_bytes`."""

    code, title = "upload_too_large", "Upload too large"


class EmptyUpload(Invalid):
    """The upload has no bytes."""

    code, title = "empty_upload", "Empty upload"


class BadDigest(Invalid):
    """The Content-Digest header is malformed."""

    code, title = "bad_digest", "Malformed Content-Digest"


@dataclass(frozen=True)
class Part:
    """A complete body on disk, valid only inside the `with` block of `receive`."""

    path: Path
    size_bytes: int
    sha256: str


def announced_digest(header: str | None) -> bytes | None:
    """Return the SHA-256 of a Content-Digest header (RFC 9530); None without a header.

    Raises `BadDigest` if the header is malformed or has no sha-256.
    """
    if header is None:
        return None
    for member in header.split(","):
        found = _DIGEST.fullmatch(member)
        if found and found[1] == "sha-256":
            try:
                digest = base64.b64decode(found[2], validate=True)
            except binascii.Error:
                break
            if len(digest) == hashlib.sha256().digest_size:
                return digest
    raise BadDigest(f"Content-Digest must be `sha-256=:<base64 of 32 bytes>:`; got {header[:120]!r}")


def announced_length(request: Request, limit: int) -> int | None:
    """Return Content-Length; None for a chunked body. Raises `UploadTooLarge`, `EmptyUpload`."""
    header = request.headers.get("content-length", "")
    if not header.isdecimal():
        return None
    if len(header) > _MAX_DIGITS:
        raise UploadTooLarge(f"Content-Length has {len(header)} digits; the limit is {limit} bytes")
    length = int(header)
    if length > limit:
        raise UploadTooLarge(f"the body has {length} bytes; the limit is {limit}")
    if length == 0:
        raise EmptyUpload("the body is empty; send the file itself as the request's body")
    return length


@asynccontextmanager
async def receive(request: Request, settings: Settings) -> AsyncIterator[Part]:
    """Stream the body to a part file, which is deleted when the block ends.

    Raises:
        UploadTooLarge: Content-Length or the body itself exceeds `max_upload_bytes`.
        UploadIncomplete: the client disconnected or sent nothing for `IDLE_S`, or the length or digest does not match.
        EmptyUpload: the body is empty.
        BadDigest: the Content-Digest header is malformed.
        StorageFull, Unavailable: the part file could not be written.
    """
    limit = settings.max_upload_bytes
    length = announced_length(request, limit)
    digest = announced_digest(request.headers.get("content-digest"))
    folder = settings.scratch / "uploads"
    path = folder / f"{secrets.token_hex(16)}.part"
    try:
        with writing():
            folder.mkdir(parents=True, exist_ok=True)
            part = await _write(request, path, limit)
        if length is not None and part.size_bytes != length:
            raise UploadIncomplete(f"{part.size_bytes} of {length} bytes arrived; send the file again")
        if digest is not None and part.sha256 != digest.hex():
            raise UploadIncomplete(
                f"the body's SHA-256 is {part.sha256}, but Content-Digest has {digest.hex()}; send the file again"
            )
        if part.size_bytes == 0:
            raise EmptyUpload("the body is empty; send the file itself as the request's body")
        yield part
    finally:
        path.unlink(missing_ok=True)


@asynccontextmanager
async def _idle_timeout() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(IDLE_S):
            yield
    except TimeoutError as error:
        raise UploadIncomplete(f"nothing arrived for {IDLE_S:.0f} s; send the file again") from error
    except ClientDisconnect as error:
        raise UploadIncomplete("the connection ended before the body did; send the file again") from error


async def _write(request: Request, path: Path, limit: int) -> Part:
    hasher, size, buffer = hashlib.sha256(), 0, bytearray()
    stream = aiter(request.stream())
    file = await run_in_threadpool(path.open, "xb")

    def _flush(data: bytes) -> None:
        hasher.update(data)
        file.write(data)

    try:
        while True:
            async with _idle_timeout():
                chunk = await anext(stream, None)
            if chunk is None:
                break
            size += len(chunk)
            if size > limit:
                raise UploadTooLarge(f"the body has more than {limit} bytes, the limit")
            buffer += chunk
            if len(buffer) >= BUFFER_BYTES:
                await run_in_threadpool(_flush, bytes(buffer))
                buffer.clear()
        await run_in_threadpool(_flush, bytes(buffer))
    finally:
        await run_in_threadpool(file.close)
    return Part(path=path, size_bytes=size, sha256=hasher.hexdigest())


@contextmanager
def writing() -> Iterator[None]:
    """Convert an `OSError` of the disk or the object store to `StorageFull` or `Unavailable`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull("the service has no space for this file; nothing was changed") from error
        log.error("upload_not_stored", exc_info=error)
        raise Unavailable("the file could not be stored; send it again") from error


def store(storage: Storage, folder: str, part: Part) -> str:
    """Store the part under a new key and return the key.

    Never under a fixed key: of two uploads to one row, the second must not replace the first one's object.
    """
    key = f"{folder}/upload-{secrets.token_hex(8)}"
    with writing():
        storage.put_file(key, part.path)
    return key


def discard(storage: Storage, key: str) -> None:
    """Delete an object that no row refers to. Logs a failure: retention deletes the object later."""
    try:
        storage.delete(key)
    except OSError as error:
        log.warning("object_not_deleted", key=key, error=str(error))


def discard_prefix(storage: Storage, prefix: str) -> None:
    """Delete the objects of a deleted row. Logs a failure with the prefix: retention deletes the objects later."""
    try:
        storage.delete_prefix(prefix)
    except OSError as error:
        log.error("objects_left_behind", prefix=prefix, error=str(error))


def remove_abandoned(settings: Settings) -> None:
    """Delete part files that were not written to for an hour: their process was killed."""
    for path in (settings.scratch / "uploads").glob("*.part"):
        try:
            if path.stat().st_mtime < time.time() - ABANDONED_S:
                path.unlink()
        except FileNotFoundError:
            continue  # its upload ended just now
