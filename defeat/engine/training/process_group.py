"""The processes that train together: one for each GPU, or one alone."""

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
STEP_PATIENCE = timedelta(minutes=15)
# And where one of them may have many more images to measure, or computes metrics while the others wait for it.
PATIENCE = timedelta(hours=2)
# What NCCL may want to exchange gradients, and where; a container has 64 MiB there unless it is told otherwise.
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
LEAST_SHARED_MEMORY = 2**29


@dataclass(frozen=True)
class ProcessGroup:
    """Which of how many processes this is. All see the same spec, seed and files; the first one reports and saves.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
        by_cpu: the group that exchanges objects; None alone.
    """

    rank: int = 0
    size: int = 1
    by_cpu: distributed.ProcessGroup | None = None

    @classmethod
    def join(cls, device: torch.device) -> "ProcessGroup":
        """Meet the others, as the environment says who they are: torchrun's, or that of `defeat.engine.ranks`."""
        # What asks for "the GPU" is to get the run's, also where that is not the first.
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
            timeout=STEP_PATIENCE,
            # NCCL then connects at once, and reports a GPU that it cannot use here and not in the first step.
            device_id=device if on_gpu else None,
        )
        # What is no tensor goes by way of the CPU: NCCL would have to copy its bytes onto each GPU.
        return cls(rank, size, cast(distributed.ProcessGroup, distributed.new_group(backend="gloo", timeout=PATIENCE)))

    @property
    def is_single(self) -> bool:
        """Whether there is one process only."""
        return self.size == 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that saves."""
        return self.rank == 0

    def __enter__(self) -> "ProcessGroup":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_single:
            distributed.destroy_process_group()

    def wrap(self, module: nn.Module, device: torch.device, *, unused: bool) -> nn.Module:
        """Return the module with its gradients averaged over all processes.

        Args:
            module: what is trained.
            device: where.
            unused: whether a process's share of a batch may leave parameters without a gradient. To look for them in
                each step delays the exchange.
        """
        if self.is_single:
            return module
        return DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            find_unused_parameters=unused,
            # The gradients are views of what is exchanged, and not copied there.
            gradient_as_bucket_view=True,
        )

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of `values` over all processes."""
        if not self.is_single:
            distributed.all_reduce(values)
            values /= self.size
        return values

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite `tensors` by the first process's: statistics of batch norm are those of each one's own images."""
        if not self.is_single:
            for tensor in tensors:
                distributed.broadcast(tensor, src=0)

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, by rank."""
        if self.is_single:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self.by_cpu)
        return values


def warn_of_little_shared_memory(group: ProcessGroup, device: torch.device, reporter: Reporter) -> None:
    """Warn where several GPUs would exchange gradients through too little shared memory."""
    if group.is_single or device.type != "cuda" or not SHARED_MEMORY.exists():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < LEAST_SHARED_MEMORY:
        reporter.message(
            "warn",
            "little_shared_memory",
            f"{free / 2**20:.0f} MiB are free in {SHARED_MEMORY}, and NCCL may want {LEAST_SHARED_MEMORY / 2**20:.0f} "
            "to exchange gradients between GPUs: give the container 1 GiB (shm_size, or a Memory emptyDir)",
        )


def local_device(name: str) -> torch.device:
    """Return the device that `name` asks for; `auto` is a GPU, or the CPU where there is none.

    Of several processes on one machine each takes the GPU of its own number.

    Raises:
        RunError: `device_unavailable` if a GPU is asked for and torch sees none; `too_few_gpus` if there are more
            processes than GPUs.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda"):
        return torch.device(name)
    if not torch.cuda.is_available():
        raise RunError("infra", "device_unavailable", f"the device {name} was asked for, and torch sees no GPU here")
    if "LOCAL_RANK" not in os.environ:
        return torch.device(name)
    rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if rank >= gpus:
        processes = os.environ["LOCAL_WORLD_SIZE"]
        raise RunError(
            "infra", "too_few_gpus", f"resources.gpus is {processes}, and this worker's slot has {gpus}; ask for fewer"
        )
    return torch.device("cuda", rank)
