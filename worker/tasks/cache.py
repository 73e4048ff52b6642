"""Unpacked datasets on this machine, so that several jobs on one dataset fetch it once."""

import os
import re
import secrets
import shutil
import tarfile
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import structlog

from app.stack.processes import Locked, locked
from app.storage import ObjectMissing, Storage
from defeat.engine.report import RunError

log = structlog.get_logger(__name__)

KEPT: Final = 5
# The members that `defeat.engine.data.canonical` packs; not imported, because only runs may import it.
_MEMBER = re.compile(r"dataset\.json|images/[0-9a-f]{64}\.[a-z]{3,4}")
_CHUNK_BYTES = 1024 * 1024
_CONTENT_HASH = re.compile(r"sha256:([0-9a-f]{64})")


def _unpack(tar: Path, directory: Path) -> None:
    """Unpack the tar of a canonical dataset into `directory`, which must not exist.

    It takes about half the time of tarfile's `extractall`, which checks much that the names of these files rule out.

    Raises `tarfile.TarError` for any member that is not `dataset.json` or an image file.
    """
    (directory / "images").mkdir(parents=True)
    with tarfile.open(tar, "r:") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isreg() and not member.issparse() else None
            if content is None or not _MEMBER.fullmatch(member.name):
                raise tarfile.TarError(f"{member.name[:200]!r} does not belong in a dataset")
            with content, (directory / member.name).open("wb") as file:
                shutil.copyfileobj(content, file, _CHUNK_BYTES)


class DatasetCache:
    """The most recently used datasets in `directory`, each in a folder named by its content hash.

    Any number of workers may use it at once. A shared lock protects a dataset while it is in use; only datasets without
    a lock are removed.
    """

    def __init__(self, directory: Path, storage: Storage) -> None:
        self._directory = directory
        self._storage = storage

    def use(self, content_hash: str, key: str, cleanup: ExitStack) -> Path:
        """Return the dataset's directory, fetched from the object `key` if it is not cached; `cleanup` holds its lock.

        Raises `OSError` for what a repetition may solve, and `RunError` for a malformed content hash and for an object
        that is missing or damaged.
        """
        found = _CONTENT_HASH.fullmatch(content_hash)
        if found is None:
            raise RunError("infra", "bad_content_hash", f"{content_hash!r} is not `sha256:` and 64 hexadecimal digits")
        path = self._directory / found[1]
        self._directory.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(locked(path.with_suffix(".lock"), shared=True))
            except Locked as error:
                raise OSError(f"dataset {content_hash} is being removed from this machine's cache") from error
            if not path.is_dir():
                self._fetch(key, path)
            os.utime(path)
            cleanup.enter_context(held.pop_all())
        self._evict()
        return path

    def _fetch(self, key: str, path: Path) -> None:
        beside = path.with_suffix(f".{secrets.token_hex(8)}.part")
        tar = beside.with_suffix(".tar")
        try:
            self._storage.get_file(key, tar)
            _unpack(tar, beside)
            tar.unlink()
            self._put_in_place(beside, path)
        except ObjectMissing as error:
            raise RunError(
                "infra", "object_missing", f"the dataset is no longer in the object store ({key})"
            ) from error
        except tarfile.TarError as error:
            raise RunError("infra", "object_broken", f"the stored dataset {key} cannot be unpacked: {error}") from error
        finally:
            tar.unlink(missing_ok=True)
            shutil.rmtree(beside, ignore_errors=True)

    @staticmethod
    def _put_in_place(beside: Path, path: Path) -> None:
        try:
            beside.rename(path)
        except OSError:
            if not path.is_dir():  # else another worker put the same content in place first
                raise

    def _evict(self) -> None:
        """Remove the datasets that were used longest ago, and partial ones from workers that were killed."""
        entries = [entry for entry in self._directory.iterdir() if entry.suffix != ".lock"]
        whole = sorted((entry for entry in entries if not entry.suffix), key=lambda entry: -entry.stat().st_mtime)
        for entry in [*(entry for entry in entries if entry.suffix), *whole[KEPT:]]:
            try:
                with locked(self._directory / f"{entry.name.split('.')[0]}.lock"):
                    log.info("dataset_evicted", entry=entry.name)
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
            except Locked:
                continue
