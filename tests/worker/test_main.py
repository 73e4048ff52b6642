"""Real workers on a real broker."""

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.models import Job, Worker
from app.queue.messages import BROKER_ERRORS, Answer, Queue
from app.stack.embedded import broker_binary, broker_command
from app.stack.processes import dies_with_parent
from tests.support.waiting import until
from tests.support.worker_world import World, alive

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("w"), lease_s=2.0)


@pytest.fixture
def start(world: World) -> Iterator[Start]:
    """Start a process in the world's environment; it is killed after the test."""
    processes: list[subprocess.Popen[bytes]] = []
    settings = {"DEFEAT_HOME": str(world.home), "DEFEAT_LEASE_S": "2", "DEFEAT_SWEEP_S": "0.3"}
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_URL")}

    def _start(*command: str, **more: str) -> "subprocess.Popen[bytes]":
        env = kept | settings | more
        with (world.home / "processes.log").open("ab") as output:
            processes.append(
                subprocess.Popen(command, stdout=output, stderr=output, env=env, preexec_fn=dies_with_parent())
            )
        return processes[-1]

    yield _start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def queue(world: World, start: Start) -> Iterator[Queue]:
    start(*broker_command(broker_binary(), directory=world.home, socket_path=world.settings.broker_socket))
    queue = Queue(world.settings.redis_url)

    def _answers() -> bool:
        try:
            queue.ping()
        except BROKER_ERRORS:
            return False
        return True

    until(_answers)
    yield queue
    queue.close()


def start_worker(start: Start, name: str, **environment: str) -> "subprocess.Popen[bytes]":
    command = ("-m", "tests.support.scripted_worker", "--queues", "jobs", "--name", name)
    return start(sys.executable, *command, **environment)


def registered(world: World) -> list[str]:
    return sorted(worker.name.partition("@")[0] for worker in world.all(Worker))


def test_a_worker_that_is_told_to_end_hands_its_job_back(
    world: World, queue: Queue, start: Start, tmp_path: Path
) -> None:
    pid, go = tmp_path / "pid", tmp_path / "go"
    steps = [["helper", str(pid)], ["event", "progress", "teacher", {"fraction": 0.1}]]
    job = world.job(*steps, ["until_told"], ["checkpoint", "a.pt", "saved"], ["finish", "cancelled", {}])
    worker = start_worker(start, "one")
    queue.send(type(job), job.id)
    until(lambda: world.now(job).status == "running")

    worker.send_signal(signal.SIGTERM)

    worker.wait(20)
    row = world.now(job)
    assert (row.status, row.attempt, row.failed_attempts, row.lease_owner) == ("queued", 1, 0, None)
    assert world.content(row.resume_key) == b"saved"
    until(lambda: not alive(int(pid.read_text())))

    go.touch()
    world.set(job, spec={**job.spec, "script": [["wait_for", str(go)], ["finish", "succeeded", {}]]})
    start_worker(start, "two")  # its sweep sends the message
    until(lambda: world.now(job).status == "succeeded")
    assert world.now(job).attempt == 2


def draining(world: World, queue: Queue, start: Start, *last: list) -> "tuple[Job, subprocess.Popen[bytes]]":
    """Return a job in work, and its worker, which drains."""
    job = world.job(["event", "progress", "teacher", {"fraction": 0.1}], *last)
    worker = start_worker(start, "one")
    queue.send(type(job), job.id)
    until(lambda: world.now(job).status == "running")
    worker.send_signal(signal.SIGUSR2)
    until(lambda: [row.draining for row in world.all(Worker)] == [True])
    return job, worker


def test_a_worker_that_drains_finishes_and_takes_nothing_new(
    world: World, queue: Queue, start: Start, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    job, worker = draining(world, queue, start, ["wait_for", str(go)], ["finish", "succeeded", {}])
    other = world.job(["finish", "succeeded", {}])
    queue.send(type(other), other.id)
    go.touch()
    assert worker.wait(20) == 0
    assert (world.now(job).status, world.now(job).attempt) == ("succeeded", 1)
    assert (world.now(other).status, world.now(other).attempt) == ("queued", 0)


def test_a_worker_that_drains_still_hands_over_when_it_is_told_to_end(world: World, queue: Queue, start: Start) -> None:
    saved = [["until_told"], ["checkpoint", "a.pt", "saved"], ["finish", "cancelled", {}]]
    job, worker = draining(world, queue, start, *saved)
    worker.send_signal(signal.SIGTERM)
    worker.wait(20)
    row = world.now(job)
    assert (row.status, row.attempt, row.failed_attempts, row.lease_owner) == ("queued", 1, 0, None)
    assert world.content(row.resume_key) == b"saved"


def test_a_worker_that_is_killed_loses_no_job(world: World, queue: Queue, start: Start, tmp_path: Path) -> None:
    job = world.job(
        ["event", "progress", "teacher", {"fraction": 0.1}],
        ["checkpoint", "a.pt", "saved"],
        ["wait_for", str(tmp_path / "go")],
        ["finish", "succeeded", {}],
    )
    first = start_worker(start, "one")
    queue.send(type(job), job.id)
    until(lambda: world.now(job).resume_key)

    first.kill()
    (tmp_path / "go").touch()
    start_worker(start, "two")

    until(lambda: world.now(job).status == "succeeded")
    assert world.now(job).attempt == 2
    assert world.codes(job) == ["claimed", "resumed", "succeeded"]


def test_a_worker_takes_no_message_that_it_cannot_work_on(
    world: World, queue: Queue, start: Start, tmp_path: Path
) -> None:
    blocking = [["event", "progress", "teacher", {"fraction": 0.1}], ["wait_for", str(tmp_path / "go")]]
    long = world.job(*blocking, ["finish", "succeeded", {}])
    short = world.job(["finish", "succeeded", {}])
    start_worker(start, "one")
    queue.send(type(long), long.id)
    until(lambda: world.now(long).status == "running")
    queue.send(type(short), short.id)
    start_worker(start, "two")
    until(lambda: world.now(short).status == "succeeded")
    assert world.now(long).status == "running"
    (tmp_path / "go").touch()
    until(lambda: world.now(long).status == "succeeded")


def test_a_job_outlives_the_broker(world: World, queue: Queue, start: Start, tmp_path: Path) -> None:
    steps = [["event", "progress", "teacher", {"fraction": 0.1}], ["wait_for", str(tmp_path / "go")]]
    running = world.job(*steps, ["finish", "succeeded", {}])
    start_worker(start, "one")
    queue.send(type(running), running.id)
    until(lambda: world.now(running).status == "running")

    broker = next(child for child in psutil.Process().children() if "broker.sock" in " ".join(child.cmdline()))
    broker.kill()
    broker.wait()
    world.settings.broker_socket.unlink()
    waiting = world.job(["finish", "succeeded", {}])  # no message is ever sent for it
    (tmp_path / "go").touch()
    until(lambda: world.now(running).status == "succeeded")

    command = broker_command(broker_binary(), directory=tmp_path, socket_path=world.settings.broker_socket)
    start(*command)  # it has lost all messages
    until(lambda: world.now(waiting).status == "succeeded")
    assert world.now(running).attempt == 1


def test_a_worker_serves_what_its_child_counts(world: World, queue: Queue, start: Start, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = world.job(["finish", "succeeded", {}])
    command = ("-m", "tests.support.scripted_worker", "--queues", "jobs", "--name", "one")
    worker = start(
        "env", f"DEFEAT_METRICS_PORT={port}", f"PROMETHEUS_MULTIPROC_DIR={tmp_path}", sys.executable, *command
    )

    def _scrape() -> dict[tuple[str, tuple[str, ...]], float]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                families = text_string_to_metric_families(answer.read().decode())
        except urllib.error.URLError:
            return {}
        samples = (sample for family in families for sample in family.samples)
        return {(sample.name, tuple(sample.labels.values())): sample.value for sample in samples}

    until(lambda: ("defeat_attempt_seconds_count", ("", "job", "succeeded")) in _scrape())
    samples = _scrape()
    (registered_as,) = [row.name for row in world.all(Worker)]
    assert queue.workers() == {registered_as: Answer(("jobs",), version("defeat-service"))}
    assert world.now(job).status == "succeeded"
    assert samples["defeat_claims_total", ("no", "job")] == 1
    assert samples["defeat_rows_resent_total", ("jobs",)] == 1  # the parent counts as well: its sweep found the row
    assert ("defeat_disk_free_bytes", ()) in samples

    worker.terminate()
    assert worker.wait(20) == 0


def test_a_message_finds_the_worker_that_can_and_one_that_comes_free_finds_the_rest(
    world: World, queue: Queue, start: Start, tmp_path: Path
) -> None:
    """The workers sweep too rarely to help, and each job's message is sent once."""
    for name, labels in (("plain", "[]"), ("also-plain", "[]"), ("able", '["lab"]')):
        start_worker(start, name, DEFEAT_SWEEP_S="600", DEFEAT_LABELS=labels)
    until(lambda: registered(world) == ["able", "also-plain", "plain"])
    first = world.job(
        ["event", "progress", "teacher", {"fraction": 0.1}],
        ["wait_for", str(tmp_path / "go")],
        ["finish", "succeeded", {}],
        worker_label="lab",
    )
    queue.send(type(first), first.id)
    until(lambda: world.now(first).status == "running")
    able = next(worker for worker in world.all(Worker) if worker.name.startswith("able"))
    assert world.now(first).lease_owner.startswith(f"{able.id}/")

    second = world.job(["finish", "succeeded", {}], worker_label="lab")
    queue.send(type(second), second.id)  # two workers without the label are idle
    third = world.job(["finish", "succeeded", {}])
    queue.send(type(third), third.id)
    until(lambda: world.now(third).status == "succeeded")
    assert world.now(second).status == "queued"
    (tmp_path / "go").touch()
    until(lambda: world.now(second).status == "succeeded")
    assert world.now(second).lease_owner is None


def test_a_worker_that_starts_finds_what_has_waited_for_it_and_one_that_ends_is_forgotten(
    world: World, queue: Queue, start: Start
) -> None:
    job = world.job(["finish", "succeeded", {}], gpus=2)  # without a message
    worker = start_worker(start, "large", DEFEAT_SWEEP_S="600", DEFEAT_GPUS="2")
    until(lambda: world.now(job).status == "succeeded")
    assert registered(world) == ["large"]
    worker.send_signal(signal.SIGTERM)
    worker.wait(20)
    assert registered(world) == []
