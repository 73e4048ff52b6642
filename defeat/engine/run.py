"""One run: directory in, directory out. `python -m defeat.engine.run DIR`; see docs/architecture.md for the format.

Exit code 0: succeeded; 1: failed, with the reason in result.json; 3: cancelled.
"""

import errno
import gc
import importlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from defeat.engine import plugins, ranks
from defeat.engine.events import Status
from defeat.engine.report import Cancelled, Reporter, RunError, log

EXIT_CODES: dict[Status, int] = {"succeeded": 0, "failed": 1, "cancelled": 3}

Entry = Callable[[Mapping[str, Any], Mapping[str, Any], Reporter], dict[str, Any]]

# By name, so that importing a dataset does not import torch.
ENTRIES: dict[str, str] = {
    "distill": "defeat.engine.training.distill:run",
    "import_dataset": "defeat.engine.data.importing.importer:run",
    "check_checkpoint": "defeat.engine.detectors.check:run",
}


# Out of memory that torch raises as a plain RuntimeError: its CPU allocator, and libraries that call the driver.
_NO_MEMORY = (
    "DefaultCPUAllocator",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)


def _entry(kind: str) -> Entry:
    if kind not in ENTRIES:
        raise RunError("user", "unknown_kind", f"unknown run kind {kind!r}; known: {', '.join(ENTRIES)}")
    module, name = ENTRIES[kind].split(":")
    return cast(Entry, getattr(_imported(module), name))


def _imported(name: str) -> ModuleType:
    """Import a module with garbage collection off, and exempt its objects from later collections.

    torch makes some hundred thousand objects that all stay: garbage collection takes a seventh of the import's time,
    and some of the training's.
    """
    if name in sys.modules:
        return sys.modules[name]
    gc.disable()
    try:
        module = importlib.import_module(name)
        gc.freeze()
    finally:
        gc.enable()
    return module


def _as_run_error(error: Exception) -> RunError:
    """Return an unexpected exception as a `RunError` with its failure class; the traceback is in the log."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's: not imported here
        return RunError("oom", "out_of_memory", f"the GPU's memory is exhausted: {error}"[:2000])
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in _NO_MEMORY):
        return RunError("oom", "out_of_memory", f"the memory is exhausted: {error or 'an allocation failed'}"[:2000])
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return RunError("infra", "disk_full", f"could not write {error.filename or 'a file'}: {error.strerror}")
    return RunError("infra", "unexpected_error", f"{type(error).__name__}: {error}"[:2000])


class _Ending:
    """Writes a run's result once: from its own thread, or from the one that watches the other processes."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._lock = threading.Lock()
        self._ended = False

    def __call__(self, status: Status, **members: Any) -> bool:
        """Write the result, if none is written yet; return whether this call wrote it."""
        with self._lock:
            if self._ended:
                return False
            self._ended = True
            self._reporter.finish(status, **members)
            return True

    def by_another(self, failure: RunError) -> None:
        """End this process because another one has failed, for which it may be waiting."""
        if self("failed", failure=failure):
            os._exit(EXIT_CODES["failed"])


def _carry_out(request: Mapping[str, Any], reporter: Reporter, ending: _Ending, others: ranks.Others | None) -> Status:
    try:
        run = _entry(request["kind"])
        plugins.load()
        results = run(request["spec"], request["inputs"], reporter)
    except Cancelled:
        ending("cancelled")
        return "cancelled"
    except Exception as error:
        traceback.print_exc()
        named = error if isinstance(error, RunError) else None
        failure = named or (others and others.failure()) or _as_run_error(error)
        ending("failed", failure=failure)
        return "failed"
    ending("succeeded", results=results)
    return "succeeded"


def main(directory: Path) -> int:
    """Carry out the run that `directory` describes and return the exit code."""
    request = json.loads((directory / "run.json").read_text())
    ranks.die_with_the_first()
    reporter = Reporter(ranks.home(directory))
    reporter.listen_for_cancel()
    log(f"{request['kind']} {request.get('id')}, attempt {request.get('attempt')}, request {request.get('request_id')}")
    ending = _Ending(reporter)
    count = request["spec"].get("resources", {}).get("gpus", 1) if request["kind"] == "distill" else 1
    with ranks.started(directory, count) as others:
        if others:
            others.watch(ending.by_another)
        status = _carry_out(request, reporter, ending, others)
        if others and status == "failed":
            others.abandon()
    return EXIT_CODES[status]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m defeat.engine.run DIRECTORY (with a run.json)")
    sys.exit(main(Path(sys.argv[1]).resolve()))
