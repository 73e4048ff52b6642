"""The whole service in two minutes: `python -m examples.demo` (or `make demo`).

Starts the embedded stack, registers scenes of digits over HTTP, trains a small teacher, distils a smaller student with
DeFeat, downloads the student and detects with it. The last line printed is one JSON object.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from defeat.cli.console import Output
from defeat.cli.watching import JobView, show_results
from defeat.client.client import Client, ClientError
from defeat.client.specs import load_spec
from defeat.engine.detect import detect
from defeat.engine.report import RunError
from examples import digits

HOME = Path(".demo")
SPEC = Path(__file__).with_name("digits.yaml")
START_S = 60.0
STOP_S = 60.0


class DemoFailed(Exception):
    """What went wrong, for people."""


@contextmanager
def running_stack() -> Iterator[dict[str, str]]:
    """Run `defeat up` on a free port with its data under `HOME`; give its address and a new API key; end it after."""
    command = [
        str(Path(sys.executable).with_name("defeat")),
        "up",
        "--home",
        str(HOME),
        "--port",
        "0",
        "--json",
        "--new-key",
    ]
    HOME.mkdir(exist_ok=True)
    log = HOME / "stack.log"
    with log.open("w") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as stack:
        try:
            assert stack.stdout is not None
            line = stack.stdout.readline()  # ends too when the stack does
            if not line:
                stack.wait(START_S)
                raise DemoFailed(f"the stack did not start:\n{log.read_text()[-3000:]}")
            yield json.loads(line)
        finally:
            stack.terminate()
            stack.wait(STOP_S)


def run(out: Output) -> dict[str, Any]:
    """Do everything and return what the last line says."""
    started = time.monotonic()
    with running_stack() as address, Client(address["url"], address["api_key"]) as client:
        out.line(f"the service runs at {address['url']}")
        with tempfile.TemporaryDirectory() as directory:
            dataset = client.datasets.add(digits.build(Path(directory), val_scenes=60), name="digits")
        dataset = client.datasets.wait(dataset["id"])
        if dataset["status"] != "ready":
            raise DemoFailed(f"the dataset is {dataset['status']}: {dataset['failure']}")
        out.line(f"the dataset {dataset['id']} is ready: {dataset['splits']}")

        job = client.jobs.submit(load_spec(SPEC, [f"dataset={dataset['id']}"]))
        with JobView(out) as view:
            for update in client.jobs.watch(job["id"]):
                view.show(update)
                job = update["job"]
        if job["status"] != "succeeded":
            out.failure(f"{job['id']} {job['status']}", job["failure"])
            raise DemoFailed(f"the job {job['id']} {job['status']}")
        show_results(out, job)

        student = client.jobs.download(job["id"], "student-best.safetensors", HOME / "student.safetensors")
        image = _a_image(client, job["id"])
        detected = HOME / "detected.png"
        found = detect(student, image, output=detected, min_score=0.5)
        out.line(f"the student finds {len(found)} digits in {image}: " + " ".join(one["class"] for one in found))
        out.line(f"with boxes: {detected}")
        out.line(f"the job's page was {address['dashboard'].rstrip('/')}/jobs/{job['id']}; the stack ends now")
        out.line(f"to look around: `.venv/bin/defeat up --home {HOME} --new-key`, then open the address it prints")
    results = job["results"] or {}
    return {
        "demo": "ok",
        "teacher_map": results["teacher"]["ap"],
        "student_map": results["student"]["ap"],
        "teacher_ap50": results["teacher"]["ap50"],
        "student_ap50": results["student"]["ap50"],
        "seconds": round(time.monotonic() - started, 1),
        "checkpoint": str(student),
    }


def _a_image(client: Client, job_id: str) -> Path:
    """Download a validation image: the first of the job's gallery."""
    name = min(one["name"] for one in client.jobs.artifacts(job_id) if one["name"].startswith("gallery/"))
    return client.jobs.download(job_id, name, HOME / Path(name).name)


def main() -> int:
    """Run the demo; return the exit code."""
    try:
        summary = run(Output(as_json=False))
    except (DemoFailed, ClientError, RunError, OSError, subprocess.TimeoutExpired) as error:
        print(json.dumps({"demo": "failed", "reason": str(error)}))
        return 1
    except KeyboardInterrupt:
        print(json.dumps({"demo": "failed", "reason": "interrupted"}))
        return 130
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
