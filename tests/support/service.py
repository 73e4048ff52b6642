"""A small real HTTP server that speaks docs/api.md, and breaks when it is told to."""

import hashlib
import json
import re
import socket
import threading
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

KEY = "dk_test"
PAGE = 2  # rows a page, whatever is asked for: every list has several


def metrics(ap: float) -> dict[str, Any]:
    return {"ap": ap, "ap50": ap + 0.2, "ap75": ap - 0.05, "per_class": [], "images": 2, "detections": 9}


def progress(phase: str, fraction: float, epoch: int | None = None) -> dict[str, Any]:
    return {
        "phase": phase,
        "fraction": fraction,
        "epoch": epoch,
        "epochs": 2,
        "step": 5,
        "steps": 10,
        "eta_s": 75.0,
        "images_per_s": 20.5,
    }


class Service:
    """The server's state, for tests to set and to look at."""

    def __init__(self) -> None:
        self.datasets: dict[str, dict[str, Any]] = {}
        self.checkpoints: dict[str, dict[str, Any]] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.events: dict[str, list[dict[str, Any]]] = {}
        self.metrics: dict[str, list[dict[str, Any]]] = {}
        self.evaluations: dict[str, list[dict[str, Any]]] = {}
        self.files: dict[str, bytes] = {}  # by path
        self.artifacts: dict[str, list[dict[str, Any]]] = {}
        self.uploads: dict[str, bytes] = {}
        self.answers: dict[str, dict[str, Any]] = {}  # by idempotency key
        self.outcome: dict[str, Any] = {"status": "ready"}  # of the check of what is uploaded
        self.workers: list[dict[str, Any]] = []
        self.script: list[Callable[[dict[str, Any]], None]] = []  # what happens to a job before each look at it
        self.faults: list[tuple[str, str]] = []  # (pattern of "METHOD path", what breaks), each used once
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.bodies: list[bytes] = []  # of the requests that move a job

    def requested(self, pattern: str) -> list[dict[str, str]]:
        """Return the headers of the requests whose "METHOD path" fits."""
        return [headers for method, path, headers in self.requests if re.fullmatch(pattern, f"{method} {path}")]

    def add_job(self, spec: dict[str, Any] | None = None) -> dict[str, Any]:
        job_id = f"job_{len(self.jobs):04d}"
        spec = spec or {"name": "cells-small", "dataset": "ds_0000"}
        self.jobs[job_id] = {
            "id": job_id,
            "object": "job",
            "name": spec["name"],
            "labels": spec.get("labels", {}),
            "status": "queued",
            "attempt": 0,
            "dataset_id": spec["dataset"],
            "spec": spec,
            "priority": 0,
            "queue": None,
            "adjustments": None,
            "not_before": None,
            "progress": None,
            "results": None,
            "failure": None,
            "created_at": "2026-01-01T00:00:00Z",
            "started_at": None,
            "finished_at": None,
            "links": {},
        }
        return self.jobs[job_id]

    def add_artifact(self, job_id: str, name: str, kind: str, content: bytes) -> None:
        self.files[f"/v1/jobs/{job_id}/artifacts/{name}"] = content
        digest = hashlib.sha256(content).hexdigest()
        self.artifacts.setdefault(job_id, []).append(
            {
                "name": name,
                "kind": kind,
                "content_type": "application/octet-stream",
                "size_bytes": len(content),
                "sha256": digest,
                "details": {},
                "created_at": "2026-01-01T00:00:00Z",
            }
        )

    def add_asset(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        rows = getattr(self, kind)
        asset_id = f"{'ds' if kind == 'datasets' else 'ckpt'}_{len(rows):04d}"
        upload = body.get("source", {"kind": "upload"})["kind"] == "upload"
        rows[asset_id] = {
            "id": asset_id,
            "object": kind[:-1],
            "status": "awaiting_upload" if upload else "queued",
            "failure": None,
            "size_bytes": None,
            "classes": None,
            "created_at": "2026-01-01T00:00:00Z",
            "started_at": None,
            "finished_at": None,
            "links": {},
            **({"format": None, "splits": None, "content_hash": None} if kind == "datasets" else {}),
            **({"coverage": None, "sha256": None, "source_job_id": None} if kind == "checkpoints" else {}),
            **body,
        }
        return rows[asset_id]


def reach(status: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    """Return a step of a job's script: it has this status and these members from then on."""
    return lambda job: job.update(status=status, **changes)


class Problem(Exception):
    def __init__(self, status: int, code: str, detail: str, errors: list[dict[str, str]] | None = None) -> None:
        self.status = status
        self.document = {"status": status, "code": code, "detail": detail, "request_id": "req_1"}
        if errors:
            self.document["errors"] = errors


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    service: Service
    fault: str | None

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        path = unquote(parts.path)
        self.service.requests.append((self.command, path, dict(self.headers.items())))
        self.fault = self._next_fault(f"{self.command} {path}")
        if self.fault == "cut before":
            return self._cut()
        if self.fault == "busy":
            return self._send(503, {"code": "unavailable", "detail": "the database does not answer"})
        if self.fault == "html":
            return self._send_bytes(502, b"<html>Bad Gateway</html>", {"Content-Type": "text/html"})
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            answer = self._answer(path, body)
        except Problem as problem:
            return self._send(problem.status, problem.document)
        if self.fault in ("cut after", "cut while storing"):
            return self._cut()
        if answer is not None:
            self._send(*answer)
        return None

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle

    def _next_fault(self, request: str) -> str | None:
        for index, (pattern, fault) in enumerate(self.service.faults):
            if re.fullmatch(pattern, request):
                del self.service.faults[index]
                return fault
        return None

    def _cut(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, document: Any) -> None:
        kind = "application/problem+json" if status >= 400 else "application/json"
        content = b"" if status == 204 else json.dumps(document).encode()
        self._send_bytes(status, content, {"Content-Type": kind})

    def _send_bytes(self, status: int, content: bytes, headers: dict[str, str], announced: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if announced is None else announced))
        self.end_headers()
        self.wfile.write(content)

    def _answer(self, path: str, body: bytes) -> tuple[int, Any] | None:
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            raise Problem(401, "unauthorized", "no API key: send `Authorization: Bearer <key>`")
        if self.command == "GET" and path in self.service.files:
            self._send_file(self.service.files[path])
            return None
        segments = path.strip("/").split("/")[1:]
        if self.command == "POST" and len(segments) == 1:
            key = self.headers["Idempotency-Key"]
            if key not in self.service.answers:
                self.service.answers[key] = self._create(segments[0], json.loads(body))
            return 201, self.service.answers[key]
        return getattr(self, f"_{segments[0]}")(segments[1:], body)

    def _create(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        if kind == "jobs":
            self._check_spec(body)
            return dict(self.service.add_job(body))
        return dict(self.service.add_asset(kind, body))

    def _check_spec(self, spec: dict[str, Any]) -> None:
        if "dataset" not in spec:
            errors = [{"pointer": "/dataset", "code": "missing_key", "detail": "dataset is missing"}]
            raise Problem(422, "validation_failed", "the job spec has 1 mistake", errors)

    def _workers(self, rest: list[str], body: bytes) -> tuple[int, Any]:
        return 200, {"data": self.service.workers}

    def _catalog(self, rest: list[str], body: bytes) -> tuple[int, Any]:
        return 200, {
            "detectors": {"faster_rcnn": {"summary": "two stages"}},
            "methods": {"defeat": {"summary": "decoupled features"}},
            "dataset_formats": {"coco": {"summary": "COCO"}},
            "pretrained": {"fasterrcnn_resnet50_fpn": {"weights": {"COCO_V1": {}}}},
            "backbones": {"timm/resnet10t": {"parameters": 4_900_000}},
        }

    def _page(self, rows: list[Any]) -> tuple[int, Any]:
        start = int(self.query.get("after", "0"))
        page = rows[start : start + PAGE]
        more = start + PAGE < len(rows)
        return 200, {"data": page, "has_more": more, "next_cursor": str(start + PAGE) if more else None}

    def _datasets(self, rest: list[str], body: bytes) -> tuple[int, Any]:
        if rest[1:] == ["report"]:
            if self.service.outcome["report"] is None:
                raise Problem(404, "not_found", "no report")
            return 200, self.service.outcome["report"]
        return self._asset(self.service.datasets, rest, body)

    def _checkpoints(self, rest: list[str], body: bytes) -> tuple[int, Any]:
        return self._asset(self.service.checkpoints, rest, body)

    def _asset(self, rows: dict[str, dict[str, Any]], rest: list[str], body: bytes) -> tuple[int, Any]:
        if not rest:
            return self._page(list(rows.values())[::-1])
        if rest[0] not in rows:
            raise Problem(404, "not_found", f"no such resource: {rest[0]}")
        row = rows[rest[0]]
        if self.command == "DELETE":
            return 204, rows.pop(rest[0])
        if self.command == "PUT":
            return self._upload(row, body)
        if row["status"] == "queued":
            row.update({name: value for name, value in self.service.outcome.items() if name != "report"})
        return 200, row

    def _upload(self, row: dict[str, Any], body: bytes) -> tuple[int, Any]:
        if row["id"] in self.service.uploads:
            row["status"] = "queued"  # an earlier upload has been stored meanwhile
        if row["status"] != "awaiting_upload":
            raise Problem(409, "conflict", "content was sent already")
        digest = f"sha-256=:{b64encode(hashlib.sha256(body).digest()).decode()}:"
        if self.headers.get("Content-Digest") != digest or self.fault == "damage":
            raise Problem(400, "upload_incomplete", "the content's digest differs from the announced one")
        self.service.uploads[row["id"]] = body
        if self.fault != "cut while storing":
            row["status"] = "queued"
        return 202, row

    def _jobs(self, rest: list[str], body: bytes) -> tuple[int, Any]:
        service = self.service
        if not rest:
            wanted = self.query.get("status")
            return self._page([job for job in reversed(service.jobs.values()) if wanted in (None, job["status"])])
        if rest == ["validate"]:
            self._check_spec(json.loads(body))
            return 200, {"spec": {**json.loads(body), "seed": 0}}
        if rest[0] not in service.jobs:
            raise Problem(404, "not_found", f"no job {rest[0]}")
        job = service.jobs[rest[0]]
        match rest[1:]:
            case [] if body:
                job["priority"] = json.loads(body)["priority"]
                return 200, job
            case []:
                if service.script:
                    service.script.pop(0)(job)
                return 200, job
            case ["cancel"]:
                job["status"] = "cancelling"
                return 202, job
            case [("pause" | "resume" | "retry") as verb]:
                job["status"] = "pausing" if verb == "pause" else "queued"
                service.bodies.append(body)
                return 202, job
            case ["events"]:
                rows = service.events.get(job["id"], [])
                after = self.query.get("after", "")
                rows = [row for row in rows if row["id"] > after]
                return 200, {"data": rows[:PAGE], "has_more": len(rows) > PAGE, "next_cursor": None}
            case ["metrics"]:
                after_step = int(self.query.get("after_step", "-1"))
                rows = [
                    row
                    for row in service.metrics.get(job["id"], [])
                    if row["subject"] == self.query["subject"] and row["step"] > after_step
                ]
                return 200, {"data": rows[:PAGE], "has_more": len(rows) > PAGE}
            case ["evaluations"]:
                return 200, {"data": service.evaluations.get(job["id"], [])}
            case ["artifacts"]:
                return 200, {"data": service.artifacts.get(job["id"], []), "has_more": False, "next_cursor": None}
        raise Problem(404, "not_found", self.path)

    def _send_file(self, content: bytes) -> None:
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        start, headers = 0, {"ETag": etag, "Content-Type": "application/octet-stream"}
        asked = self.headers.get("Range")
        if asked and self.headers.get("If-Range", etag) == etag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        part = content[start:]
        sent = part[: len(part) // 2] if self.fault == "cut half" else part
        if self.fault == "damage":
            sent = bytes(len(sent))
        self._send_bytes(206 if start else 200, sent, headers, announced=len(part))
        if self.fault == "cut half":
            self._cut()


class Server:
    """A `Service` on a free port of the loopback."""

    def __init__(self) -> None:
        self.service = Service()
        handler = type("BoundHandler", (Handler,), {"service": self.service})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
