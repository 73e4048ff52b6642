"""What this machine has for jobs. No torch: GPUs are asked of `nvidia-smi`."""

import os
import shutil
import socket
import subprocess
from collections.abc import Sequence

import structlog

from app.db import utcnow
from app.ids import new_id
from app.models import Worker
from app.settings import Settings

log = structlog.get_logger(__name__)

_QUERY = ("--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits")
_ANSWER_S = 20.0
_MIB_PER_GB = 1e9 / 2**20


def gpu_memories_gb(device: str) -> list[float]:
    """Return the memory of each GPU that runs on `device` (auto, cpu, cuda or cuda:N) may use, GB.

    `CUDA_VISIBLE_DEVICES` counts, by number or by uuid, as it does for the runs. Empty where there is no driver.
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
        # Some machines with unified memory have no number to give.
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
            break  # CUDA too ignores what comes after a name that it does not know
        found.append(round(memories[full], 1))
    return found


def describe(settings: Settings, *, name: str, queues: Sequence[str]) -> Worker:
    """Return this worker as it is registered, with a new id; it is in no session."""
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
