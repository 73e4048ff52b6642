"""The metrics that a worker counts and serves."""

from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from tests.support.waiting import until
from tests.support.worker_world import World
from worker.metrics import GpuCollector

SMI = """#!/bin/sh
echo "$@" > {told}
echo 'GPU-1, NVIDIA H200, 37, 1024, 143771'
echo 'GPU-2, "A, B", [N/A], 0, 143771'
"""


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_an_attempt_is_counted(tmp_path: Path) -> None:
    world = World(tmp_path / "home")
    before = value("defeat_attempt_seconds_count", kind="job", status="succeeded", failure_class="")
    waited = value("defeat_wait_seconds_count", kind="job")

    world.work(world.job(["finish", "succeeded", {}]))
    world.work(world.job(["fail", "data", "bad", "it is bad"]))

    assert value("defeat_attempt_seconds_count", kind="job", status="succeeded", failure_class="") == before + 1
    assert value("defeat_attempt_seconds_count", kind="job", status="failed", failure_class="data") >= 1
    assert value("defeat_wait_seconds_count", kind="job") == waited + 2
    assert value("defeat_working", kind="job") == 0


def test_a_second_attempt_is_counted_as_one_and_not_as_a_wait(tmp_path: Path) -> None:
    world = World(tmp_path / "home")
    again = value("defeat_claims_total", kind="job", again="yes")
    waited = value("defeat_wait_seconds_count", kind="job")
    world.work(world.job(["finish", "succeeded", {}], attempt=1))
    assert value("defeat_claims_total", kind="job", again="yes") == again + 1
    assert value("defeat_wait_seconds_count", kind="job") == waited


def test_a_lost_lease_is_counted(tmp_path: Path) -> None:
    world = World(tmp_path / "home")
    job = world.job(["event", "progress", "teacher", {"fraction": 0.1, "images_per_s": 21.5}], ["until_told"])
    before = value("defeat_leases_lost_total", kind="job")
    with world.working(job):
        until(lambda: value("defeat_images_per_second") == 21.5)
        assert value("defeat_working", kind="job") == 1
        world.set(job, attempt=7)
    assert value("defeat_leases_lost_total", kind="job") == before + 1
    assert (value("defeat_working", kind="job"), value("defeat_images_per_second")) == (0, 0)


def test_accelerators(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI.format(told=tmp_path / "told"))
    program.chmod(0o755)

    families = {family.name: family for family in GpuCollector(str(program)).collect()}

    assert "--query-gpu=uuid,name,utilization.gpu,memory.used,memory.total" in (tmp_path / "told").read_text()
    used = {sample.labels["gpu"]: sample.value for sample in families["defeat_gpu_memory_used_bytes"].samples}
    assert used == {"GPU-1": 2**30, "GPU-2": 0}
    busy = families["defeat_gpu_utilization_ratio"].samples
    assert [(sample.labels["name"], sample.value) for sample in busy] == [("NVIDIA H200", pytest.approx(0.37))]
    assert families["defeat_gpu_up"].samples[0].value == 1


def test_accelerators_that_do_not_answer_and_none_at_all(tmp_path: Path) -> None:
    (family,) = GpuCollector(str(tmp_path / "missing")).collect()
    assert (family.name, family.samples[0].value) == ("defeat_gpu_up", 0)
    assert list(GpuCollector(None).collect()) == []
