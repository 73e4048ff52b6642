"""Traces, as OpenTelemetry's own environment variables ask for them; without these there are none, and no cost.

What makes a request's spans is in FastAPI. Contrib's instrumentations are left out: SQLAlchemy's knows no 2.1, and
Celery's never ends the span of a message that is sent by its task's name alone, as ours are.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points, version
from typing import Any, Final

import structlog
from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.trace import ProxyTracerProvider, Span, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

log = structlog.get_logger(__name__)

TRACEPARENT_LENGTH: Final = 55
_FLUSH_S = 3.0
_PROTOCOLS = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_W3C = TraceContextTextMapPropagator()
_tracer = trace.get_tracer("defeat")


def configure(service: str) -> None:
    """Let this process export its spans, if the environment asks for it and nobody else has seen to it.

    `service` is its name where the environment gives none. What is wrong with the environment is logged: the service
    works without traces.
    """
    exporters = _exporters()
    if not exporters or not isinstance(trace.get_tracer_provider(), ProxyTracerProvider):
        return
    try:
        trace.set_tracer_provider(_provider(service, exporters))
    except ImportError as error:
        log.warning("traces_off", error=f"{error}; install defeat-service[traces]")
    except Exception as error:
        # Exporters and samplers are anybody's, and raise what they like.
        log.warning("traces_off", error=str(error))


def _variable(*names: str) -> str:
    """Return the first of these variables that is set and not empty, else the empty string."""
    return next((value for name in names if (value := os.environ.get(name, "").strip())), "")


def _exporters() -> list[str]:
    """Return the exporters that the environment asks for, by the names that packages give them."""
    if _variable("OTEL_SDK_DISABLED").lower() == "true":
        return []
    wanted = _variable("OTEL_TRACES_EXPORTER") or ("otlp" if _variable(*_ENDPOINTS) else "none")
    protocol = _variable("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    otlp = _PROTOCOLS.get(protocol, protocol)
    names = [name.strip() for name in wanted.split(",")]
    return [otlp if name == "otlp" else name for name in names if name not in ("", "none")]


def _provider(service: str, exporters: list[str]) -> trace.TracerProvider:
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    found = Resource.create({SERVICE_VERSION: version("defeat-service")})
    if str(found.attributes[SERVICE_NAME]).startswith("unknown_service"):
        found = found.merge(Resource({SERVICE_NAME: service}))
    provider = TracerProvider(resource=found, shutdown_on_exit=False)
    for name in exporters:
        known = entry_points(group="opentelemetry_traces_exporter", name=name)
        if not known:
            raise ImportError(f"no package that is installed has the exporter {name!r} of traces")
        provider.add_span_processor(BatchSpanProcessor(next(iter(known)).load()()))
    return provider


def flush() -> None:
    """Export what has not been yet: for a process that is about to end without running what Python has for its end.

    Returns after some seconds even where the collector does not answer: the exporter's own patience is longer than
    what processes are given to end.
    """
    provider: Any = trace.get_tracer_provider()
    if not isinstance(provider, ProxyTracerProvider):
        flushing = threading.Thread(target=provider.force_flush, name="traces", daemon=True)
        flushing.start()
        flushing.join(_FLUSH_S)


@contextmanager
def span(name: str, **options: Any) -> Iterator[Span]:
    """Trace what is done inside, or decorated; `options` are those of `Tracer.start_as_current_span`.

    Of an exception the span keeps the class alone: its message may hold what tenants have sent.
    """
    with _tracer.start_as_current_span(
        name, record_exception=False, set_status_on_exception=False, **options
    ) as current:
        try:
            yield current
        except Exception as error:
            current.set_attribute("error.type", type(error).__qualname__)
            current.set_status(StatusCode.ERROR)
            raise


def current_traceparent() -> str | None:
    """Return where we are, as W3C's `traceparent`; None outside of a trace."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier)
    return carrier.get("traceparent")


@contextmanager
def within(traceparent: str | None) -> Iterator[None]:
    """Make the span that `traceparent` names the current one, though it is another process's."""
    token = context.attach(context_of(traceparent))
    try:
        yield
    finally:
        context.detach(token)


def context_of(traceparent: str | None) -> Context:
    """Return the context that `traceparent` names; an empty one for None, and for what is no such thing."""
    return _W3C.extract({"traceparent": traceparent} if traceparent else {}, context=Context())
