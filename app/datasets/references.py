"""`file://` references to datasets: which the operator allows."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from app.errors import Invalid
from app.request_models import problem
from app.settings import Settings


class ReferenceNotAllowed(Invalid):
    """The reference does not lead to something inside the operator's dataset roots."""

    code, title = "reference_not_allowed", "Reference not allowed"


def check_reference(settings: Settings, uri: str) -> str:
    """Return the `file://` URI of an existing directory or file inside `dataset_roots`, symbolic links followed.

    Raises `ReferenceNotAllowed`. What lies outside the roots gets one answer, whether it exists or not.
    """
    if not settings.dataset_roots:
        raise _refuse("this installation allows no references: its operator sets DEFEAT_DATASET_ROOTS; upload instead")
    roots = [root.expanduser().resolve() for root in settings.dataset_roots]
    allowed = ", ".join(root.as_uri() for root in roots)
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise _refuse(f"{uri!r} is not a URI; references may lead into: {allowed}") from error
    path = unquote(parts.path)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise _refuse(f"{uri!r} is not a file:///path URI; references may lead into: {allowed}")
    if not path.startswith("/") or "\x00" in path:
        raise _refuse(f"{uri!r} holds no absolute path; references may lead into: {allowed}")
    try:
        resolved = Path(path).resolve()
        inside = any(resolved.is_relative_to(root) for root in roots)
        there = inside and (resolved.is_dir() or resolved.is_file())
    except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long, a folder we may not read
        raise _refuse(f"{uri!r} cannot be followed; references may lead into: {allowed}") from error
    if not inside:
        raise _refuse(f"{uri!r} does not lie in an allowed directory; references may lead into: {allowed}")
    if not there:
        raise _refuse(f"{uri!r} is neither a directory nor a file")
    return Path(path).as_uri()


def _refuse(detail: str) -> ReferenceNotAllowed:
    return ReferenceNotAllowed(detail, errors=[problem("/source/uri", ReferenceNotAllowed.code, detail)])
