"""The dashboard's files, at URLs with a hash of all of them, so that browsers may cache them forever."""

import gzip
import hashlib
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Final

from fastapi import Response

from app.errors import NotFound

PLOTLY: Final = "plotly.min.js"
# Plotly's bundle adds an inline style for maps, which the Content-Security-Policy forbids, unless an element with this
# id exists. The dashboard shows no maps, so the page has an empty one.
PLOTLY_MAP_STYLE_ID: Final = "9f215cf04c5486422605d13261cb87401f4e7763b6296af81e98efbc0130da53"
CONTENT_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@cache
def _files() -> dict[str, Traversable]:
    """Return the files that are served, by name."""
    static = resources.files("app.dashboard") / "static"
    files = {file.name: file for file in static.iterdir() if _suffix(file.name) in CONTENT_TYPES}
    return {**files, PLOTLY: resources.files("plotly") / "package_data" / PLOTLY}


def _suffix(name: str) -> str:
    return name[name.rfind(".") :]


@cache
def version() -> str:
    """Return the hash in the files' URLs, which changes with any file's content."""
    digest = hashlib.sha256()
    for name, file in sorted(_files().items()):
        digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def url(name: str) -> str:
    """Return a file's URL; raises `KeyError` for an unknown file."""
    if name not in _files():
        raise KeyError(f"no asset {name!r}; known: {', '.join(sorted(_files()))}")
    return f"/assets/{version()}/{name}"


@cache
def _gzipped(name: str) -> bytes:
    # mtime 0: the same bytes in every process.
    return gzip.compress(_files()[name].read_bytes(), mtime=0)


def respond(wanted_version: str, name: str, accept_encoding: str) -> Response:
    """Return a file that browsers may cache; raises `NotFound` for another version or an unknown file."""
    if wanted_version != version() or name not in _files():
        raise NotFound(f"no file {name!r} in version {wanted_version!r} of the dashboard; reload the page")
    headers = {"Cache-Control": "public, max-age=31536000, immutable", "Vary": "Accept-Encoding"}
    if "gzip" in accept_encoding:
        return Response(
            _gzipped(name), media_type=CONTENT_TYPES[_suffix(name)], headers={**headers, "Content-Encoding": "gzip"}
        )
    return Response(_files()[name].read_bytes(), media_type=CONTENT_TYPES[_suffix(name)], headers=headers)
