"""The spans and log lines of an attempt in one process; tests/test_traces.py has those of all processes."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("opentelemetry.sdk.trace", reason="the extra `traces` is not installed")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from app import logs, traces
from tests.support.worker_world import World

Spans = Callable[[], list[ReadableSpan]]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "home")


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    """Trace in this process only; return the spans that have ended since the last call."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(traces, "_tracer", provider.get_tracer("tests"))

    def _ended() -> list[ReadableSpan]:
        found = list(exporter.get_finished_spans())
        exporter.clear()
        return found

    yield _ended
    provider.shutdown()


def made_in_a_trace(world: World, *script: list, **values: object) -> tuple:
    """Return a job, and the span of the request that created it."""
    with traces.span("request") as request:
        return world.job(*script, **values), request.get_span_context()


def test_an_attempt_is_a_part_of_the_request_that_made_the_row_and_knows_the_message_that_led_to_it(
    world: World, spans: Spans
) -> None:
    job, request = made_in_a_trace(world, ["finish", "succeeded", {}], request_id="my-request-1")
    with traces.span("another job's message") as message:
        world.work(job)

    *phases, attempt, _message = (span for span in spans() if span.name != "request")

    assert [phase.name for phase in phases] == ["prepare", "run", "store"]
    assert {phase.parent.span_id for phase in phases} == {attempt.context.span_id}
    assert (attempt.name, attempt.context.trace_id, attempt.parent.span_id) == (
        "job attempt", request.trace_id, request.span_id,
    )  # fmt: skip
    assert [link.context.span_id for link in attempt.links] == [message.get_span_context().span_id]
    assert dict(attempt.attributes) == {
        "defeat.kind": "job",
        "defeat.row": job.id,
        "defeat.attempt": 1,
        "defeat.request_id": "my-request-1",
        "defeat.outcome": "succeeded",
    }


def test_every_attempt_is_in_the_trace_with_what_became_of_it(tmp_path: Path, spans: Spans) -> None:
    world = World(tmp_path / "home", max_attempts=2)
    dies = ["raw", '{"type": "message", "level": "info", "code": "secret", "message": "a tenant\'s words"}\n']
    job, request = made_in_a_trace(world, dies)
    world.work(job)
    world.set(job, not_before=None)
    world.work(job)

    attempts = [span for span in spans() if span.name == "job attempt"]

    assert world.now(job).status == "failed"
    assert {attempt.context.trace_id for attempt in attempts} == {request.trace_id}
    told = [(attempt.attributes["defeat.attempt"], attempt.attributes["defeat.outcome"]) for attempt in attempts]
    assert told == [(1, "retrying"), (2, "failed")]
    assert {attempt.attributes["defeat.failure.code"] for attempt in attempts} == {"run_died"}
    assert {attempt.status.status_code for attempt in attempts} == {StatusCode.ERROR}


def test_an_exception_leaves_its_class_and_not_its_message(
    world: World, spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    def _broken(*_: object) -> None:
        raise RuntimeError("a tenant's words")

    monkeypatch.setattr("worker.tasks.jobs.JobHandler.upload", _broken)
    job, _request = made_in_a_trace(world, ["finish", "succeeded", {}])
    with pytest.raises(RuntimeError):
        world.work(job)
    ended = spans()
    assert {span.name: span.attributes.get("error.type") for span in ended}["job attempt"] == "RuntimeError"
    assert "words" not in "".join(span.to_json() for span in ended)


def test_a_row_that_no_trace_made_begins_one(world: World, spans: Spans) -> None:
    world.work(world.job(["finish", "succeeded", {}]))
    attempt = spans()[-1]
    assert (attempt.name, attempt.parent, list(attempt.links)) == ("job attempt", None, [])


def test_an_attempts_lines_name_its_span(world: World, spans: Spans, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("INFO")
    job, request = made_in_a_trace(world, ["finish", "succeeded", {}])
    world.work(job)
    lines = {line["event"]: line for line in map(json.loads, capsys.readouterr().err.splitlines())}
    ended = {span.name: span.context.span_id for span in spans()}
    assert lines["claimed"]["trace_id"] == f"{request.trace_id:032x}"
    assert lines["claimed"]["span_id"] == f"{ended['job attempt']:016x}"
    assert lines["run_started"]["span_id"] == f"{ended['run']:016x}"
