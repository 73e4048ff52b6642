"""Packs a directory into an uncompressed tar; the same files give the same bytes."""

import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from defeat.client.errors import InvalidInput


def write_tar(directory: Path, target: BinaryIO) -> None:
    """Write every file below `directory` to `target`, sorted by path, without times, owners or modes.

    Not compressed, because images are already. Names that begin with a dot are left out. A symbolic link is stored as
    the file it points to, which must be in `directory` too: a link in a directory from elsewhere must not send other
    files of this machine.

    Raises `InvalidInput` for a link that points outside or nowhere, for special files, and for an empty directory.
    """
    root = directory.resolve()
    empty = True
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in _files(root, root, frozenset({root})):
            empty = False
            with path.open("rb") as file:
                entry = tarfile.TarInfo(path.relative_to(root).as_posix())
                entry.size = os.fstat(file.fileno()).st_size
                tar.addfile(entry, file)
    if empty:
        raise InvalidInput(f"{directory} contains no files; pass a directory with images and their annotations")


def _files(directory: Path, root: Path, above: frozenset[Path]) -> Iterator[Path]:
    """Yield the files below `directory` by path; `above` are its parent directories, to detect loops of links."""
    for path in sorted(directory.iterdir()):
        if path.name.startswith("."):
            continue
        real = _resolved(path, root)
        if real.is_dir():
            if real in above:
                raise InvalidInput(f"{path} is a link to one of its parent directories; remove it")
            yield from _files(path, root, above | {real})
        elif stat.S_ISREG(real.stat().st_mode):
            yield path
        else:
            raise InvalidInput(f"{path} is neither a file nor a directory; remove it")


def _resolved(path: Path, root: Path) -> Path:
    try:
        real = path.resolve(strict=True)
    except PermissionError:
        raise
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError before Python 3.13
        raise InvalidInput(f"{path} is a link to a file that does not exist; remove it") from error
    if not real.is_relative_to(root):
        raise InvalidInput(f"{path} is a link to {real}, outside {root}; replace it with a copy of that file")
    return real
