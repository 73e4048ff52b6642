"""The object store in a local directory and on an S3 server."""

import errno
import hashlib
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from app.storage import CHUNK_BYTES, ObjectMissing, Storage


@pytest.fixture
def local(tmp_path: Path) -> Storage:
    return Storage((tmp_path / "with space").as_uri())


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest) -> Storage:
    """A store without objects, of each kind that is supported."""
    if request.param == "local":
        return request.getfixturevalue("local")
    return Storage(request.getfixturevalue("s3_url"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 10_000)
    return path


def test_a_file_comes_back_as_it_was_put(storage: Storage, file: Path, tmp_path: Path) -> None:
    stored = storage.put_file("jobs/job_1/a.bin", file)
    storage.get_file("jobs/job_1/a.bin", tmp_path / "back")

    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    assert stored.key == "jobs/job_1/a.bin"
    assert stored.size_bytes == storage.size(stored.key) == 2_560_000
    assert stored.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert {path.name for path in tmp_path.iterdir()} - {"with space"} == {"file", "back"}


def test_an_empty_file_is_an_object_too(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert storage.put_file("empty", tmp_path / "empty").size_bytes == 0
    assert b"".join(storage.stream("empty")) == b""


@pytest.mark.parametrize(
    ("start", "end"), [(0, None), (0, 0), (1, 2), (255, CHUNK_BYTES + 300), (2_559_999, None), (2_560_000, None)]
)
def test_a_range_of_bytes(storage: Storage, file: Path, start: int, end: int | None) -> None:
    storage.put_file("a", file)
    assert b"".join(storage.stream("a", start=start, end=end)) == file.read_bytes()[start:end]


@pytest.mark.parametrize(("start", "end"), [(-1, None), (2, 1), (0, 2_560_001), (2_560_001, None)])
def test_a_range_outside_the_object_is_refused(storage: Storage, file: Path, start: int, end: int | None) -> None:
    storage.put_file("a", file)
    with pytest.raises(ValueError, match="2560000"):
        storage.stream("a", start=start, end=end)


def test_a_large_object_is_read_in_spans_of_one_version(
    storage: Storage, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.storage._SPAN_BYTES", 1_000_000)
    storage.put_file("a", file)
    assert b"".join(storage.stream("a", start=7)) == file.read_bytes()[7:]

    chunks = storage.stream("a")
    next(chunks)
    (tmp_path / "other").write_bytes(b"x" * 2_560_000)
    storage.put_file("a", tmp_path / "other")
    with pytest.raises(OSError, match="object store, a"):
        list(chunks)


def test_a_second_put_replaces(storage: Storage, file: Path, tmp_path: Path) -> None:
    storage.put_file("a", file)
    (tmp_path / "new").write_bytes(b"new")
    storage.put_file("a", tmp_path / "new")
    assert b"".join(storage.stream("a")) == b"new"


def test_what_is_missing(storage: Storage, tmp_path: Path) -> None:
    assert not storage.exists("a/b")
    storage.delete("a/b")
    storage.delete_prefix("a")
    assert storage.list("a") == []
    with pytest.raises(ObjectMissing, match="'a/b'"):
        storage.size("a/b")
    with pytest.raises(ObjectMissing):
        storage.stream("a/b")
    with pytest.raises(ObjectMissing):
        storage.get_file("a/b", tmp_path / "back")
    with pytest.raises(FileNotFoundError):
        storage.put_file("a/b", tmp_path / "nothing")
    assert not (tmp_path / "back").exists()


def test_folders(storage: Storage, file: Path) -> None:
    for key in ("jobs/a/2", "jobs/a/sub/1", "jobs/ab/1"):
        storage.put_file(key, file)
    assert storage.list("jobs/a") == ["jobs/a/2", "jobs/a/sub/1"]

    storage.delete_prefix("jobs/a")

    assert storage.list("jobs") == ["jobs/ab/1"]


def test_an_emptied_folder_goes_too(local: Storage, file: Path, tmp_path: Path) -> None:
    local.put_file("jobs/a/sub/1", file)
    local.delete_prefix("jobs/a")
    assert list((tmp_path / "with space").iterdir()) == [tmp_path / "with space" / "jobs"]


@pytest.mark.parametrize(
    "key",
    ["", "/a", "a/", "a//b", "..", "a/../b", ".hidden", "a/.b", "a b", "a#1", "a\n", "a\0", "ä", "a\\b", "x" * 301],
)
def test_a_malformed_key_is_refused_everywhere(storage: Storage, file: Path, tmp_path: Path, key: str) -> None:
    calls = (
        lambda: storage.put_file(key, file),
        lambda: storage.get_file(key, tmp_path / "back"),
        lambda: storage.stream(key),
        lambda: storage.size(key),
        lambda: storage.exists(key),
        lambda: storage.delete(key),
        lambda: storage.delete_prefix(key),
        lambda: storage.list(key),
    )
    for call in calls:
        with pytest.raises(ValueError, match="not a storage key"):
            call()


def test_an_object_of_many_parts(storage: Storage, tmp_path: Path) -> None:
    content = hashlib.shake_256(b"content").digest(20 * CHUNK_BYTES + 1)
    (tmp_path / "large").write_bytes(content)

    stored = storage.put_file("large", tmp_path / "large")

    assert (stored.size_bytes, stored.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert b"".join(storage.stream("large")) == content


def test_two_prefixes_of_a_bucket_are_two_stores(s3_url: str, file: Path) -> None:
    one, other = Storage(f"{s3_url}/one"), Storage(f"{s3_url}/other")
    one.put_file("a/b", file)
    assert (one.list("a"), other.list("a")) == (["a/b"], [])
    assert Storage(s3_url).list("one") == ["one/a/b"]


def test_a_bucket_that_is_not_there_is_no_missing_object(s3_url: str, file: Path) -> None:
    storage = Storage("s3://defeat-no-such-bucket")
    calls = (lambda: storage.put_file("a/b", file), storage.ping, lambda: storage.list("a"))
    for call in calls:
        with pytest.raises(OSError, match="the bucket does not exist; create it, or correct STORAGE_URL"):
            call()


def test_an_s3_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, s3_url: str) -> None:
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(OSError, match="object store, ping/"):
            Storage(s3_url).ping()


@pytest.mark.parametrize("url", ["", "objects", "file://host/dir", "http://bucket/x", "s3://"])
def test_an_unknown_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="STORAGE_URL"):
        Storage(url)


def test_ping_leaves_nothing(storage: Storage) -> None:
    storage.ping()
    assert storage.list("ping") == []


def test_ping_says_when_the_store_is_gone(tmp_path: Path) -> None:
    storage = Storage((tmp_path / "objects").as_uri())
    (tmp_path / "objects").rmdir()
    (tmp_path / "objects").write_text("a file")
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        storage.ping()


# A limit on the size of files stands in for a full disk: both fail in the middle of a write.
FULL = """
import errno, resource, signal, sys
from pathlib import Path
from app.storage import Storage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
storage, file = Storage(sys.argv[1]), Path(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
for action in (lambda: storage.put_file("a/b", file), lambda: storage.get_file("big", Path(sys.argv[3]))):
    try:
        action()
    except OSError as error:
        print(errno.errorcode[error.errno])
"""


def test_a_write_that_fails_leaves_the_old_object(local: Storage, file: Path, tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    local.put_file("a/b", tmp_path / "old")
    local.put_file("big", file)

    command = [sys.executable, "-c", FULL, (tmp_path / "with space").as_uri(), str(file), str(tmp_path / "back")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["EFBIG", "EFBIG"]
    assert b"".join(local.stream("a/b")) == b"old"
    assert [path.name for path in (tmp_path / "with space" / "a").iterdir()] == ["b"]
    assert {path.name for path in tmp_path.iterdir()} == {"with space", "file", "old"}


def test_a_full_disk_is_enospc_and_leaves_the_old_object(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    try:
        storage = Storage(disk.as_uri())
        (tmp_path / "old").write_bytes(b"old")
        (tmp_path / "big").write_bytes(b"x" * 2_000_000)
        storage.put_file("a/b", tmp_path / "old")
        with pytest.raises(OSError, match="No space left") as caught:
            storage.put_file("a/b", tmp_path / "big")
        assert caught.value.errno == errno.ENOSPC
        assert b"".join(storage.stream("a/b")) == b"old"
        assert storage.list("a") == ["a/b"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_a_scan_finds_every_object_of_a_folder_once(storage: Storage, file: Path, limit: int) -> None:
    keys = {"jobs/job_1/a", "jobs/job_1/resume/1.pt", "jobs/job_1=x/a", "jobs/job_2/b/c/d", "jobs/z"}
    for key in (*keys, "datasets/ds_1/a"):
        storage.put_file(key, file)
    found, after = [], None
    while batch := storage.scan("jobs", after=after, limit=limit):
        assert len(batch) <= limit
        found += batch
        after = batch[-1].key
    assert sorted(one.key for one in found) == sorted(keys)
    assert {one.size_bytes for one in found} == {2_560_000}
    assert all(abs((one.written_at - datetime.now(UTC)).total_seconds()) < 60 for one in found)
    assert storage.scan("checkpoints", after=None, limit=limit) == []


def _put(storage: Storage, tmp_path: Path, *keys: str) -> None:
    (tmp_path / "tiny").write_bytes(b"tiny")
    for key in keys:
        storage.put_file(key, tmp_path / "tiny")


def _scanned(storage: Storage, folder: str, *, after: str | None = None, limit: int = 100) -> list[str]:
    return [one.key for one in storage.scan(folder, after=after, limit=limit)]


def test_a_scan_goes_on_behind_a_key_in_the_stores_own_order(storage: Storage, tmp_path: Path) -> None:
    keys = ["jobs/job_1/a", "jobs/job_1/b/c", "jobs/job_1=x/a", "jobs/job_10/a", "jobs/job_2/a"]
    _put(storage, tmp_path, *reversed(keys), "job/a", "jobs2/a", "jobsa")

    found = _scanned(storage, "jobs")

    assert sorted(found) == sorted(keys)
    assert _scanned(storage, "jobs") == found
    for number, key in enumerate(found):
        assert _scanned(storage, "jobs", after=key) == found[number + 1 :]
        assert _scanned(storage, "jobs", after=key, limit=2) == found[number + 1 : number + 3]
    # What was found last may be deleted before the next scan, and what is new behind it is found.
    storage.delete(found[1])
    _put(storage, tmp_path, "jobs/job_9/new")
    rest = _scanned(storage, "jobs", after=found[1])
    assert [key for key in rest if key != "jobs/job_9/new"] == found[2:]
    assert "jobs/job_9/new" in rest


def test_on_s3_a_scan_follows_the_order_of_bytes(s3_url: str, tmp_path: Path) -> None:
    keys = ["jobs/A/1", "jobs/a/1", "jobs/a/10", "jobs/a/2", "jobs/a/b/1", "jobs/a/~", "jobs/a=/1", "jobs/a_/1"]
    storage = Storage(s3_url)
    _put(storage, tmp_path, *reversed(keys))
    assert _scanned(storage, "jobs") == keys == sorted(keys)
    assert _scanned(storage, "jobs", after="jobs/a/3", limit=2) == ["jobs/a/b/1", "jobs/a/~"]  # a key that never was
    assert _scanned(storage, "jobs", after="jobs/b") == []
    assert _scanned(Storage(f"{s3_url}/jobs"), "a", after="a/10") == ["a/2", "a/b/1", "a/~"]


def test_on_s3_a_scan_passes_over_the_servers_pages(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "4")  # a page of other servers has 1000: one holds all of these
    storage, keys = Storage(s3_url), [f"jobs/{number:02}" for number in range(11)]
    _put(storage, tmp_path, *keys)
    assert _scanned(storage, "jobs", limit=20) == keys
    assert _scanned(storage, "jobs", limit=5) == keys[:5]
    assert _scanned(storage, "jobs", after=keys[3], limit=20) == keys[4:]
    assert _scanned(storage, "jobs", after=keys[1], limit=8) == keys[2:10]
    assert storage.list("jobs") == keys


def test_a_scan_finds_what_a_killed_write_left(local: Storage, file: Path, tmp_path: Path) -> None:
    storage = local
    storage.put_file("jobs/job_1/a", file)
    part = tmp_path / "with space" / "jobs" / "job_1" / "a#123"
    part.write_bytes(b"half")
    found = {one.key: one for one in storage.scan("jobs", after=None, limit=10)}
    assert set(found) == {"jobs/job_1/a", "jobs/job_1/a#123"}
    for one in found.values():
        storage.discard(one)
        storage.discard(one)
    assert storage.scan("jobs", after=None, limit=10) == []
