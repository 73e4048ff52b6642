"""The processes that train together: one for each GPU, or a single one."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from defeat.engine.ranks import MEET
from defeat.engine.report import Reporter, RunError

# How long a process waits for the others in a step. The slowest may be compiling, reading a cold disk or saving.
STEP_TIMEOUT = timedelta(minutes=15)
# How long it waits where one of them may have many more images to evaluate, or computes the metrics for all.
OBJECT_TIMEOUT = timedelta(hours=2)
# Where NCCL exchanges gradients between GPUs, and how much it may need; a container has 64 MiB there by default.
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
MIN_SHARED_MEMORY = 2**29


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run, and which one this is. All have the same spec, seed and files; rank 0 reports and saves.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
        by_cpu: torch's group for objects, over gloo; None for a single process.
    """

    rank: int = 0
    size: int = 1
    by_cpu: distributed.ProcessGroup | None = None

    @classmethod
    def join(cls, device: torch.device) -> "ProcessGroup":
        """Join the group that the environment describes: torchrun's, or that of `defeat.engine.ranks`."""
        # Code that asks for "cuda" must get the run's GPU, even if that is not the first one.
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        if "WORLD_SIZE" not in os.environ:
            return cls()
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        on_gpu = device.type == "cuda"
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"file://{os.environ[MEET]}" if MEET in os.environ else "env://",
            rank=rank,
            world_size=size,
            timeout=STEP_TIMEOUT,
            # NCCL then connects at once, and reports an unusable GPU here instead of in the first step.
            device_id=device if on_gpu else None,
        )
        # Objects are exchanged over the CPU: NCCL would have to copy their bytes onto each GPU.
        return cls(
            rank, size, cast(distributed.ProcessGroup, distributed.new_group(backend="gloo", timeout=OBJECT_TIMEOUT))
        )

    @property
    def is_single(self) -> bool:
        """Whether this is the only process."""
        return self.size == 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that reports and saves: rank 0."""
        return self.rank == 0

    def __enter__(self) -> "ProcessGroup":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_single:
            distributed.destroy_process_group()

    def wrap(self, module: nn.Module, device: torch.device, *, unused: bool) -> nn.Module:
        """Return the module with its gradients averaged over all processes.

        Args:
            module: the module to train.
            device: its device.
            unused: whether a process's share of a batch may leave parameters without a gradient. Searching for them in
                each step delays the exchange.
        """
        if self.is_single:
            return module
        return DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            find_unused_parameters=unused,
            # The gradients are views of the exchanged buckets: no copy.
            gradient_as_bucket_view=True,
        )

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of `values` over all processes; overwrites `values`."""
        if not self.is_single:
            distributed.all_reduce(values)
            values /= self.size
        return values

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite `tensors` with those of rank 0: each process has batch-norm statistics of its own images."""
        if not self.is_single:
            for tensor in tensors:
                distributed.broadcast(tensor, src=0)

    def gather(self, value: Any) -> list[Any]:
        """Return the value of each process, by rank."""
        if self.is_single:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self.by_cpu)
        return values


def warn_of_little_shared_memory(group: ProcessGroup, device: torch.device, reporter: Reporter) -> None:
    """Warn if several GPUs would exchange gradients through too little shared memory."""
    if group.is_single or device.type != "cuda" or not SHARED_MEMORY.exists():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < MIN_SHARED_MEMORY:
        reporter.message(
            "warn",
            "little_shared_memory",
            f"{free / 2**20:.0f} MiB are free in {SHARED_MEMORY}, and NCCL may need {MIN_SHARED_MEMORY / 2**20:.0f} "
            "MiB to exchange gradients between GPUs: give the container 1 GiB (shm_size, or a Memory emptyDir)",
        )


def local_device(name: str) -> torch.device:
    """Return the device named `name`; `auto` is a GPU, or the CPU if there is none.

    Each of several processes on one machine uses the GPU of its own number.

    Raises:
        RunError: `device_unavailable` if `name` is a GPU and torch finds none; `too_few_gpus` if there are more
            processes than GPUs.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda"):
        return torch.device(name)
    if not torch.cuda.is_available():
        raise RunError("infra", "device_unavailable", f"the device is {name}, and torch finds no GPU on this machine")
    if "LOCAL_RANK" not in os.environ:
        return torch.device(name)
    rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if rank >= gpus:
        processes = os.environ["LOCAL_WORLD_SIZE"]
        raise RunError(
            "infra",
            "too_few_gpus",
            f"resources.gpus is {processes}, and this worker's slot has {gpus}; request {gpus} or fewer",
        )
    return torch.device("cuda", rank)
