"""Unpacking of archives that nobody vouches for.

What a header says is never believed: written bytes are counted, paths are rebuilt from checked parts, and only plain
files and folders are made. Everything refused is a `RunError("data", …)` that names the member.
"""

import bz2
import errno
import gzip
import io
import lzma
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

from defeat.engine.report import RunError, shown

Tick = Callable[[float], None]
"""Called often with the fraction done, 0 to 1; may raise `Cancelled`."""

KINDS = "zip, tar, tar.gz, tar.bz2, tar.xz"

# An archive may unpack to 100 MiB whatever its size, and beyond that to at most 200 times its size. Images hardly
# compress at all and annotations 20 to 50 times, so only bombs come near.
FREE_BYTES = 100 * 1024 * 1024
MAX_RATIO = 200

_CHUNK = 1024 * 1024
_BLOCK = tarfile.BLOCKSIZE
_MAX_HEADER_BYTES = 1024 * 1024  # of one tar member: a long name, extended attributes
_XZ_MEMORY_BYTES = 256 * 1024 * 1024  # `xz -9` needs 65 MiB to decompress
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 1024
_CENTRAL_ENTRY = b"PK\x01\x02"
_ENCRYPTED = 0x1

_CORRUPT = (
    EOFError,
    IndexError,
    NotImplementedError,
    OverflowError,
    RecursionError,
    ValueError,
    lzma.LZMAError,
    struct.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)


def unpack(archive: Path, directory: Path, *, max_bytes: int, max_files: int, tick: Tick) -> None:
    """Unpack `archive` into `directory`, which is made if need be and should be empty.

    The kind is recognised by content, never by name. Files get the mode 0644 and the present time; nothing else of a
    member's metadata is used. At most `max_bytes` bytes and `max_files` files and folders are written.

    Raises:
        RunError: class `data`, with the code `not_an_archive`, `broken_archive`, `encrypted_archive`,
            `unsupported_compression`, `archive_too_large`, `unsafe_path`, `link_in_archive` or `duplicate_path`.
        OSError: the disk is full, or the archive cannot be read from it.
    """
    with archive.open("rb") as raw:
        start = raw.read(_BLOCK)
        raw.seek(0)
        target = _Target(directory, archive_bytes=archive.stat().st_size, max_bytes=max_bytes, max_files=max_files)
        with _corruption_named():
            if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
                _unpack_zip(raw, target, tick)
            else:
                _unpack_tar(raw, start, target, tick)


def _refuse(code: str, detail: str) -> NoReturn:
    raise RunError("data", code, detail)


@contextmanager
def _corruption_named() -> Iterator[None]:
    """Turn what the archive libraries raise about bad bytes into `broken_archive`; the disk's own errors pass."""
    try:
        yield
    except _CORRUPT as error:
        raise RunError("data", "broken_archive", f"the archive is truncated or corrupt: {shown(str(error))}") from error
    except OSError as error:
        # gzip and bz2 report bad data without a number; a zip's offset before its start is an invalid argument to seek.
        if error.errno not in (None, errno.EINVAL):
            raise
        raise RunError("data", "broken_archive", f"the archive is truncated or corrupt: {shown(str(error))}") from error


def safe_parts(name: str) -> tuple[str, ...]:
    """Return the components of a member's name, `.` and empty ones left out; `\\` separates as `/` does.

    Raises `RunError("data", "unsafe_path", …)` if the name is absolute, has a `..`, a control character or bytes that
    are not UTF-8, or is longer than a file system takes.
    """
    if any(ord(c) < 32 or 127 <= ord(c) < 160 or "\ud800" <= c <= "\udfff" for c in name):
        _refuse("unsafe_path", f"member '{shown(name)}': control characters and names that are not UTF-8 are refused")
    path = name.replace("\\", "/")
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        _refuse("unsafe_path", f"member '{shown(name)}': absolute paths are refused; pack with relative ones")
    parts = tuple(part for part in path.split("/") if part not in ("", "."))
    if ".." in parts:
        _refuse("unsafe_path", f"member '{shown(name)}': a path with '..' is refused")
    if len(path.encode()) > _MAX_PATH_BYTES or any(len(part.encode()) > _MAX_NAME_BYTES for part in parts):
        _refuse(
            "unsafe_path",
            f"member '{shown(name)}': too long a path; the most is {_MAX_PATH_BYTES} bytes, {_MAX_NAME_BYTES} a part",
        )
    return parts


class _Target:
    """The directory that is unpacked into, and the limits on what may be put there."""

    def __init__(self, directory: Path, *, archive_bytes: int, max_bytes: int, max_files: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._most_by_ratio = max(FREE_BYTES, MAX_RATIO * archive_bytes)
        self.archive_bytes = archive_bytes
        self.max_files = max_files
        self._bytes = 0
        self._entries = 0
        self._files: set[tuple[str, ...]] = set()
        self._folders: set[tuple[str, ...]] = {()}
        directory.mkdir(parents=True, exist_ok=True)

    def add_folder(self, name: str) -> None:
        """Make the folder `name`; a folder may be named more than once."""
        self._count(name)
        self._make_folder(safe_parts(name), name)

    def add_file(self, name: str, chunks: Iterator[bytes]) -> None:
        """Write the file `name`, counting every byte."""
        self._count(name)
        parts = safe_parts(name)
        if not parts:
            _refuse("unsafe_path", f"member '{shown(name)}': this is no name for a file")
        if parts in self._files or parts in self._folders:
            _refuse("duplicate_path", f"member '{shown(name)}': the archive holds this path twice")
        self._make_folder(parts[:-1], name)
        self._files.add(parts)
        with self._directory.joinpath(*parts).open("xb") as file:
            for chunk in chunks:
                self._bytes += len(chunk)
                if self._bytes > self._max_bytes:
                    limit = f"the limit is {self._max_bytes} bytes; upload less, or ask the operator to raise it"
                    _refuse(
                        "archive_too_large",
                        f"member '{shown(name)}': the archive unpacks to more than allowed: {limit}",
                    )
                self.check_ratio(self._bytes, name)
                file.write(chunk)

    def check_ratio(self, produced: int, name: str) -> None:
        """Refuse a bomb: `produced` bytes have come out of the archive so far."""
        if produced > self._most_by_ratio:
            _refuse(
                "archive_too_large",
                f"member '{shown(name)}': the archive of {self.archive_bytes} bytes unpacks to over {produced} bytes, "
                f"more than {MAX_RATIO} times its size",
            )

    def _count(self, name: str) -> None:
        self._entries += 1
        if self._entries > self.max_files:
            _refuse(
                "archive_too_large",
                f"member '{shown(name)}': the archive holds more files and folders than the limit, {self.max_files}",
            )

    def _make_folder(self, parts: tuple[str, ...], name: str) -> None:
        if parts in self._folders:
            return
        if parts in self._files:
            _refuse(
                "duplicate_path", f"member '{shown(name)}': '{shown('/'.join(parts))}' is a file and a folder as well"
            )
        self._make_folder(parts[:-1], name)
        self._count(name)
        self._folders.add(parts)
        self._directory.joinpath(*parts).mkdir(exist_ok=True)


# --- zip -------------------------------------------------------------------------------------------------------------


class _ZipFile(io.BufferedReader):
    """A zip's bytes. Refuses a table of contents beyond the limit before zipfile makes an object of every entry."""

    def __init__(self, raw: BinaryIO, max_files: int) -> None:
        super().__init__(io.FileIO(raw.fileno(), closefd=False))
        self._max_files = max_files

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as a file does; zipfile reads the whole table of contents at once."""
        if size is not None and size > _CHUNK + self._max_files * (_MAX_PATH_BYTES + 256):
            _refuse(
                "archive_too_large",
                f"the zip's table of contents has {size} bytes, too many for {self._max_files} files",
            )
        data = super().read(size)
        if len(data) > _CHUNK and data.count(_CENTRAL_ENTRY) > self._max_files:
            _refuse(
                "archive_too_large", f"the zip holds more than {self._max_files} files and folders, which is the limit"
            )
        return data


def _unpack_zip(raw: BinaryIO, target: _Target, tick: Tick) -> None:
    with zipfile.ZipFile(_ZipFile(raw, target.max_files)) as archive:
        members = archive.infolist()
        for number, info in enumerate(members):
            tick(number / len(members))
            # Not `filename`, which zipfile cuts at a NUL.
            name = info.orig_filename
            _check_zip_member(info, name)
            if name.replace("\\", "/").endswith("/"):
                target.add_folder(name)
            else:
                target.add_file(name, _zip_chunks(archive, info, number / len(members), tick))
    tick(1.0)


def _check_zip_member(info: zipfile.ZipInfo, name: str) -> None:
    if info.flag_bits & _ENCRYPTED:
        _refuse("encrypted_archive", f"member '{shown(name)}' is encrypted; pack without a password")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        _refuse("link_in_archive", f"member '{shown(name)}' is a link or a device; pack plain files only")
    # zipfile bounds what it holds in memory for these two only.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        _refuse(
            "unsupported_compression",
            f"member '{shown(name)}' is compressed with method {info.compress_type}; pack with deflate, or as tar.gz",
        )


def _zip_chunks(archive: zipfile.ZipFile, info: zipfile.ZipInfo, fraction: float, tick: Tick) -> Iterator[bytes]:
    with archive.open(info) as file:
        while chunk := file.read(_CHUNK):
            yield chunk
            tick(fraction)


# --- tar -------------------------------------------------------------------------------------------------------------


class _XzReader(io.RawIOBase):
    """Decompresses an xz file with a bound on memory, which `lzma.open` cannot set. One stream, as xz itself writes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)

    def readable(self) -> bool:
        """Say yes, as `io` asks."""
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        """Fill `buffer` as far as one step goes; 0 at the end."""
        while not self._decoder.eof:
            given = b""
            if self._decoder.needs_input:
                given = self._file.read(64 * 1024)
                if not given:
                    raise EOFError("the xz stream ends early")
            data = self._decoder.decompress(given, max_length=len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)
        return 0


class _TarStream:
    """What tarfile reads a tar through: forwards only, counted, with little room for headers.

    tarfile reads a header's long name or extended attributes into memory whole, at the length that the header states,
    so `read`, which only tarfile calls, is bounded for each member; the data of members goes through `chunks`.
    """

    def __init__(self, stream: BinaryIO, raw: BinaryIO, target: _Target, tick: Tick) -> None:
        self._stream, self._raw, self._target, self._tick = stream, raw, target, tick
        self._position = 0
        self._header_left = _MAX_HEADER_BYTES
        self.member = ""
        self.last_read = b""

    def next_member(self) -> None:
        """Give the next member its room for headers."""
        self._header_left = _MAX_HEADER_BYTES

    def tell(self) -> int:
        """Return the position in the tar, bytes."""
        return self._position

    def seek(self, position: int) -> None:
        """Skip ahead to `position`; tarfile never goes back when members are read in order."""
        if position < self._position:
            raise tarfile.ReadError("a member lies before its header")
        while self._position < position:
            if not self._take(min(_CHUNK, position - self._position)):
                raise tarfile.ReadError("unexpected end of data")

    def read(self, size: int) -> bytes:
        """Read `size` bytes of headers, fewer at the end."""
        if not 0 <= size <= self._header_left:
            raise tarfile.ReadError(f"a header after member '{shown(self.member)}' states {size} bytes of metadata")
        self._header_left -= size
        self.last_read = self._take(size)
        # Some releases of Python 3.11 match digits in extended headers in quadratic time (CVE-2024-6232).
        if size > _BLOCK and re.search(rb"[0-9]{256}", self.last_read):
            raise tarfile.ReadError(f"a header after member '{shown(self.member)}' holds a number of over 255 digits")
        return self.last_read

    def chunks(self, size: int) -> Iterator[bytes]:
        """Read one member's data."""
        end = self._position + size
        while self._position < end:
            chunk = self._take(min(_CHUNK, end - self._position))
            if not chunk:
                raise tarfile.ReadError(f"member '{shown(self.member)}' is cut off")
            yield chunk

    def drain(self) -> None:
        """Read what follows the last member, so that the compression's checksum is checked."""
        while self._take(_CHUNK):
            pass

    def _take(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._position += len(data)
        self._target.check_ratio(self._position, self.member)
        self._tick(self._raw.tell() / max(self._target.archive_bytes, 1))
        return data


def _decompressed(raw: BinaryIO, start: bytes) -> BinaryIO:
    raw.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
    if start.startswith(b"BZh"):
        return cast(BinaryIO, bz2.BZ2File(raw, "rb"))
    if start.startswith(b"\xfd7zXZ\0"):
        return cast(BinaryIO, io.BufferedReader(_XzReader(raw), _CHUNK))
    return raw


def _is_tar(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # public by name, absent from the stubs
        return True  # a tar without members
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def _unpack_tar(raw: BinaryIO, start: bytes, target: _Target, tick: Tick) -> None:
    if not _is_tar(_decompressed(raw, start).read(_BLOCK)):
        _refuse("not_an_archive", f"the content is not an archive of a known kind; send one of {KINDS}")
    stream = _TarStream(_decompressed(raw, start), raw, target, tick)
    with tarfile.open(fileobj=cast(BinaryIO, stream), mode="r:", errorlevel=2) as archive:
        while (info := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every member in memory
            stream.member = info.name
            _add_tar_member(info, stream, target)
            stream.next_member()
    # tarfile takes a damaged header for the end of the archive; the real end is a block of zeros.
    if len(stream.last_read) < _BLOCK:
        _refuse("broken_archive", f"the archive is truncated after member '{shown(stream.member)}': its end is missing")
    if any(stream.last_read):
        _refuse("broken_archive", f"the archive is corrupt after member '{shown(stream.member)}': a header is damaged")
    stream.drain()
    tick(1.0)


def _add_tar_member(info: tarfile.TarInfo, stream: _TarStream, target: _Target) -> None:
    if info.isdir():
        target.add_folder(info.name)
    elif info.isreg() and not info.issparse():
        if info.size < 0:
            _refuse("broken_archive", f"member '{shown(info.name)}' states a size of {info.size} bytes")
        target.add_file(info.name, stream.chunks(info.size))
    else:
        what = "a sparse file" if info.issparse() else "a link, a device or another special file"
        _refuse("link_in_archive", f"member '{shown(info.name)}' is {what}; pack plain files and folders only")
