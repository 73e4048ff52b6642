"""How a run begins, what it imports and what not; and what becomes of errors that it did not foresee."""

import errno
import subprocess
import sys

import pytest
import torch

from defeat.engine.run import _as_run_error

LOADED = """
import gc, sys
from defeat.engine.run import _entry
_entry("distill")
assert gc.isenabled() and gc.get_freeze_count() > 100_000, gc.get_freeze_count()
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def test_a_run_imports_only_what_it_may_need() -> None:
    ended = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True, timeout=120)
    loaded = set(ended.stdout.split())
    assert {"torch", "torchvision"} <= loaded
    assert not loaded & {"timm", "huggingface_hub", "sklearn", "scipy", "pandas", "pycocotools", "celery", "sqlalchemy"}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.25 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_that_ran_out(error: Exception) -> None:
    failure = _as_run_error(error)
    assert (failure.failure_class, failure.code) == ("oom", "out_of_memory")
    assert failure.detail.startswith("the ")


def test_the_cpus_allocator_is_known() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert _as_run_error(raised.value).failure_class == "oom"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left", "x.pt"), "disk_full"),
        (RuntimeError("shapes differ"), "unexpected_error"),
    ],
)
def test_what_the_machine_did(error: Exception, code: str) -> None:
    failure = _as_run_error(error)
    assert (failure.failure_class, failure.code) == ("infra", code)
