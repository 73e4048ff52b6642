import os
from pathlib import Path

import pytest

from app.settings import Settings
from worker import hardware

THREE = "0, GPU-aa11, 24564\n1, GPU-bb22, 81559\n2, GPU-cc33, [N/A]\n"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Replace `nvidia-smi` by a program with this output and exit code."""

    def _install(text: str, code: int = 0) -> None:
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\nexit {code}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return _install


@pytest.mark.parametrize(
    ("device", "visible", "memories"),
    [
        ("auto", None, [25.8, 85.5, 0.0]),
        ("cpu", None, []),
        ("cuda:1", None, [85.5]),
        ("cuda:7", None, []),
        ("cuda", "1,0", [85.5, 25.8]),
        ("cuda:1", "1,0", [25.8]),
        ("auto", "GPU-bb", [85.5]),
        ("auto", "0,9,1", [25.8]),
        ("auto", "", []),
    ],
)
def test_gpus_are_those_that_runs_may_use(
    smi, monkeypatch: pytest.MonkeyPatch, device: str, visible: str | None, memories: list[float]
):
    smi(THREE)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware.gpu_memories_gb(device) == memories


def test_a_driver_that_does_not_answer_is_no_gpu(smi):
    smi("Failed to initialize NVML\n", code=9)
    assert hardware.gpu_memories_gb("auto") == []


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Replace the kernel's files: the list of this process's groups, and one counter."""

    def _install(own: str, file: str, text: str) -> None:
        monkeypatch.setattr(hardware, "_OWN_CGROUPS", tmp_path / "own")
        monkeypatch.setattr(hardware, "_CGROUPS", tmp_path / "cgroup")
        (tmp_path / "own").write_text(own)
        (tmp_path / "cgroup" / file).parent.mkdir(parents=True)
        (tmp_path / "cgroup" / file).write_text(text)

    return _install


EVENTS = "low 0\nhigh 0\nmax 9\noom 8\noom_kill 7\noom_group_kill 0\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"
VERSION_1 = "9:name=systemd:/a:b\n4:cpu,memory:/a:b/c\n0::/\n"


@pytest.mark.parametrize(
    ("own", "file", "text", "kills"),
    [
        ("0::/a.slice/b c.service\n", "a.slice/b c.service/memory.events", EVENTS, 7),
        ("0::/\n", "memory.events", EVENTS, 7),  # a container of version 2
        (VERSION_1, "memory/a:b/c/memory.oom_control", CONTROL, 7),
        (VERSION_1, "memory/memory.oom_control", CONTROL, 7),  # a container of version 1
        (VERSION_1, "memory/a:b/c/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n", None),  # before Linux 4.13
        ("0::/\n", "cgroup.procs", "1\n", None),  # the root group of version 2 has no counter
        ("3:cpuset:/\n", "memory.events", EVENTS, None),
        ("", "memory.events", EVENTS, None),
    ],
)
def test_kills_for_memory_are_counted_where_the_kernel_says(cgroups, own: str, file: str, text: str, kills: int | None):
    cgroups(own, file, text)
    assert hardware.memory_kills() == kills


def test_a_system_without_groups_counts_no_kills(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(hardware, "_OWN_CGROUPS", tmp_path / "nothing")
    assert hardware.memory_kills() is None


def test_a_worker_describes_itself(smi, tmp_path: Path):
    smi("0, GPU-aa11, 24564\n1, GPU-bb22, 81559\n")
    worker = hardware.describe(Settings(home=tmp_path, labels=["lab", "lab"]), name="w", queues=["jobs"])
    assert (worker.device, worker.gpus, worker.processes, worker.gpu_memory_gb) == ("cuda", 2, 2, 25.8)
    assert (worker.labels, worker.queues) == (["lab"], ["jobs"])
    assert hardware.describe(Settings(home=tmp_path, gpus=1), name="w", queues=[]).processes == 1
    alone = hardware.describe(Settings(home=tmp_path, device="cpu"), name="w", queues=[])
    assert (alone.device, alone.gpus, alone.processes, alone.gpu_memory_gb) == ("cpu", 0, os.cpu_count(), None)
