"""`Idempotency-Key`: the same POST sent twice creates one resource and gets the same answer.

The key is written in the transaction that creates the resource, so either both are stored or neither is. The database
makes a second request with the key wait for the first one's commit; it then replays the first one's answer. A request
that failed leaves no key.
"""

import hashlib
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Annotated, Any, TypeVar

from fastapi import Header, Response
from pydantic import BaseModel
from sqlalchemy import delete, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app.db import utcnow
from app.errors import Invalid, ServiceError
from app.http.auth import Caller
from app.models import IdempotencyKey

KEPT = timedelta(hours=24)

Output = TypeVar("Output", bound=BaseModel)

IdempotencyHeader = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        max_length=200,
        min_length=1,
        pattern=r"^[\x21-\x7e]+$",
        description="Any unique text, such as a UUID. The same key with the same body replays the first answer "
        "for 24 h.",
    ),
]


class KeyReused(ServiceError):
    """The key was sent before with another body."""

    status, code, title = 422, "idempotency_key_reused", Invalid.title


def once(
    session: Session,
    caller: Caller,
    response: Response,
    *,
    route: str,
    key: str | None,
    body: object,
    output: type[Output],
    create: Callable[[], Output],
) -> Output:
    """Return `create()`, or what it returned when this caller sent this key to this route before.

    `body` is what must be the same, as JSON values. Raises `KeyReused` if the key was sent before with another body. A
    replay carries the header `Idempotent-Replayed: true`.
    """
    if key is None:
        return create()
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    identity = {"tenant_id": caller.tenant_id, "route": route, "key": key}
    if not _first(session, identity | {"body_sha256": digest, "created_at": utcnow()}):
        row = session.get_one(IdempotencyKey, identity)
        if row.body_sha256 != digest:
            raise KeyReused(f"Idempotency-Key {key!r} was sent before with another body; use a new key")
        response.headers["Idempotent-Replayed"] = "true"
        return output.model_validate(row.response)
    created = create()
    answer = created.model_dump(mode="json", by_alias=True)
    session.execute(update(IdempotencyKey).filter_by(**identity).values(response=answer))
    return created


def _first(session: Session, values: dict[str, Any]) -> bool:
    """Insert the key; return False if it exists, after waiting for a transaction that is just inserting it."""
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    statement = insert(IdempotencyKey).values(values).on_conflict_do_nothing().returning(IdempotencyKey.key)
    return session.scalar(statement) is not None


def forget_old(session: Session) -> None:
    """Delete the keys that are older than 24 hours."""
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < utcnow() - KEPT))
