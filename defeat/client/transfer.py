"""Uploads that are repeated, and downloads that are resumed, when the connection breaks."""

import hashlib
import os
from base64 import b64encode
from collections.abc import Callable, Iterator
from http import HTTPStatus
from io import BufferedIOBase
from pathlib import Path
from typing import BinaryIO

import httpx2

from defeat.client.errors import ApiError, ClientError, DigestMismatch, InvalidInput
from defeat.client.transport import RETRIED_STATUSES, Transport

CHUNK_BYTES = 1024 * 1024
_DAMAGED_TRIES = 3

OnProgress = Callable[[int, int], None]
"""Called with the bytes transferred and the total bytes; the first decreases when a transfer starts again."""


def upload(
    transport: Transport,
    path: str,
    file: BufferedIOBase,
    *,
    is_awaited: Callable[[], bool],
    on_progress: OnProgress | None = None,
) -> None:
    """PUT `file` to `path`; starts again if the connection breaks.

    `is_awaited` asks the service whether it still awaits the content: an upload may be complete though its response was
    lost. Raises `ApiError` if the service rejects it, `ConnectionFailed` after `patience_s`, and `InvalidInput` for an
    empty file.
    """
    digest = hashlib.file_digest(file, "sha256").digest()
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise InvalidInput("the file is empty; there is nothing to upload")
    headers = {
        "Content-Type": "application/octet-stream",
        "Content-Length": str(size),
        "Content-Digest": f"sha-256=:{b64encode(digest).decode()}:",
    }
    patience, tries = transport.patience(), 0
    while True:
        tries += 1
        try:
            transport.put_once(path, _chunks(file, size, on_progress), headers)
            return
        except httpx2.TransportError as error:
            if not patience.wait():
                raise transport.failed(error) from error
        except ApiError as error:
            # A conflict at the second attempt: the first was complete, and its connection broke before the response.
            overtaken = error.status == HTTPStatus.CONFLICT and tries > 1 and not is_awaited()
            damaged = error.code == "upload_incomplete" and tries < _DAMAGED_TRIES
            passing = error.status in RETRIED_STATUSES
            if not (overtaken or ((damaged or passing) and patience.wait())):
                raise
        if not is_awaited():
            return


def _chunks(file: BufferedIOBase, size: int, on_progress: OnProgress | None) -> Iterator[bytes]:
    """Yield exactly `size` bytes from the file's start."""
    file.seek(0)
    done = 0
    while done < size:
        chunk = file.read(min(CHUNK_BYTES, size - done))
        if not chunk:
            raise ClientError(
                f"the file became shorter during the upload: it has {done} of {size} bytes; upload it again"
            )
        yield chunk
        # Counted when the next chunk is requested: until then it may not be sent.
        done += len(chunk)
        if on_progress:
            on_progress(done, size)


def download(
    transport: Transport,
    path: str,
    target: Path,
    *,
    sha256: str,
    size_bytes: int,
    on_progress: OnProgress | None = None,
) -> Path:
    """GET `path` into `target` and return it. Only a complete file replaces an existing `target`.

    The bytes go to a part file beside it, named after the content's digest, so that an interrupted download is resumed,
    also by another process, and never with other content.

    Raises `DigestMismatch` if the file's digest is not `sha256`, `ConnectionFailed` after `patience_s` without another
    byte, `ApiError` if the service rejects the request.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{sha256[:16]}.part")
    patience = transport.patience()
    with part.open("ab") as file:
        while (have := file.seek(0, os.SEEK_END)) < size_bytes:
            try:
                _receive(transport, path, file, f'"{sha256}"', size_bytes, on_progress)
                break
            except httpx2.TransportError as error:
                if file.tell() > have:
                    patience = transport.patience()
                if not patience.wait():
                    raise transport.failed(error) from error
            except ApiError as error:
                if error.status not in RETRIED_STATUSES or not patience.wait():
                    raise
        file.flush()
        os.fsync(file.fileno())
    with part.open("rb") as whole:
        actual = hashlib.file_digest(whole, "sha256").hexdigest()
    if actual != sha256:
        part.unlink()
        raise DigestMismatch(target.name, sha256, actual)
    part.replace(target)
    return target


def _receive(
    transport: Transport, path: str, file: BinaryIO, etag: str, size_bytes: int, on_progress: OnProgress | None
) -> None:
    """Append the missing bytes to `file`, or start again if the service sends the whole file."""
    have = file.tell()
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": etag}
    with transport.stream_once(path, headers) as response:
        if response.status_code != 206:
            have = file.seek(0)
            file.truncate()
        elif not response.headers.get("content-range", "").startswith(f"bytes {have}-"):
            raise ClientError(f"{path}: the client requested bytes from {have} on, and the server sent others")
        for chunk in response.iter_raw():
            # A server that sends without end must not fill the disk.
            if have + len(chunk) > size_bytes:
                raise ClientError(f"{path} is longer than the {size_bytes} bytes that the service reported")
            file.write(chunk)
            have += len(chunk)
            if on_progress:
                on_progress(have, size_bytes)
