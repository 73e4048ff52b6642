"""Jobs: distillations."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from defeat.client.errors import InvalidInput, WaitTimeout
from defeat.client.resource import Resource, wait_until
from defeat.client.transfer import OnProgress, download
from defeat.client.types import (
    JOB_TERMINAL,
    SUBJECTS,
    Artifact,
    Evaluation,
    Event,
    Job,
    JobStatus,
    Metrics,
    RetryFrom,
    Subject,
    Update,
)

_METRICS_PAGE = 1000


class Jobs(Resource):
    """`/v1/jobs`."""

    KIND = "jobs"

    def submit(self, spec: dict[str, Any]) -> Job:
        """Create a job from a spec and return it; raises `ApiError` with one entry of `errors` for each error in it."""
        return cast(Job, self._transport.create("/v1/jobs", spec))

    def validate(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Return the resolved spec, with every default, without creating a job. Raises like `submit`."""
        return cast(dict[str, Any], self._transport.post("/v1/jobs/validate", spec)["spec"])

    def get(self, job_id: str) -> Job:
        """Return one job."""
        return cast(Job, self._transport.get(self._path(job_id)))

    def list(
        self, *, status: JobStatus | None = None, dataset: str | None = None, name: str | None = None
    ) -> Iterator[Job]:
        """Yield the jobs that match, newest first, and request pages as needed; `name` is any part of the name."""
        return self._pages("/v1/jobs", {"status": status, "dataset": dataset, "name": name})

    def cancel(self, job_id: str) -> Job:
        """Cancel a job and return it: a queued one ends at once, a running one saves its work first."""
        return cast(Job, self._transport.post(self._path(job_id, "cancel")))

    def set_priority(self, job_id: str, priority: int) -> Job:
        """Set a job's priority (-100 to 100, higher begins first) and return it."""
        return cast(Job, self._transport.patch(self._path(job_id), {"priority": priority}))

    def pause(self, job_id: str) -> Job:
        """Pause a job and return it: a queued one is paused at once, a running one saves a checkpoint first."""
        return cast(Job, self._transport.post(self._path(job_id, "pause")))

    def resume(self, job_id: str) -> Job:
        """Queue a paused job again, to continue from its last checkpoint, and return it."""
        return cast(Job, self._transport.post(self._path(job_id, "resume")))

    def retry(self, job_id: str, *, start: RetryFrom | None = None) -> Job:
        """Queue another attempt of a job that failed or was cancelled, and return it.

        `start` None: from the last training checkpoint if there is one. `beginning` deletes its metrics.
        """
        return cast(Job, self._transport.create(self._path(job_id, "retry"), {"from": start}))

    def events(self, job_id: str, *, after: str | None = None) -> Iterator[Event]:
        """Yield the job's events, oldest first; `after` is the id of an event."""
        path = self._path(job_id, "events")
        while True:
            page = self._transport.get(path, {"limit": 100, "after": after})
            yield from page["data"]
            if not page["has_more"]:
                return
            after = page["data"][-1]["id"]

    def metrics(self, job_id: str, *, subject: Subject = "student", after_step: int | None = None) -> Iterator[Metrics]:
        """Yield the metrics of one subject's training, by step; `after_step` yields later steps only."""
        path = self._path(job_id, "metrics")
        while True:
            page = self._transport.get(path, {"subject": subject, "after_step": after_step, "limit": _METRICS_PAGE})
            yield from page["data"]
            if not page["has_more"]:
                return
            after_step = page["data"][-1]["step"]

    def evaluations(self, job_id: str) -> Sequence[Evaluation]:
        """Return all evaluations of the teacher and the student so far."""
        return cast(Sequence[Evaluation], self._transport.get(self._path(job_id, "evaluations"))["data"])

    def artifacts(self, job_id: str) -> Sequence[Artifact]:
        """Return the files that the job produced."""
        return cast(Sequence[Artifact], self._transport.get(self._path(job_id, "artifacts"))["data"])

    def wait(self, job_id: str, *, timeout_s: float | None = None, poll_s: float = 1.0) -> Job:
        """Return the job once it has succeeded, failed or been cancelled; raises `WaitTimeout` after `timeout_s`."""
        return wait_until(lambda: self.get(job_id), JOB_TERMINAL, timeout_s=timeout_s, poll_s=poll_s)

    def watch(self, job_id: str, *, timeout_s: float | None = None, poll_s: float = 1.0) -> Iterator[Update]:
        """Poll every `poll_s` seconds and yield what is new, first everything so far, until the job has ended.

        The last update has the ended job and the last of its events, metrics and evaluations. Yields nothing while
        nothing changes. Raises `WaitTimeout` after `timeout_s` seconds (None: never).
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        feed = _Feed(self, job_id)
        while True:
            update = feed.next()
            if update is not None:
                yield update
            if feed.ended:
                return
            if end is not None and time.monotonic() + poll_s > end:
                raise WaitTimeout(f"{job_id} has not ended after {timeout_s:g} s; it continues on the server")
            time.sleep(poll_s)

    def download(self, job_id: str, name: str, path: str | Path, on_progress: OnProgress | None = None) -> Path:
        """Write the artifact `name` to the file `path` and return it. Resumes an interrupted download.

        Raises `InvalidInput` if the job has no such artifact, and like `defeat.client.transfer.download`.
        """
        artifacts = {artifact["name"]: artifact for artifact in self.artifacts(job_id)}
        if name not in artifacts:
            known = ", ".join(artifacts) or "none yet"
            raise InvalidInput(f"{job_id} has no artifact {name!r}; it has: {known}")
        return download(
            self._transport,
            self._path(job_id, "artifacts", quote(name)),
            Path(path),
            sha256=artifacts[name]["sha256"],
            size_bytes=artifacts[name]["size_bytes"],
            on_progress=on_progress,
        )


class _Feed:
    """Remembers which of a job's events, metrics and evaluations were yielded."""

    def __init__(self, jobs: Jobs, job_id: str) -> None:
        self._jobs = jobs
        self._job_id = job_id
        self._job: Job | None = None
        self._event: str | None = None
        self._steps: dict[Subject, int | None] = dict.fromkeys(SUBJECTS)
        self._evaluated: set[tuple[Subject, int]] = set()

    @property
    def ended(self) -> bool:
        return self._job is not None and self._job["status"] in JOB_TERMINAL

    def next(self) -> Update | None:
        """Return what is new, or None."""
        # The job first: if it has ended, this update then has everything.
        job = self._jobs.get(self._job_id)
        events = list(self._jobs.events(self._job_id, after=self._event))
        metrics: list[Metrics] = []
        for subject in SUBJECTS:
            new = list(self._jobs.metrics(self._job_id, subject=subject, after_step=self._steps[subject]))
            if new:
                self._steps[subject] = new[-1]["step"]
            metrics += new
        evaluations = [
            evaluation
            for evaluation in self._jobs.evaluations(self._job_id)
            if (evaluation["subject"], evaluation["epoch"]) not in self._evaluated
        ]
        self._evaluated |= {(evaluation["subject"], evaluation["epoch"]) for evaluation in evaluations}
        if events:
            self._event = events[-1]["id"]
        if job == self._job and not (events or metrics or evaluations):
            return None
        self._job = job
        return {"job": job, "events": events, "metrics": metrics, "evaluations": evaluations}
