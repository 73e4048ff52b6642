"""The context of an attempt in logs and traces: the row's ids on every log line, and a span for the whole."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import structlog
from opentelemetry import trace
from opentelemetry.trace import Link, SpanKind, StatusCode

from app import traces
from app.models import Leased


@contextmanager
def attempt(row: Leased) -> Iterator[None]:
    """Trace the body as an attempt at the row, and add the row's ids to its log lines.

    The span belongs to the trace of the request that created the row, however long ago that was. The message that woke
    this worker may have been sent for another row, so it is a link.
    """
    kind = type(row).__name__.lower()
    attributes = {"defeat.kind": kind, "defeat.row": row.id, "defeat.attempt": row.attempt}
    if row.request_id is not None:
        attributes["defeat.request_id"] = row.request_id
    woken_by = trace.get_current_span().get_span_context()
    with (
        structlog.contextvars.bound_contextvars(row=row.id, attempt=row.attempt, request_id=row.request_id),
        traces.span(
            f"{kind} attempt",
            context=traces.context_of(row.traceparent),
            kind=SpanKind.CONSUMER,
            links=[Link(woken_by)] if woken_by.is_valid else [],
            attributes=attributes,
        ),
    ):
        yield


def ended(how: str, failure: Mapping[str, Any] | None = None) -> None:
    """Set the outcome in the attempt's span; of a failure only class and code, because tenants write the rest."""
    span = trace.get_current_span()
    span.set_attribute("defeat.outcome", how)
    if failure is not None:
        span.set_attributes({"defeat.failure.class": failure["class"], "defeat.failure.code": failure["code"]})
        span.set_status(StatusCode.ERROR, failure["code"])
