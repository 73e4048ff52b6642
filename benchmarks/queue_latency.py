"""Queue latency: from a request to a worker's claim, on an idle embedded stack.

    python -m benchmarks.queue_latency [--quick]

Starts the stack in a temporary directory and creates datasets by reference, one after the other, each when the last one
has been checked (they are empty directories, so that the check soon ends as `invalid`). The latency is `started_at`,
written by the worker's claim, minus `created_at`, written by the request before its commit and its message: both by
this machine's clock. Jobs take the same path as these checks.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from defeat.client.client import Client

GOAL_MS: Final = 50.0
IDLE_S: Final = 0.3
STOP_S: Final = 60.0


@contextmanager
def stack(home: Path, data: Path) -> Iterator[Client]:
    """Run the embedded stack with its files in `home` and datasets in `data`; yield a client."""
    command = [sys.executable, "-m", "app.stack", "--port", "0", "--json", "--new-key"]
    environment = os.environ | {"DEFEAT_HOME": str(home), "DEFEAT_DATASET_ROOTS": json.dumps([str(data)])}
    log = home.with_suffix(".log")
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the stack did not start:\n{log.read_text()[-3000:]}")
            address = json.loads(line)
            with Client(address["url"], address["api_key"]) as client:
                yield client
        finally:
            process.terminate()
            process.wait(STOP_S)


def latency_ms(client: Client, directory: Path) -> float:
    """Create a dataset, wait for the end of its check, and return how long its worker took to begin, in ms."""
    made = client.datasets.wait(client.datasets.add(directory.as_uri())["id"])
    assert made["started_at"] is not None, made
    created, started = datetime.fromisoformat(made["created_at"]), datetime.fromisoformat(made["started_at"])
    return (started - created).total_seconds() * 1000


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and return the result."""
    parser = argparse.ArgumentParser(description="Time from a request to the claim.")
    parser.add_argument("--quick", action="store_true", help="8 samples instead of 40")
    samples = 8 if parser.parse_args(arguments).quick else 40
    with tempfile.TemporaryDirectory(prefix="ql") as folder:
        data = Path(folder) / "data"
        data.mkdir()
        with stack(Path(folder) / "home", data) as client:
            latency_ms(client, data)  # the first one opens the connections
            times = []
            for _ in range(samples):
                time.sleep(IDLE_S)
                times.append(latency_ms(client, data))
    p50 = statistics.median(times)
    result = {
        "benchmark": "queue_latency",
        "p50_ms": round(p50, 1),
        "goal_ms": GOAL_MS,
        "ok": bool(p50 < GOAL_MS),
        "least_ms": round(min(times), 1),
        "most_ms": round(max(times), 1),
        "samples": samples,
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    sys.exit(0 if main()["ok"] else 1)
