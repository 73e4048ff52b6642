"""Structured logs: JSON lines for machines, coloured lines on a terminal."""

import logging
import sys

import structlog
from opentelemetry import trace


def _to_stderr(*_names: object) -> structlog.WriteLogger:
    # Asked for at each message: a stream kept from the start may have been replaced and closed since.
    return structlog.WriteLogger(sys.stderr)


def _add_span(_logger: object, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    current = trace.get_current_span().get_span_context()
    if current.is_valid:
        event["trace_id"] = trace.format_trace_id(current.trace_id)
        event["span_id"] = trace.format_span_id(current.span_id)
    return event


def configure(level: str) -> None:
    """Set up structlog for this process; `level` is DEBUG, INFO, WARNING or ERROR. Raises ValueError for another."""
    least = logging.getLevelNamesMapping().get(level.upper())
    if least is None:
        raise ValueError(f"log level {level!r} is unknown; use DEBUG, INFO, WARNING or ERROR")
    renderer: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer()]
        if sys.stderr.isatty()
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _add_span,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=_to_stderr,
        cache_logger_on_first_use=False,
    )


def current_request_id() -> str | None:
    """Return the id of the request that is served here and now; None outside of one."""
    found = structlog.contextvars.get_contextvars().get("request_id")
    return None if found is None else str(found)


def first_line(error: Exception) -> str:
    """Return what an error says first; its type's name if it says nothing. Drivers add their SQL and its values."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
