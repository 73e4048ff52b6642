"""The object store, in a local directory or in S3: datasets, checkpoints, artifacts.

Every write is atomic: a reader sees the old object or the new one, and a failed write leaves the old one unchanged.
"""

import errno
import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, S3Store

from app.logs import first_line

if TYPE_CHECKING:
    from obstore import GetOptions

CHUNK_BYTES = 1024 * 1024
# S3 allows at most 10,000 parts, each of at least 5 MiB.
_PART_BYTES = 8 * CHUNK_BYTES
_MAX_PARTS = 9_000
_SPAN_BYTES = 64 * CHUNK_BYTES
_MAX_KEY_LENGTH = 300
_SEGMENT = re.compile(r"[A-Za-z0-9_=+@~-][A-Za-z0-9_.=+@~-]*")
_PART = re.compile(r"#\d+$")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


class ObjectMissing(KeyError):
    """The store has no object with this key."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"no object {self.key!r} in the store"


@dataclass(frozen=True)
class Stored:
    """A stored object.

    Attributes:
        key: its key.
        size_bytes: its length, bytes.
        sha256: of its content, 64 hexadecimal digits.
    """

    key: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Found:
    """An object in a listing.

    Attributes:
        key: its key.
        size_bytes: its length, bytes.
        written_at: when it was stored, aware.
    """

    key: str
    size_bytes: int
    written_at: datetime


def _walk(root: Path, folder: tuple[str, ...], after: tuple[str, ...]) -> Iterator[Found]:
    """Yield the files under `root/folder` after the path `after`, sorted by path."""
    try:
        entries = sorted(os.scandir(root.joinpath(*folder)), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in entries:
        path = (*folder, entry.name)
        if path < after[: len(path)] or path == after:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(root, path, after)
            continue
        try:
            state = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue  # deleted just now
        yield Found("/".join(path), state.st_size, datetime.fromtimestamp(state.st_mtime, UTC))


def check_key(key: str) -> str:
    """Return `key` if it is valid: segments of letters, digits and `_.=+@~-`, joined by single slashes.

    Raises `ValueError` for anything else: empty, longer than 300 characters, a leading or trailing slash, a segment
    that begins with a dot (so `..` and hidden files are excluded).
    """
    if len(key) > _MAX_KEY_LENGTH or not all(_SEGMENT.fullmatch(segment) for segment in key.split("/")):
        raise ValueError(
            f"{key[:_MAX_KEY_LENGTH]!r} is not a storage key: use at most {_MAX_KEY_LENGTH} characters in segments of "
            "A-Z a-z 0-9 _ . = + @ ~ - (no leading dot), joined by single slashes"
        )
    return key


@contextmanager
def _errors(key: str) -> Iterator[None]:
    """Convert the store's errors to `ObjectMissing` and `OSError`; its errno is EIO where the system gives none."""
    try:
        yield
    except (FileNotFoundError, BaseError) as error:
        # S3 answers 404 for a missing bucket as well, which is an error of the configuration.
        if "NoSuchBucket" in str(error):
            text = f"object store, {key}: the bucket does not exist; create it, or correct STORAGE_URL"
            raise OSError(errno.ENOENT, text) from error
        if isinstance(error, FileNotFoundError):
            raise ObjectMissing(key) from error
        # The library reports the errno of a local disk only in its text.
        text = first_line(error)
        found = _OS_ERROR.search(text)
        raise OSError(int(found[1]) if found else errno.EIO, f"object store, {key}: {text}") from error


def _hashed(file: BinaryIO, digest: "hashlib._Hash", chunk_bytes: int) -> Iterator[bytes]:
    while chunk := file.read(chunk_bytes):
        digest.update(chunk)
        yield chunk


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Storage:
    """The object store at `url`: `file:///directory` or `s3://bucket/prefix`.

    S3 takes its credentials, region and endpoint from the usual `AWS_*` variables (`AWS_ENDPOINT_URL` for one that
    is not Amazon's). Thread-safe. Must not be created before a fork and used after it.

    Every method raises `ValueError` for an invalid key, and `OSError` if the store does not respond or the disk fails;
    its `errno` is `ENOSPC` for a full local disk.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._root: Path | None = None
        self._store: LocalStore | S3Store
        if parts.scheme == "file" and not parts.netloc and parts.path.startswith("/"):
            self._root = Path(unquote(parts.path))
            self._root.mkdir(parents=True, exist_ok=True)
            self._store = LocalStore(self._root)
        elif parts.scheme == "s3" and parts.netloc:
            self._store = S3Store.from_url(
                url,
                client_options={
                    "allow_http": os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"),
                    "connect_timeout": timedelta(seconds=5),
                    "timeout": timedelta(minutes=5),
                },
                retry_config={"max_retries": 4, "retry_timeout": timedelta(seconds=30)},
            )
        else:
            raise ValueError(f"STORAGE_URL is {url!r}; use file:///directory or s3://bucket/prefix")

    def put_file(self, key: str, path: Path) -> Stored:
        """Store the file at `path` under `key`, replacing any object there, and return its size and hash.

        The file is read once, in chunks. Raises `FileNotFoundError` if there is no such file.
        """
        check_key(key)
        with path.open("rb") as file:
            return self._put_local(self._root, key, file) if self._root else self._put_remote(key, file)

    def _put_local(self, root: Path, key: str, file: BinaryIO) -> Stored:
        # Not with the library: it does not sync, and a crash after the rename would leave an empty object. It omits
        # names that end with `#digits` from its listings.
        target = root / key
        part = target.with_name(f"{target.name}#{secrets.randbits(63)}")
        digest, size = hashlib.sha256(), 0
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("xb") as out:
                for chunk in _hashed(file, digest, CHUNK_BYTES):
                    size += out.write(chunk)
                out.flush()
                os.fsync(out.fileno())
            part.replace(target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        _sync_directory(target.parent)
        return Stored(key, size, digest.hexdigest())

    def _put_remote(self, key: str, file: BinaryIO) -> Stored:
        digest = hashlib.sha256()
        size = os.fstat(file.fileno()).st_size
        part_bytes = max(_PART_BYTES, -(-size // _MAX_PARTS))
        with _errors(key):
            if size <= part_bytes:
                body = file.read()
                digest.update(body)
                size = len(body)
                obstore.put(self._store, key, body, use_multipart=False)
            else:
                chunks = _hashed(file, digest, part_bytes)
                obstore.put(self._store, key, chunks, chunk_size=part_bytes, max_concurrency=4)
                size = file.tell()
        return Stored(key, size, digest.hexdigest())

    def get_file(self, key: str, path: Path) -> None:
        """Write the object to `path` atomically, through a part file beside it. Raises `ObjectMissing`."""
        part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
        try:
            with part.open("xb") as out:
                for chunk in self.stream(key):
                    out.write(chunk)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def stream(self, key: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Return an iterator over the bytes from `start` up to `end` (exclusive; None: all), about 1 MiB at a time.

        Raises `ObjectMissing` here, not at the first chunk; `ValueError` for a range outside the object. The iterator
        raises `OSError` if the object is replaced while it is read.
        """
        with _errors(key):
            meta = obstore.head(self._store, check_key(key))
        stop = meta["size"] if end is None else end
        if not 0 <= start <= stop <= meta["size"]:
            raise ValueError(f"{key} has {meta['size']} bytes; the range {start} to {stop} is outside")
        return self._spans(key, start, stop, meta["e_tag"])

    def _spans(self, key: str, start: int, stop: int, e_tag: str | None) -> Iterator[bytes]:
        # One request for each span: a request's timeout covers its whole body, and would be too short for a large
        # object. The tag ensures that all spans are of one version.
        with _errors(key):
            for begin in range(start, stop, _SPAN_BYTES):
                options: GetOptions = {"range": (begin, min(begin + _SPAN_BYTES, stop)), "if_match": e_tag}
                for chunk in obstore.get(self._store, key, options=options).stream(min_chunk_size=CHUNK_BYTES):
                    yield bytes(chunk)

    def size(self, key: str) -> int:
        """Return the object's length in bytes. Raises `ObjectMissing`."""
        with _errors(key):
            return int(obstore.head(self._store, check_key(key))["size"])

    def exists(self, key: str) -> bool:
        """Return whether there is an object with this key."""
        try:
            self.size(key)
        except ObjectMissing:
            return False
        return True

    def delete(self, key: str) -> None:
        """Delete the object; does nothing if there is none."""
        try:
            with _errors(key):
                obstore.delete(self._store, check_key(key))
        except ObjectMissing:
            return

    def delete_prefix(self, prefix: str) -> None:
        """Delete every object under the folder `prefix` (`jobs/job_…`), and on a local disk the folder too."""
        for key in self.list(prefix):
            self.delete(key)
        if self._root:
            self._remove_empty_folders(self._root / prefix)

    def _remove_empty_folders(self, folder: Path) -> None:
        for directory, _, _ in os.walk(folder, topdown=False):
            try:
                Path(directory).rmdir()
            except OSError as error:
                # Another process is writing there, or has removed it already.
                if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                    raise

    def list(self, prefix: str) -> list[str]:
        """Return the keys under the folder `prefix`, sorted. It is whole segments: `a/b` does not match `a/bc`."""
        with _errors(prefix):
            pages = obstore.list(self._store, check_key(prefix))
            return sorted(str(meta["path"]) for page in pages for meta in page)

    def scan(self, prefix: str, *, after: str | None, limit: int) -> "Sequence[Found]":
        """Return the next objects under the folder `prefix` after the key `after`, at most `limit`.

        In the store's own, stable order. On a local disk this includes the part files of interrupted writes, whose
        keys have a `#`.
        """
        check_key(prefix)
        if self._root:
            behind = tuple((after or "").split("/"))
            return list(islice(_walk(self._root, (prefix,), behind), limit))
        with _errors(prefix):
            pages = obstore.list(self._store, prefix, offset=after, chunk_size=min(limit, 1000))
            metas = islice((meta for page in pages for meta in page), limit)
            return [Found(str(meta["path"]), int(meta["size"]), meta["last_modified"]) for meta in metas]

    def discard(self, found: "Found") -> None:
        """Delete an object that `scan` returned; does nothing if it is gone."""
        if self._root and _PART.search(found.key):
            (self._root / found.key).unlink(missing_ok=True)
        else:
            self.delete(found.key)

    def ping(self) -> None:
        """Write, read and delete a small object. Raises `OSError` if one of them fails."""
        key = f"ping/{secrets.token_hex(8)}"
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"ping")
            file.flush()
            self.put_file(key, Path(file.name))
        try:
            if (read := b"".join(self.stream(key))) != b"ping":
                raise OSError(errno.EIO, f"object store: wrote b'ping', read back {read!r}")
        except ObjectMissing as error:
            raise OSError(errno.EIO, f"object store: {error}, which was just written") from error
        finally:
            self.delete(key)
