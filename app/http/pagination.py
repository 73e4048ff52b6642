"""Keyset pagination on (created_at, id): the cost of a page does not grow with the list."""

import base64
import binascii
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Query
from pydantic import BaseModel
from sqlalchemy import Select, literal, tuple_
from sqlalchemy.orm import Session

from app.db import UTCDateTime
from app.errors import Invalid
from app.models import Checkpoint, Dataset, Job
from app.request_models import problem

Item = TypeVar("Item")
Row = TypeVar("Row", Dataset, Checkpoint, Job)


class Page(BaseModel, Generic[Item]):
    """One page of a list. Pass `next_cursor` as `after` to get the next page."""

    data: list[Item]
    has_more: bool
    next_cursor: str | None


class PageQuery(BaseModel):
    """The query parameters that every list has."""

    limit: int
    after: str | None


def page_query(
    limit: Annotated[int, Query(ge=1, le=100, description="Maximum number of items.")] = 20,
    after: Annotated[str | None, Query(max_length=300, description="`next_cursor` of the previous page.")] = None,
) -> PageQuery:
    """Read `?limit=&after=`."""
    return PageQuery(limit=limit, after=after)


def bad_cursor(cursor: str) -> Invalid:
    """Return the error for a cursor that this list did not return."""
    detail = f"{cursor[:80]!r} is not a cursor of this list; pass a page's next_cursor, or omit it for the first page"
    return Invalid(detail, code="bad_cursor", errors=[problem("query:after", "bad_cursor", detail)])


def encode_cursor(created_at: datetime, row_id: str) -> str:
    """Return the opaque cursor of the position after this row."""
    return base64.urlsafe_b64encode(json.dumps([created_at.isoformat(), row_id]).encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> tuple[datetime, str]:
    """Return (created_at, id) of a cursor. Raises `Invalid` (`bad_cursor`) for anything else."""
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        created_at, row_id = json.loads(text)
        moment = datetime.fromisoformat(created_at)
        # Convert to UTC here: for the first and the last year, the database's conversion would overflow.
        here = moment.astimezone(UTC)
    except (binascii.Error, ValueError, TypeError, OverflowError) as error:
        raise bad_cursor(cursor) from error
    if moment.tzinfo is None or not isinstance(row_id, str) or not row_id.replace("_", "").isalnum():
        raise bad_cursor(cursor)
    return here, row_id


def page_of(
    session: Session, statement: Select[Row], model: type[Row], query: PageQuery
) -> tuple[Sequence[Row], str | None]:
    """Return one page of `statement`, newest first, and the next page's cursor (None on the last)."""
    if query.after is not None:
        created_at, row_id = decode_cursor(query.after)
        here: Any = tuple_(literal(created_at, UTCDateTime()), literal(row_id))
        statement = statement.where(tuple_(model.created_at, model.id) < here)
    ordered = statement.order_by(model.created_at.desc(), model.id.desc()).limit(query.limit + 1)
    rows = session.scalars(ordered).all()
    if len(rows) <= query.limit:
        return rows, None
    last = rows[query.limit - 1]
    return rows[: query.limit], encode_cursor(last.created_at, last.id)
