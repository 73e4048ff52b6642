"""The hardware that this machine has for jobs, and the memory that it ran out of. No torch: `nvidia-smi` lists GPUs."""

import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog

from app.db import utcnow
from app.ids import new_id
from app.models import Worker
from app.settings import Settings

log = structlog.get_logger(__name__)

_QUERY = ("--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits")
_ANSWER_S = 20.0
_MIB_PER_GB = 1e9 / 2**20
_OWN_CGROUPS: Final = Path("/proc/self/cgroup")
_CGROUPS: Final = Path("/sys/fs/cgroup")


def gpu_memories_gb(device: str) -> list[float]:
    """Return the memory of each GPU that runs on `device` (auto, cpu, cuda or cuda:N) may use, GB.

    It respects `CUDA_VISIBLE_DEVICES`, by index or by UUID, as the runs do. Empty where there is no driver.
    """
    command = shutil.which("nvidia-smi")
    if device == "cpu" or command is None:
        return []
    try:
        answer = subprocess.run([command, *_QUERY], capture_output=True, text=True, timeout=_ANSWER_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("no_answer_from_nvidia_smi", error=str(error))
        return []
    visible = _visible(answer.stdout.splitlines(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if device.startswith("cuda:"):
        number = int(device.removeprefix("cuda:"))
        visible = visible[number : number + 1]
    return visible


def _visible(lines: Sequence[str], chosen: str | None) -> list[float]:
    memories: dict[str, float] = {}
    order: list[str] = []
    for line in lines:
        index, uuid, mebibytes = (part.strip() for part in line.split(","))
        # Some machines with unified memory report no number.
        memory = float(mebibytes) / _MIB_PER_GB if mebibytes.replace(".", "").isdigit() else 0.0
        memories |= {index: memory, uuid: memory}
        order.append(index)
    wanted = order if chosen is None else [name.strip() for name in chosen.split(",") if name.strip()]
    found: list[float] = []
    for name in wanted:
        full = (
            name
            if name in memories
            else next((uuid for uuid in memories if not uuid.isdigit() and uuid.startswith(name)), None)
        )
        if full is None:
            break  # as CUDA does: it ignores every name after an unknown one
        found.append(round(memories[full], 1))
    return found


def memory_kills() -> int | None:
    """Return how many processes of this process's control group the kernel has killed so far for lack of memory.

    That includes the memory of the machine and the limit of the group; runs are in their worker's group. None where the
    count is unknown: not on Linux, not in a control group, or no permission to read it.
    """
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, name = _CGROUPS, "memory.events"
        elif "memory" in controllers.split(","):
            mount, name = _CGROUPS / "memory", "memory.oom_control"  # of version 1
        else:
            continue
        # In a container the path may be the one on the host, while only the own group is mounted.
        for file in (mount / path.lstrip("/") / name, mount / name):
            kills = _counted(file, "oom_kill")
            if kills is not None:
                return kills
    return None


def _counted(file: Path, name: str) -> int | None:
    try:
        words = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return None
    return next((int(value) for key, value in words if key == name), None)


def describe(settings: Settings, *, name: str, queues: Sequence[str]) -> Worker:
    """Return the row that registers this worker, with a new id; it belongs to no session."""
    memories, host = gpu_memories_gb(settings.device), socket.gethostname()
    on_gpu = bool(memories)
    processes = settings.gpus if settings.gpus is not None else len(memories) or os.cpu_count() or 1
    return Worker(
        id=new_id("wkr"),
        name=f"{name}@{host}"[:200],
        host=host[:200],
        queues=list(queues),
        labels=sorted(set(settings.labels)),
        device="cuda" if on_gpu else "cpu",
        gpus=len(memories),
        gpu_memory_gb=min(memories) if on_gpu else None,
        processes=processes,
        draining=False,
        started_at=utcnow(),
        seen_at=utcnow(),
    )
