"""The states of leased work and the legal moves between them. Any other move is a 409.

Jobs, datasets and checkpoints are all rows that a worker claims; each has its own states.
"""

from typing import Final

from app.errors import Conflict

# A job's states.
QUEUED: Final = "queued"
PREPARING: Final = "preparing"
RUNNING: Final = "running"
PAUSING: Final = "pausing"
PAUSED: Final = "paused"
CANCELLING: Final = "cancelling"
SUCCEEDED: Final = "succeeded"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"

# A dataset's and a checkpoint's states; `queued` and `failed` are shared with jobs.
AWAITING_UPLOAD: Final = "awaiting_upload"
CHECKING: Final = "checking"
READY: Final = "ready"
INVALID: Final = "invalid"

JOB_MOVES: Final[dict[str, frozenset[str]]] = {
    QUEUED: frozenset({PREPARING, PAUSED, CANCELLED, FAILED}),
    PREPARING: frozenset({PREPARING, RUNNING, PAUSING, CANCELLING, CANCELLED, SUCCEEDED, FAILED, QUEUED}),
    RUNNING: frozenset({PREPARING, PAUSING, CANCELLING, CANCELLED, SUCCEEDED, FAILED, QUEUED}),
    PAUSING: frozenset({PAUSED, CANCELLING, SUCCEEDED, FAILED}),
    PAUSED: frozenset({QUEUED, CANCELLED}),
    CANCELLING: frozenset({CANCELLED, SUCCEEDED, FAILED}),
    SUCCEEDED: frozenset(),
    # Their owner may have them tried once more; nobody else moves them.
    FAILED: frozenset({QUEUED}),
    CANCELLED: frozenset({QUEUED}),
}

ASSET_MOVES: Final[dict[str, frozenset[str]]] = {
    AWAITING_UPLOAD: frozenset({QUEUED}),
    QUEUED: frozenset({CHECKING, FAILED}),
    CHECKING: frozenset({CHECKING, READY, INVALID, FAILED, QUEUED}),
    READY: frozenset(),
    INVALID: frozenset(),
    FAILED: frozenset(),
}

JOB_TERMINAL: Final = frozenset({SUCCEEDED, FAILED, CANCELLED})
ASSET_TERMINAL: Final = frozenset(state for state, moves in ASSET_MOVES.items() if not moves)


def check_move(moves: dict[str, frozenset[str]], current: str, wanted: str, *, what: str) -> None:
    """Raise `Conflict` unless `current -> wanted` is in `moves`; the message names where `what` could go."""
    if wanted not in moves[current]:
        choices = ", ".join(sorted(moves[current])) or "nothing: it has ended"
        raise Conflict(f"{what} is {current} and cannot become {wanted} (from here it can become: {choices})")
