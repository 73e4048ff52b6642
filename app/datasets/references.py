"""`file://` references to datasets, limited to the directories that the operator allows."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from app.errors import Invalid
from app.request_models import problem
from app.settings import Settings


class ReferenceNotAllowed(Invalid):
    """The reference is not a file or directory inside the operator's dataset roots."""

    code, title = "reference_not_allowed", "Reference not allowed"


def check_reference(settings: Settings, uri: str) -> str:
    """Return the `file://` URI of an existing directory or file inside `dataset_roots`, symbolic links followed.

    Raises `ReferenceNotAllowed`, the same for a path outside the roots whether it exists or not.
    """
    if not settings.dataset_roots:
        raise _rejected(
            "this installation allows no references; upload the data, or ask the operator to set DEFEAT_DATASET_ROOTS"
        )
    roots = [root.expanduser().resolve() for root in settings.dataset_roots]
    allowed = ", ".join(root.as_uri() for root in roots)
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise _rejected(f"{uri!r} is not a URI; allowed are paths in: {allowed}") from error
    path = unquote(parts.path)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise _rejected(f"{uri!r} is not a file:///path URI; allowed are paths in: {allowed}")
    if not path.startswith("/") or "\x00" in path:
        raise _rejected(f"{uri!r} has no absolute path; allowed are paths in: {allowed}")
    try:
        resolved = Path(path).resolve()
        inside = any(resolved.is_relative_to(root) for root in roots)
        there = inside and (resolved.is_dir() or resolved.is_file())
    except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long, a directory without permission
        raise _rejected(f"{uri!r} cannot be resolved; allowed are paths in: {allowed}") from error
    if not inside:
        raise _rejected(f"{uri!r} is not in an allowed directory; allowed are paths in: {allowed}")
    if not there:
        raise _rejected(f"{uri!r} is neither a file nor a directory of the server")
    return Path(path).as_uri()


def _rejected(detail: str) -> ReferenceNotAllowed:
    return ReferenceNotAllowed(detail, errors=[problem("/source/uri", ReferenceNotAllowed.code, detail)])
