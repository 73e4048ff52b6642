"""One run: directory in, directory out. `python -m worker.run DIR`; see docs/architecture.md for the format.

Exit code 0: succeeded; 1: failed, with the reason in result.json; 3: cancelled.
"""

import errno
import importlib
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from worker.report import Cancelled, Reporter, RunError

Entry = Callable[[Mapping[str, Any], Mapping[str, Any], Reporter], dict[str, Any]]

# By name, so that importing a dataset does not wait for torch.
ENTRIES: dict[str, str] = {
    "distill": "worker.engine.distill:run",
    "import_dataset": "worker.data.importer:run",
    "check_checkpoint": "worker.detectors.check:run",
}


def _entry(kind: str) -> Entry:
    if kind not in ENTRIES:
        raise RunError("user", "unknown_kind", f"unknown run kind {kind!r}; known: {', '.join(ENTRIES)}")
    module, name = ENTRIES[kind].split(":")
    return cast(Entry, getattr(importlib.import_module(module), name))


def _as_run_error(error: Exception) -> RunError:
    """Give an unforeseen exception its class; the traceback is in the log."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's: not imported here
        return RunError("oom", "out_of_memory", f"{error}; lower schedule.batch_size or the detector's image size")
    if isinstance(error, MemoryError):
        return RunError("oom", "out_of_memory", "the machine's memory is exhausted; lower schedule.batch_size")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return RunError("infra", "disk_full", f"could not write {error.filename or 'a file'}: {error.strerror}")
    return RunError("infra", "unexpected_error", f"{type(error).__name__}: {error}"[:2000])


def main(directory: Path) -> int:
    """Carry out the run that `directory` describes and return the exit code."""
    request = json.loads((directory / "run.json").read_text())
    reporter = Reporter(directory)
    reporter.listen_for_cancel()
    try:
        results = _entry(request["kind"])(request["spec"], request["inputs"], reporter)
    except Cancelled:
        reporter.finish("cancelled")
        return 3
    except RunError as error:
        traceback.print_exc()
        reporter.finish("failed", failure=error)
        return 1
    except Exception as error:
        traceback.print_exc()
        reporter.finish("failed", failure=_as_run_error(error))
        return 1
    reporter.finish("succeeded", results=results)
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m worker.run DIRECTORY (with a run.json)")
    sys.exit(main(Path(sys.argv[1]).resolve()))
