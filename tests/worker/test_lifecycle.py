"""A job's life cycle as its owner sees it: requested over HTTP, run by the real supervisor."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from app.keys.service import create_key
from app.main import create_app
from app.models import Job
from app.settings import Settings
from app.states import JOB_TERMINAL
from tests.app.conftest import RecordingQueue
from tests.support.waiting import until
from tests.support.worker_world import World

SAVING = [["until_told"], ["checkpoint", "a.pt", "saved"], ["finish", "cancelled", {}]]
BEGUN = ["event", "progress", "teacher", {"fraction": 0.1}]
METRIC = ["event", "metrics", "student", {"step": 1, "epoch": 0.1, "values": {"loss/total": 1.0}}]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "home", max_attempts=2, retry_backoff_s=0.001)


@pytest.fixture
def api(world: World) -> Iterator[TestClient]:
    values = {**world.settings.model_dump(), "secret": SecretStr("a secret for tests only"), "sweep_s": 3600}
    app = create_app(Settings(**values))
    with world.database.write() as session:
        row, key = create_key(session, app.state.settings, "lab", "test")
    world.tenant_id = row.tenant_id
    with TestClient(app, headers={"Authorization": f"Bearer {key}"}) as client:
        app.state.queue = RecordingQueue()
        yield client


def status(api: TestClient, job: Job) -> str:
    return api.get(f"/v1/jobs/{job.id}").json()["status"]


def ask(api: TestClient, job: Job, verb: str, body: object = None) -> str:
    answer = api.post(f"/v1/jobs/{job.id}/{verb}", json=body)
    assert answer.status_code == 202, answer.text
    return answer.json()["status"]


def go_on(world: World, job: Job, *script: list) -> None:
    world.set(job, spec={**job.spec, "script": list(script)})
    world.work(job)


def test_paused_resumed_lost_and_finished(world: World, api: TestClient) -> None:
    job = world.job(BEGUN, METRIC, *SAVING)
    with world.working(job):
        until(lambda: status(api, job) == "running")
        assert ask(api, job, "pause") == "pausing"
        assert ask(api, job, "pause") in {"pausing", "paused"}
    assert status(api, job) == "paused"
    assert ask(api, job, "resume") == "queued"
    go_on(world, job, ["copy_request", "request.json"], METRIC, ["exit", 7])
    assert status(api, job) == "queued"
    world.set(job, not_before=None)
    go_on(world, job, ["copy_request", "request.json"], METRIC, ["finish", "succeeded", {}])
    shown = api.get(f"/v1/jobs/{job.id}").json()
    assert (shown["status"], shown["attempt"], shown["not_before"]) == ("succeeded", 3, None)
    resumed = api.get(f"/v1/jobs/{job.id}/artifacts/request.json").json()
    assert resumed["inputs"]["resume"] is not None
    codes = [event["code"] for event in api.get(f"/v1/jobs/{job.id}/events").json()["data"]]
    assert codes == [
        "claimed", "pausing", "paused", "unpaused", "resumed", "retrying", "resumed", "succeeded",
    ]  # fmt: skip
    assert len(api.get(f"/v1/jobs/{job.id}/metrics").json()["data"]) == 1


@pytest.mark.parametrize(("start", "kept"), [(None, True), ("checkpoint", True), ("beginning", False)])
def test_cancelled_and_tried_again(world: World, api: TestClient, start: str | None, kept: bool) -> None:
    job = world.job(BEGUN, METRIC, *SAVING)
    with world.working(job):
        until(lambda: status(api, job) == "running")
        assert ask(api, job, "cancel") == "cancelling"
    assert status(api, job) == "cancelled"
    assert ask(api, job, "retry", {"from": start}) == "queued"
    assert len(api.get(f"/v1/jobs/{job.id}/metrics").json()["data"]) == kept
    assert [row["name"] for row in api.get(f"/v1/jobs/{job.id}/artifacts").json()["data"]] == ["log.txt"]
    go_on(world, job, ["copy_request", "request.json"], ["finish", "succeeded", {}])
    request = api.get(f"/v1/jobs/{job.id}/artifacts/request.json").json()
    assert (request["inputs"]["resume"] is not None) == kept
    assert request["attempt"] == 2
    assert status(api, job) in JOB_TERMINAL


def test_given_up_and_tried_again_with_a_clean_slate(world: World, api: TestClient) -> None:
    job = world.job(["exit", 7])
    for _ in range(2):
        world.work(job)
        world.set(job, not_before=None)
    assert api.get(f"/v1/jobs/{job.id}").json()["failure"]["class"] == "infra"
    assert ask(api, job, "retry") == "queued"
    world.work(job)
    assert status(api, job) == "queued"  # one failure does not end it
    world.set(job, not_before=None)
    go_on(world, job, ["finish", "succeeded", {}])
    assert status(api, job) == "succeeded"
