"""What becomes of errors that a run did not foresee."""

import errno

import pytest
import torch

from worker.run import _as_run_error


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
