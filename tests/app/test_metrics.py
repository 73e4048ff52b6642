"""What an API process serves to Prometheus, on its own port."""

import socket
import urllib.request
from datetime import timedelta

import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import update
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from app import metrics
from app.db import Database, utcnow
from app.metrics import Kept, ServiceCollector
from app.models import Dataset, Job
from app.ops.sweep import sweep
from app.settings import Settings
from tests.app.conftest import ONE_DATABASE, RecordingQueue, Tenant
from tests.app.workers.test_workers import worker
from tests.support import rows as seed

Samples = dict[tuple[str, tuple[str, ...]], float]


def read(text: str) -> Samples:
    """Return each sample by its name and its labels' values."""
    families = text_string_to_metric_families(text)
    return {
        (sample.name, tuple(sample.labels.values())): sample.value for found in families for sample in found.samples
    }


def collected(collector: ServiceCollector) -> Samples:
    samples = (sample for family in collector.collect() for sample in family.samples)
    return {(sample.name, tuple(sample.labels.values())): sample.value for sample in samples}


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scrape(port: int) -> Samples:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return read(answer.read().decode())


def test_rows_by_status_and_the_longest_wait(database: Database, settings: Settings, alice: Tenant) -> None:
    dataset = seed.dataset(database, alice.id)
    for status in ("queued", "queued", "running", "succeeded"):
        seed.job(database, alice.id, dataset.id, status=status)
    with database.write() as session:
        session.execute(update(Job).values(created_at=utcnow() - timedelta(seconds=100)))
        session.execute(update(Dataset).values(size_bytes=7))

    samples = collected(ServiceCollector(database, settings))

    assert samples["defeat_rows", ("job", "queued", "")] == 2
    assert samples["defeat_rows", ("job", "running", "")] == 1
    assert samples["defeat_rows", ("job", "preparing", "")] == 0
    assert ("defeat_rows", ("job", "succeeded", "")) not in samples  # there may be millions
    assert samples["defeat_queue_depth", ("jobs", "")] == 2
    assert samples["defeat_queue_depth", ("checks", "")] == 0
    assert samples["defeat_queue_oldest_seconds", ("jobs",)] == pytest.approx(100, abs=20)
    assert samples["defeat_queue_oldest_seconds", ("checks",)] == 0
    assert samples["defeat_stored_bytes", ("dataset",)] == 7
    assert samples["defeat_database_up", ()] == 1
    assert 0 < samples["defeat_disk_free_bytes", ()] <= samples["defeat_disk_bytes", ()]


def test_labels_are_those_that_workers_have(database: Database, settings: Settings, alice: Tenant) -> None:
    dataset = seed.dataset(database, alice.id)
    seed.dataset(database, alice.id, status="queued")
    for name, labels in (("one", ["a100", "lab"]), ("two", ["lab"]), ("three", [])):
        seed.add(database, worker(name, labels=labels))
    for label in ("lab", "lab", None, "b\n{x}", *(f"made-up-{number}" for number in range(20))):
        seed.job(database, alice.id, dataset.id, worker_label=label)
    seed.job(database, alice.id, dataset.id, worker_label="lab", status="paused")

    samples = collected(ServiceCollector(database, settings))

    depth = {labels: value for (name, labels), value in samples.items() if name == "defeat_queue_depth"}
    assert depth == {
        ("checks", ""): 1,
        ("jobs", ""): 1,
        ("jobs", "a100"): 0,  # nothing waits, and the series is there
        ("jobs", "lab"): 2,
        ("jobs", "other"): 21,
    }
    assert samples["defeat_rows", ("job", "paused", "lab")] == 1
    assert samples["defeat_rows", ("job", "queued", "other")] == 21
    kinds = {(labels[0], labels[2]) for name, labels in samples if name == "defeat_rows"}
    assert kinds == {("job", label) for label in ("", "a100", "lab", "other")} | {("dataset", ""), ("checkpoint", "")}


@ONE_DATABASE
def test_a_database_that_is_away_is_a_metric_too(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def _away(_session: object) -> list:
        raise OperationalError("SELECT 1", {}, Exception("connection refused"))

    monkeypatch.setattr(metrics, "_queue_families", _away)
    samples = collected(ServiceCollector(database, settings))
    assert samples["defeat_database_up", ()] == 0
    assert not any(name.startswith("defeat_rows") for name, _ in samples)


def test_a_value_is_asked_for_again_only_when_it_is_old() -> None:
    asked: list[int] = []
    kept = Kept(lambda: asked.append(1) or len(asked), 3600)
    assert [kept.get(), kept.get()] == [1, 1]
    always = Kept(lambda: asked.append(1) or len(asked), -1)
    assert [always.get(), always.get()] == [2, 3]


@ONE_DATABASE
def test_the_api_serves_them_on_a_port_of_their_own(app: FastAPI, settings: Settings, alice: Tenant, port: int) -> None:
    settings.metrics_port = port
    with TestClient(app) as client:
        for path in ("/v1/jobs/job_1", "/v1/jobs/job_2", "/no/such/thing"):
            client.get(path, headers=alice.headers)
        client.request("BREW", "/v1/jobs", headers=alice.headers)
        samples = scrape(port)
        assert client.get("/metrics").status_code == 404

    count = "defeat_http_request_duration_seconds_count"
    assert samples[count, ("GET", "/v1/jobs/{job_id}", "404")] >= 2
    assert samples[count, ("GET", "none", "404")] >= 1
    assert any(name == count and labels[0] == "other" for name, labels in samples)
    assert not any("job_1" in "".join(labels) for _, labels in samples)
    assert samples["defeat_database_up", ()] == 1
    with pytest.raises(OSError, match="refused"):
        scrape(port)


@ONE_DATABASE
def test_none_are_served_unless_asked_for(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "start_http_server", None)
    assert settings.metrics_port is None
    metrics.serve(CollectorRegistry(), settings)()


@ONE_DATABASE
def test_a_port_that_is_taken_is_an_error(settings: Settings, port: int) -> None:
    settings.metrics_port = port
    stop = metrics.serve(CollectorRegistry(), settings)
    with pytest.raises(OSError, match="in use"):
        metrics.serve(CollectorRegistry(), settings)
    stop()


def test_sweeps_are_counted(database: Database, settings: Settings, alice: Tenant) -> None:
    seed.job(database, alice.id, seed.dataset(database, alice.id).id)
    before = metrics.ROWS_RESENT.labels("jobs")._value.get()
    assert sweep(database, RecordingQueue(), settings) == 1
    assert metrics.ROWS_RESENT.labels("jobs")._value.get() == before + 1
