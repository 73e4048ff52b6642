"""The kernels of the neck loss without a GPU: interpreted, compiled, and left alone where Triton does not work."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from defeat.engine.methods import kernels, losses
from defeat.engine.methods.losses import decoupled_feature_loss
from tests.support.device_waits import fake_cuda

COMPUTE_CAPABILITIES = (80, 90)


@pytest.fixture(autouse=True)
def _nothing_remembered():
    losses._checked_kernels.cache_clear()
    yield
    losses._checked_kernels.cache_clear()


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_interpreted_they_are_the_formula(every):
    command = [sys.executable, "-m", "tests.support.kernel_cases", str(every)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def code_for(kernel, capability, tile, dense, dtypes, *, wide):
    """Compile a kernel as a launch would have it compiled, and return its PTX.

    `dense` says of the student and of the teacher whether cells or channels lie side by side.
    """
    pointers = {"student": dtypes[0], "teacher": dtypes[1], "result": dtypes[0], "kinds": "u8"}
    pointers |= {"parts": "fp32", "incoming": "fp32"}
    fixed = {"TILE_CHANNELS": tile[0], "TILE_CELLS": tile[1], "WIDE": wide, "OBJECT": 2, "BACKGROUND": 1}
    fixed |= {f"{whose}_{side}": 1 for whose, side in zip(("student", "teacher"), dense, strict=True)}
    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in fixed:
            signature[name] = "constexpr"
            continue
        signature[name] = f"*{pointers[name]}" if name in pointers else "i64" if wide and "image" in name else "i32"
        attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("capability", COMPUTE_CAPABILITIES)
@pytest.mark.parametrize(
    ("tile", "dense"),
    [
        (kernels._CELLS_DENSE, ("cell", "cell")),
        (kernels._CHANNELS_DENSE, ("channel", "channel")),
        (kernels._MIXED, ("cell", "channel")),
    ],
)
def test_they_compile_for_gpus_and_move_16_bytes_at_a_time(monkeypatch, tmp_path, tile, dense, capability, wide):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for dtypes in (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp32")):
        for kernel in (kernels._sums, kernels._gradient):
            code = code_for(kernel, capability, tile, dense, dtypes, wide=wide)
            assert "ld.global.v4.b32" in code
            assert "atom" not in code
        assert "st.global.v4.b32" in code
        assert ("cvt.rn.bf16" in code) == (dtypes[0] == "bf16")


def maps(dtypes=(torch.float32, torch.float32)):
    """A student's and a teacher's map and their kinds, on a GPU that is not there."""
    student, teacher = (torch.empty(2, 8, 4, 5, dtype=dtype, device="cuda") for dtype in dtypes)
    return student, teacher, torch.empty(2, 4, 5, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_launch_waits_for_nothing(monkeypatch, dtype):
    launched = []
    monkeypatch.setattr(kernels._Launch, "__call__", lambda self, kernel, *given: launched.append(kernel))
    with fake_cuda() as waits:
        student, teacher, kinds = maps((dtype, torch.float32))
        student = student.to(memory_format=torch.channels_last)
        sums = kernels.squared_sums(student, teacher, kinds)
        gradient = kernels.gradient_of_sums(student, teacher, kinds, torch.empty(2, device="cuda"))
    assert (sums.shape, sums.dtype) == ((2,), torch.float32)
    assert (gradient.shape, gradient.dtype, gradient.stride()) == (student.shape, dtype, student.stride())
    assert launched == [kernels._sums, kernels._gradient]
    assert waits.found == []


def test_maps_of_a_gpu_go_to_the_kernels_and_others_block_by_block(monkeypatch):
    checked = []
    monkeypatch.setattr(kernels, "check", checked.append)
    single, half, double = torch.float32, torch.bfloat16, torch.float64
    with fake_cuda():
        for dtypes in ((single, single), (half, single), (single, half)):
            assert losses.kernels_for(*maps(dtypes)[:2]) is kernels
        for dtypes in ((double, single), (single, double)):
            assert losses.kernels_for(*maps(dtypes)[:2]) is None
    assert losses.kernels_for(torch.zeros(1), torch.zeros(1)) is None
    assert [device.type for device in checked] == ["cuda"]


def test_where_triton_does_not_work_the_loss_goes_block_by_block_and_says_so_once(monkeypatch):
    def fail(device):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "check", fail)
    with fake_cuda(), pytest.warns(UserWarning, match="block by block on cuda.*Failed to find C compiler"):
        parts = decoupled_feature_loss(*([one] for one in maps()))
    assert [part.dtype for part in parts] == [torch.float32] * 2
    with fake_cuda(), warnings.catch_warnings():
        warnings.simplefilter("error")
        decoupled_feature_loss(*([one] for one in maps()))


def test_a_kernel_that_computes_something_else_is_found(monkeypatch):
    monkeypatch.setattr(kernels._Launch, "__call__", lambda self, kernel, *given: given[-1].zero_())
    with pytest.raises(RuntimeError, match="compute something else on cpu"):
        kernels.check(torch.device("cpu"))
