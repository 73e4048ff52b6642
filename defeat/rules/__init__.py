"""Rules that a job's spec must keep, as the service checks them when it is sent and the engine before it trains.

Nothing here imports torch, pydantic, the engine or the service. Functions take plain values and return `Finding`s: the
service makes entries of a problem document of them, the engine a `RunError`.
"""

from dataclasses import dataclass

Path = tuple[object, ...]
"""Keys and indices that lead to a value in a job's spec."""

MAX_FINDINGS = 100
"""Maximum number of findings that one rule returns: a spec of a megabyte can break a rule thousands of times."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One mistake in a job's spec.

    Attributes:
        path: the value that is wrong.
        code: stable, the same from the service and from the engine.
        detail: what is wrong, which value, and what would do.
    """

    path: Path
    code: str
    detail: str


def show(value: object) -> str:
    """Return a value as an error message shows it: JSON-like and at most about 80 characters."""
    text = (
        {True: "true", False: "false"}[value] if isinstance(value, bool) else "null" if value is None else repr(value)
    )
    return text if len(text) <= 80 else f"{text[:77]}…"
