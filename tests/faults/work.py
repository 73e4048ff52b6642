"""Short real jobs, and the checks of their ends."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from defeat.client.client import Client
from examples import digits
from tests.faults.cluster import Cluster
from tests.support.tiny import TINY
from tests.support.waiting import until

STEPS_AN_EPOCH = 6
EPOCHS = 24
"""Of a job that meets a fault: it trains for some seconds and saves several checkpoints in each."""
ENDED = {"succeeded", "failed", "cancelled"}


def schedule(epochs: int) -> dict[str, Any]:
    """Return a schedule of this many epochs."""
    return {"epochs": epochs, "batch_size": 4, "learning_rate": 0.01, "decay": "cosine"}


@dataclass
class Report:
    """The results of jobs that met faults."""

    jobs: int = 0
    lost: int = 0
    doubled: int = 0
    resumed_identical: int = 0
    attempts: int = 0
    wrong: list[str] = field(default_factory=list)


class Work:
    """A dataset, a teacher, and jobs with the same seed, which have equal results if no fault changes them."""

    def __init__(self, cluster: Cluster, client: Client, folder: Path) -> None:
        self.cluster = cluster
        self.client = client
        scenes = digits.build(folder / "digits", train_scenes=4 * STEPS_AN_EPOCH, val_scenes=4, width=96, height=64)
        self.dataset = client.datasets.wait(client.datasets.add(scenes, name="digits")["id"], timeout_s=120)["id"]
        trained = {"source": "train", "detector": TINY, "schedule": schedule(1)}
        first = self.finished(self.submit(epochs=1, teacher=trained))
        self._teacher = {"source": "checkpoint", "id": first["results"]["teacher_checkpoint_id"]}
        self._expected: dict[int, dict[str, Any]] = {}

    def submit(self, *, epochs: int, teacher: dict[str, Any] | None = None) -> str:
        """Queue a job and return its id."""
        spec = {
            "name": f"{epochs} epochs",
            "dataset": self.dataset,
            "teacher": teacher or self._teacher,
            "student": {"detector": TINY},
            "distillation": {"method": "defeat"},
            "schedule": schedule(epochs),
        }
        return str(self.client.jobs.submit(spec)["id"])

    def finished(self, job_id: str, within_s: float = 300.0) -> dict[str, Any]:
        """Wait for the job's end and return it; fails if it did not succeed."""
        job = dict(until(lambda: self.ended(job_id), within_s=within_s, what=job_id))
        assert job["status"] == "succeeded", job["failure"]
        return job

    def ended(self, job_id: str) -> Any:
        """Return the job if it has ended, else None."""
        job = self.client.jobs.get(job_id)
        return job if job["status"] in ENDED else None

    def outcome(self, job_id: str) -> dict[str, Any]:
        """Return a job's results without ids and times, which differ between equal jobs."""
        jobs = self.client.jobs
        metrics = {
            (one["subject"], one["step"]): {name: value for name, value in one["values"].items() if "loss" in name}
            for one in jobs.metrics(job_id)
        }
        return {
            "weights": {
                one["name"]: one["sha256"] for one in jobs.artifacts(job_id) if one["name"].endswith(".safetensors")
            },
            "metrics": metrics,
            "evaluations": [(one["subject"], one["epoch"], one["metrics"]["ap"]) for one in jobs.evaluations(job_id)],
        }

    def expected(self, epochs: int) -> dict[str, Any]:
        """Return the results of a job of this many epochs without faults."""
        if epochs not in self._expected:
            job = self.finished(self.submit(epochs=epochs))
            assert job["attempt"] == 1
            self._expected[epochs] = found = self.outcome(job["id"])
            assert {step for _, step in found["metrics"]} >= {STEPS_AN_EPOCH * epoch for epoch in range(1, epochs + 1)}
            assert set(found["weights"]) == {"student-best.safetensors", "student-last.safetensors"}
        return self._expected[epochs]

    def judged(self, jobs: list[str], *, epochs: int, within_s: float) -> Report:
        """Wait for the jobs and return their report."""
        expected, report = self.expected(epochs), Report(jobs=len(jobs))
        until(lambda: all(map(self.ended, jobs)), within_s=within_s, what=f"the end of {len(jobs)} jobs")
        for job_id in jobs:
            job = self.client.jobs.get(job_id)
            report.attempts += job["attempt"]
            codes = Counter(event["code"] for event in self.client.jobs.events(job_id))
            if job["status"] != "succeeded":
                report.lost += 1
                report.wrong.append(f"{job_id}: {job['status']} {job['failure']}")
                continue
            if codes["succeeded"] != 1:
                report.doubled += 1
                report.wrong.append(f"{job_id}: ended {codes['succeeded']} times")
            found = self.outcome(job_id)
            if different := [name for name, value in expected.items() if found[name] != value]:
                report.wrong.append(f"{job_id}: other {', '.join(different)} than without a fault")
            elif job["attempt"] > 1:
                report.resumed_identical += 1
        return report
