"""The parts of `benchmarks.gpu` that are whole runs: the digits example, one that is killed, and one on two ranks.

    python -m benchmarks.gpu_runs [--seeds 0 1 2]

computes the values of `CPU_AP`: it runs the digits example on the CPU, once for each seed, with one thread, and prints
the APs as one JSON object. Three runs take five minutes.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.gpu_setups import FULL, ROOT, Example, Found, Setting, Skipped
from defeat.engine.data import canonical
from examples import digits

Spec = dict[str, Any]

CPU_AP: Final[Mapping[int, float]] = {0: 0.4241, 1: 0.4599, 2: 0.4866}
"""The student's AP, 0 to 1, of the digits example on a CPU, by seed: what the command above printed."""
POLL_S = 0.02
GRACE_S = 20.0
_IMPORT_SPEC = {"max_dropped_fraction": 0.0, "max_unpacked_bytes": 2**30, "max_unpacked_files": 10_000}
# Two ranks sample other proposals than one, and normalise over their own halves of a batch.
LOSS_TOLERANCE = 0.15


class RunFailed(Exception):
    """A run failed; the message has its name and the reason."""


def make_dataset(home: Path, example: Example) -> Path:
    """Return the example's canonical dataset; it is made in `home` unless it is there.

    Raises:
        RunFailed: it could not be imported.
    """
    made = home / "digits"
    if not made.exists():
        for part in ("scenes", "import", "digits.part"):
            shutil.rmtree(home / part, ignore_errors=True)
        scenes = digits.build(home / "scenes", train_scenes=example.train, val_scenes=example.val)
        imported = Run(home / "import", "import_dataset", _IMPORT_SPEC, {"archive": None, "directory": str(scenes)})
        imported.finish(timeout_s=120)
        canonical.unpack(home / "import" / "artifacts" / "dataset.tar", home / "digits.part")
        (home / "digits.part").rename(made)
    return made


def inputs(dataset: Path, device: str, *, resume: Path | None = None) -> Spec:
    """Return the inputs of a run that trains its own teacher."""
    others = {"teacher": None, "student": None, "teacher_initial": None, "image_memory_bytes": None}
    return {"dataset": str(dataset), **others, "resume": resume and str(resume), "device": device}


class Run:
    """One run in its own process, `python -m defeat.engine.run`, with one CPU thread.

    Attributes:
        directory: its run directory.
    """

    def __init__(self, directory: Path, kind: str, spec: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        """Start it."""
        self.directory = directory
        directory.mkdir(parents=True)
        request = {"kind": kind, "id": directory.name, "attempt": 1, "spec": spec, "inputs": given}
        (directory / "run.json").write_text(json.dumps(request))
        with (directory / "log.txt").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "defeat.engine.run", str(directory)],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return its events of one type up to now."""
        path = self.directory / "events.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in events if event["type"] == kind]

    def finish(self, *, timeout_s: float) -> dict[str, Any]:
        """Wait for its end and return its results.

        Raises:
            RunFailed: it failed, or took longer than `timeout_s`; it is killed then.
        """
        try:
            self._process.wait(timeout_s)
        except BaseException as error:
            self.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                raise RunFailed(f"{self.directory.name} did not end in {timeout_s:.0f} s") from error
            raise
        path = self.directory / "result.json"
        result = json.loads(path.read_text()) if path.exists() else None
        if result is None or result["status"] != "succeeded":
            log = (self.directory / "log.txt").read_text(errors="replace").strip()
            reason = result["failure"]["detail"] if result else log[-300:]
            raise RunFailed(f"{self.directory.name}: {reason}")
        return dict(result["results"])

    def kill(self) -> None:
        """End it at once, by SIGKILL: it saves nothing."""
        self._process.kill()
        self._process.wait(GRACE_S)

    def kill_after_checkpoints(self, count: int, *, timeout_s: float) -> Path:
        """Kill it as soon as it has offered so many training checkpoints; return the last one.

        Raises:
            RunFailed: it ended before that, or took longer than `timeout_s`.
        """
        begun = time.monotonic()
        try:
            while len(found := self.events("checkpoint")) < count:
                if self._process.poll() is not None:
                    raise RunFailed(f"{self.directory.name} ended after {len(found)} checkpoints")
                if time.monotonic() - begun > timeout_s:
                    raise RunFailed(f"{self.directory.name} offered {len(found)} checkpoints in {timeout_s:.0f} s")
                time.sleep(POLL_S)
        finally:
            self.kill()
        return self.directory / found[-1]["path"]


# ---- the parts ----


def in_spread(ap: float) -> bool:
    """Return whether an AP is within the spread of those on the CPU (highest minus lowest) around their mean."""
    known = CPU_AP.values()
    return abs(ap - statistics.fmean(known)) <= max(known) - min(known)


def _distil(setting: Setting, name: str, spec: Spec, *, resume: Path | None = None) -> Run:
    dataset = make_dataset(setting.home, setting.example)
    return Run(setting.home / name, "distill", spec, inputs(dataset, setting.device.type, resume=resume))


def _student(run: Run, *, seconds: float, begun: float) -> dict[str, Any]:
    """Wait for a run, and return its student's AP, the seconds it took since `begun`, and its steps' speed."""
    results = run.finish(timeout_s=seconds)
    rates = [event["values"]["images_per_s"] for event in run.events("metrics") if event["subject"] == "student"]
    return {
        "ap": round(results["student"]["ap"] or 0.0, 4),
        "seconds": round(time.monotonic() - begun, 1),
        "images_per_s": round(statistics.median(rates), 1),
    }


def digits_run(setting: Setting) -> Found:
    """Train teacher and student of the digits example in a run directory; the student's AP must be as on the CPU."""
    begun = time.monotonic()
    run = _distil(setting, "whole", setting.example.spec(seed=0))
    found = _student(run, seconds=setting.deadline.left, begun=begun)
    return Found(
        measured={**found, "cpu_ap": list(CPU_AP.values())},
        goal="AP at most the spread of the CPU's seeds from their mean",
        met=in_spread(found["ap"]),
    )


def killed_run(setting: Setting) -> Found:
    """Kill the same run after the first checkpoint of the student's training, resume from it, and compare the AP.

    `equal_bytes`: whether the student equals the uninterrupted run's to the last bit, which a GPU does not guarantee;
    null without that run.
    """
    begun = time.monotonic()
    spec = setting.example.spec(seed=0)
    # Each epoch but the last ends with a checkpoint.
    count = int(spec["teacher"]["schedule"]["epochs"])
    killed = _distil(setting, "killed", spec)
    checkpoint = killed.kill_after_checkpoints(count, timeout_s=setting.deadline.left)
    resumed = _distil(setting, "resumed", spec, resume=checkpoint)
    found = _student(resumed, seconds=setting.deadline.left, begun=begun)
    weights = [setting.home / name / "artifacts" / "student-last.safetensors" for name in ("whole", "resumed")]
    known = weights[0].exists()
    resumed_at = [event["message"] for event in resumed.events("message") if event["code"] == "resumed"]
    return Found(
        measured={
            **found,
            "resumed": resumed_at,
            "equal_bytes": weights[0].read_bytes() == weights[1].read_bytes() if known else None,
        },
        goal="resumed once; AP at most the spread of the CPU's seeds from their mean",
        met=len(resumed_at) == 1 and in_spread(found["ap"]),
    )


def ranks_run(setting: Setting) -> Found:
    """Train the example's student alone for one epoch on one rank and on two: the losses must be similar.

    Raises:
        Skipped: there are fewer than two GPUs.
    """
    if setting.device.type == "cuda" and torch.cuda.device_count() < 2:
        raise Skipped(f"there are {torch.cuda.device_count()} GPUs, and two are needed")
    spec = setting.example.spec(seed=0)
    schedule = {**spec["schedule"], "epochs": 1}
    spec |= {"teacher": None, "distillation": {"method": "baseline"}, "schedule": schedule}
    rows, losses = {}, []
    for count in (1, 2):
        begun = time.monotonic()
        run = _distil(setting, f"ranks-{count}", {**spec, "resources": {"gpus": count}})
        rows[f"ranks_{count}"] = _student(run, seconds=setting.deadline.left, begun=begun)
        losses.append(run.events("metrics")[0]["values"]["loss/total"])
    apart = abs(losses[1] / losses[0] - 1)
    return Found(
        measured={**rows, "first_losses": [round(loss, 4) for loss in losses], "apart": round(apart, 4)},
        goal={"apart": LOSS_TOLERANCE},
        met=apart <= LOSS_TOLERANCE,
    )


def kernel(setting: Setting) -> Found:
    """Run the neck loss's own benchmark, in its own process.

    Raises:
        RunFailed: it printed no result.
    """
    command = [sys.executable, "-m", "benchmarks.loss_kernel", "--device", setting.device.type, "--quick"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=max(setting.deadline.left, 1), check=False
    )
    last = done.stdout.strip().rsplit("\n", 1)[-1]
    if not last.startswith("{"):
        raise RunFailed(done.stderr.strip().rsplit("\n", 1)[-1][:300])
    result = json.loads(last)
    goals = {name: result.pop(name) for name in list(result) if name.endswith("goal")}
    return Found(measured=result, goal=goals, met=bool(result.pop("ok")))


def main(arguments: Sequence[str]) -> int:
    """Carry out the runs, print the APs and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_runs", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the jobs (default: 0 1 2)")
    seeds = parser.parse_args(arguments).seeds
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        dataset = make_dataset(home, FULL)
        for seed in seeds:
            begun = time.monotonic()
            run = Run(home / f"seed-{seed}", "distill", FULL.spec(seed=seed), inputs(dataset, "cpu"))
            found[seed] = run.finish(timeout_s=3600)["student"]["ap"]
            print(f"seed {seed}: AP {found[seed]:.4f}, {time.monotonic() - begun:.0f} s", flush=True)
    print(
        json.dumps(
            {"cpu_ap": {seed: round(ap, 4) for seed, ap in found.items()}, "mean": statistics.fmean(found.values())}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
