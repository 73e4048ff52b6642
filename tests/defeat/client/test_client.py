import io
import json
import tarfile
from itertools import islice

import pytest

from defeat.client.client import Client
from defeat.client.errors import ApiError, ConnectionFailed, DigestMismatch, InvalidInput, WaitTimeout
from tests.support.service import metrics, reach

CONTENT = bytes(range(256)) * 12_000  # 3 MB: several chunks


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "cells.zip"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def student(service):
    job = service.add_job()
    service.add_artifact(job["id"], "student-best.safetensors", "student", CONTENT)
    return job["id"]


def test_a_file_is_sent_as_it_is_with_progress_and_digest(client, service, archive):
    seen = []
    dataset = client.datasets.add(archive, on_progress=lambda done, total: seen.append((done, total)))
    assert dataset["name"] == "cells.zip"
    assert service.uploads[dataset["id"]] == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert seen == sorted(seen)
    [headers] = service.requested("PUT .*")
    assert headers["Content-Digest"].startswith("sha-256=:")
    assert "Transfer-Encoding" not in headers
    assert client.datasets.wait(dataset["id"])["status"] == "ready"


def test_a_directory_is_sent_as_the_same_tar_every_time(client, service, tmp_path):
    folder = tmp_path / "cells"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "b.png").write_bytes(b"B")
    (folder / "images" / "a.png").write_bytes(b"A")
    (folder / ".DS_Store").write_bytes(b"no")
    (folder / "annotations.json").write_bytes(b"{}")
    (folder / "same.json").symlink_to("annotations.json")
    first = client.datasets.add(folder, max_dropped_fraction=0.5)
    (folder / "annotations.json").touch()
    second = client.datasets.add(folder, name="again")
    assert service.uploads[first["id"]] == service.uploads[second["id"]]
    assert (first["name"], first["max_dropped_fraction"], second["name"]) == ("cells", 0.5, "again")
    with tarfile.open(fileobj=io.BytesIO(service.uploads[first["id"]])) as tar:
        assert tar.getnames() == ["annotations.json", "images/a.png", "images/b.png", "same.json"]
        assert all(entry.isreg() for entry in tar)
        assert tar.extractfile("same.json").read() == b"{}"


def test_links_out_of_a_directory_are_not_followed(client, service, tmp_path):
    (tmp_path / "secret").write_text("private")
    folder = tmp_path / "cells"
    folder.mkdir()
    (folder / "a.png").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidInput, match=r"a\.png is a link to .*secret, outside"):
        client.datasets.add(folder)
    assert not service.datasets


@pytest.mark.parametrize("target", ["loop", ".", "nowhere"])
def test_links_that_lead_nowhere_useful_are_told(client, tmp_path, target):
    folder = tmp_path / "cells"
    folder.mkdir()
    (folder / "loop").symlink_to(target)
    with pytest.raises(InvalidInput, match="loop is a link"):
        client.datasets.add(folder)


def test_what_cannot_be_sent_is_told_before_anything_is_created(client, service, tmp_path):
    with pytest.raises(InvalidInput, match="no such dataset"):
        client.datasets.add(tmp_path / "missing.zip")
    with pytest.raises(InvalidInput, match="contains no files"):
        client.datasets.add(tmp_path)
    with pytest.raises(InvalidInput, match="is a directory"):
        client.checkpoints.add(tmp_path, "teacher")
    assert not service.datasets
    assert not service.checkpoints


def test_a_reference_is_sent_as_one(client, service):
    dataset = client.datasets.add("file:///data/cells/")
    assert dataset["source"] == {"kind": "reference", "uri": "file:///data/cells/"}
    assert dataset["name"] == "cells"
    assert not service.requested("PUT .*")


@pytest.mark.parametrize("fault", ["cut before", "busy", "damage", "html"])
def test_an_upload_that_was_cut_is_sent_again(client, service, archive, fault):
    service.faults = [("PUT .*", fault)]
    dataset = client.datasets.add(archive)
    assert service.uploads[dataset["id"]] == CONTENT
    assert len(service.requested("PUT .*")) == 2


def test_an_upload_whose_answer_was_lost_is_not_sent_again(client, service, archive):
    service.faults = [("PUT .*", "cut after")]
    dataset = client.datasets.add(archive)
    assert dataset["status"] == "ready"
    assert len(service.requested("PUT .*")) == 1


def test_an_upload_that_arrived_after_all_is_no_conflict(client, service, archive):
    service.faults = [("PUT .*", "cut while storing")]
    dataset = client.datasets.add(archive)
    assert dataset["status"] == "ready"
    assert len(service.requested("PUT .*")) == 2


def test_an_upload_that_stays_damaged_fails_and_names_the_dataset(client, service, archive):
    service.faults = [("PUT .*", "damage")] * 3
    with pytest.raises(ApiError, match="digest differs") as caught:
        client.datasets.add(archive)
    assert caught.value.code == "upload_incomplete"
    assert "ds_0000 was created and awaits its content" in caught.value.__notes__[0]


def test_a_create_whose_answer_was_lost_creates_once(client, service):
    service.faults = [("POST .*", "cut after")]
    job = client.jobs.submit({"name": "a", "dataset": "ds_0000"})
    assert list(service.jobs) == [job["id"]]
    first, second = service.requested("POST /v1/jobs")
    assert first["Idempotency-Key"] == second["Idempotency-Key"]


def test_a_delete_is_not_sent_twice(client, service):
    service.add_asset("datasets", {"name": "a"})
    client.datasets.get("ds_0000")
    service.faults = [("DELETE .*", "cut after")]
    with pytest.raises(ConnectionFailed):
        client.datasets.delete("ds_0000")
    assert len(service.requested("DELETE .*")) == 1


def test_gets_are_tried_again_while_the_service_restarts(client, service):
    service.faults = [("GET .*", "busy"), ("GET .*", "html"), ("GET .*", "cut before")]
    assert "defeat" in client.catalog()["methods"]
    assert len(service.requested("GET .*")) == 4


def test_lists_go_over_every_page_as_it_is_needed(client, service):
    for index in range(5):
        service.add_job({"name": str(index), "dataset": "ds_0000"})
    assert [job["name"] for job in client.jobs.list()] == ["4", "3", "2", "1", "0"]
    assert list(client.jobs.list(status="failed")) == []
    before = len(service.requests)
    assert len(list(islice(client.jobs.list(), 2))) == 2
    assert len(service.requests) - before == 1


def test_errors_carry_what_the_service_said(client, service):
    with pytest.raises(ApiError) as caught:
        client.jobs.submit({"name": "a"})
    error = caught.value
    assert (error.status, error.code, error.request_id) == (422, "validation_failed", "req_1")
    assert error.errors == [{"pointer": "/dataset", "code": "missing_key", "detail": "dataset is missing"}]
    assert "/dataset: dataset is missing (missing_key)" in str(error)


def test_no_key_and_a_wrong_one(server):
    with Client(api_key="dk_wrong") as client, pytest.raises(ApiError, match="set DEFEAT_API_KEY"):
        client.catalog()
    with pytest.raises(InvalidInput, match="without spaces and line breaks"):
        Client(api_key="dk_a\nX-Other: b")


def test_an_address_that_is_none(monkeypatch):
    monkeypatch.delenv("DEFEAT_URL", raising=False)
    with pytest.raises(InvalidInput, match=r"'localhost:8765' is not a server's address"):
        Client("localhost:8765")
    with Client() as client:
        assert client.url == "http://127.0.0.1:8765"


def test_nobody_listens(unreachable):
    with Client() as client, pytest.raises(ConnectionFailed, match="start one with `defeat up`") as caught:
        client.catalog()
    assert caught.value.url == unreachable


def test_an_id_cannot_ask_for_something_else(client, service):
    for wrong in ("../keys", "job_1?x=1", "", "job_1/cancel"):
        with pytest.raises(InvalidInput, match="is not an id"):
            client.jobs.get(wrong)
    assert not service.requests


def test_a_server_of_another_kind(client, service):
    service.files["/v1/catalog"] = b"<html>hello</html>"
    with pytest.raises(ApiError, match="check that it is the address of a DeFeat server"):
        client.catalog()


def test_a_cut_download_goes_on_where_it_was(client, service, student, tmp_path):
    service.faults = [("GET .*/artifacts/.*", "cut half")]
    seen = []
    path = client.jobs.download(
        student, "student-best.safetensors", tmp_path / "s", lambda done, total: seen.append(done)
    )
    assert path.read_bytes() == CONTENT
    assert [file.name for file in tmp_path.iterdir()] == ["s"]
    first, second = service.requested("GET .*/artifacts/.+")
    assert "Range" not in first
    assert second["Range"] == f"bytes={len(CONTENT) // 2}-"
    assert second["If-Range"].strip('"') == service.artifacts[student][0]["sha256"]
    assert seen[-1] == len(CONTENT)


def test_a_part_of_an_earlier_process_is_gone_on_with(client, service, student, tmp_path):
    digest = service.artifacts[student][0]["sha256"]
    (tmp_path / f"s.{digest[:16]}.part").write_bytes(CONTENT[:1000])
    (tmp_path / "s.0123456789abcdef.part").write_bytes(b"of other content")
    client.jobs.download(student, "student-best.safetensors", tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == CONTENT
    [headers] = service.requested("GET .*/artifacts/.+")
    assert headers["Range"] == "bytes=1000-"


def test_content_that_changed_meanwhile_starts_again_and_is_refused(client, service, student, tmp_path):
    digest = service.artifacts[student][0]["sha256"]
    (tmp_path / f"s.{digest[:16]}.part").write_bytes(CONTENT[:1000])
    service.files[f"/v1/jobs/{student}/artifacts/student-best.safetensors"] = CONTENT[::-1]
    with pytest.raises(DigestMismatch, match="was damaged"):
        client.jobs.download(student, "student-best.safetensors", tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_download_is_not_kept_and_the_old_file_stays(client, service, student, tmp_path):
    (tmp_path / "s").write_bytes(b"old")
    service.faults = [("GET .*/artifacts/.*", "damage")]
    with pytest.raises(DigestMismatch):
        client.jobs.download(student, "student-best.safetensors", tmp_path / "s")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"s": b"old"}
    client.jobs.download(student, "student-best.safetensors", tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == CONTENT


def test_an_artifact_that_is_not_there(client, student, tmp_path):
    with pytest.raises(InvalidInput, match=r"no artifact 'x'; it has: student-best\.safetensors"):
        client.jobs.download(student, "x", tmp_path / "x")


def test_checkpoints_go_up_and_come_down(client, service, archive, tmp_path):
    checkpoint = client.checkpoints.add(archive, "teacher", {"architecture": "faster_rcnn"}, ["RBC"])
    assert checkpoint["classes"] == ["RBC"]
    with pytest.raises(InvalidInput, match="once it is ready"):
        client.checkpoints.download(checkpoint["id"], tmp_path / "t")
    service.add_artifact("x", "y", "teacher", CONTENT)
    service.files["/v1/checkpoints/ckpt_0000/content"] = CONTENT
    service.checkpoints["ckpt_0000"].update(
        sha256=service.artifacts["x"][0]["sha256"], size_bytes=len(CONTENT), status="ready"
    )
    assert client.checkpoints.download("ckpt_0000", tmp_path / "new" / "t").read_bytes() == CONTENT
    client.checkpoints.delete("ckpt_0000")
    assert list(client.checkpoints.list()) == []


def test_watching_tells_everything_once_and_ends(client, service):
    job = service.add_job()["id"]
    service.events[job] = [
        {"id": f"evt_{i}", "level": "info", "code": "c", "message": str(i), "created_at": ""} for i in range(3)
    ]
    service.metrics[job] = [
        {"subject": "student", "step": i, "epoch": 0.1, "values": {"loss/total": 1.0}} for i in range(5)
    ]

    def evaluate(job_row):
        service.evaluations[job] = [{"subject": "student", "epoch": 1, "metrics": metrics(0.3)}]
        service.metrics[job].append({"subject": "teacher", "step": 0, "epoch": 0.1, "values": {}})
        reach("running")(job_row)

    service.script = [reach("preparing"), evaluate, reach("running"), reach("succeeded")]
    updates = list(client.jobs.watch(job, poll_s=0.01))
    assert [update["job"]["status"] for update in updates] == ["preparing", "running", "succeeded"]
    assert [[event["message"] for event in update["events"]] for update in updates] == [["0", "1", "2"], [], []]
    assert [len(update["metrics"]) for update in updates] == [5, 1, 0]
    assert [len(update["evaluations"]) for update in updates] == [0, 1, 0]


def test_waiting_has_an_end(client, service):
    job = service.add_job()["id"]
    with pytest.raises(WaitTimeout, match=r"still queued after 0\.05 s"):
        client.jobs.wait(job, timeout_s=0.05, poll_s=0.02)
    with pytest.raises(WaitTimeout):
        list(client.jobs.watch(job, timeout_s=0.05, poll_s=0.02))
    service.script = [reach("running"), reach("failed")]
    assert client.jobs.wait(job, poll_s=0.01)["status"] == "failed"
    assert client.jobs.cancel(job)["status"] == "cancelling"


def test_jobs_are_paused_resumed_and_tried_again(client, service):
    job = service.add_job()["id"]
    assert client.jobs.pause(job)["status"] == "pausing"
    assert client.jobs.resume(job)["status"] == "queued"
    for start in (None, "checkpoint", "beginning"):
        assert client.jobs.retry(job, start=start)["status"] == "queued"
        assert json.loads(service.bodies[-1]) == {"from": start}
    assert all("Idempotency-Key" in headers for headers in service.requested(rf"POST /v1/jobs/{job}/retry"))
