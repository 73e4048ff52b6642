"""Two processes that train one detector together, over gloo."""

import json
import signal
import subprocess
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest
import torch
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from defeat.engine import detectors, methods
from defeat.engine.data import canonical
from defeat.engine.data.loading.batch import Batch
from defeat.engine.data.loading.config import AugmentationConfig
from defeat.engine.data.loading.loader import ImageReader, TrainingBatches
from defeat.engine.data.loading.resize import InputSize, disable_training_resize
from defeat.engine.methods.base import StepInfo
from defeat.engine.report import RunError
from defeat.engine.training import process_group
from defeat.engine.training.config import JobConfig, ScheduleConfig
from defeat.engine.training.process_group import ProcessGroup
from defeat.engine.training.step import Step
from tests.defeat.engine.training.test_step import RETINANET
from tests.support.tiny import TINY
from tests.support.training import CLASSES, run_alone, shapes, spec, write_run

CPU = torch.device("cpu")
STEP = """
import sys, torch
from pathlib import Path
from tests.defeat.engine.training.test_process_group import step_and_gradients
rank, directory, case = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/{case}", rank=rank, world_size=2)
from defeat.engine.training.process_group import ProcessGroup
torch.save(step_and_gradients(directory / "canonical", ProcessGroup(rank, 2), case), directory / f"{case}-{rank}.pt")
torch.distributed.destroy_process_group()
"""
ONE_STAGE = [
    {"method": "defeat", "head_object_weight": 0, "head_background_weight": 0},
    {"method": "fgfi"},
    {"method": "frs", "warmup_steps": 0},
    # Not at its authors' 10: that of a bias, which its loss does not see, is then all rounding.
    {"method": "pkd", "neck_weight": 0.1},
    {"method": "fitnet"},
    {"method": "cwd"},
    {"method": "fgd"},
]
TWO_STAGE = {**TINY, "frozen_batch_norm": True, "train_proposals": 32, "box_samples": 16}
ONE_STAGE_LOSSES = (
    *("classification", "bbox_regression"),
    *("defeat/neck_object", "fgfi/neck", "frs/neck", "frs/logits", "pkd/neck", "fitnet/neck", "cwd/neck"),
    *(f"fgd/neck_{part}" for part in ("object", "background", "attention", "relation")),
)
TWO_STAGE_LOSSES = (
    *("classifier", "box_reg", "objectness", "rpn_box_reg"),
    *("neck_object", "neck_background", "head_object", "head_background"),
)
# Each method divides by what it counts in the batch, or takes moments over it. The number is accumulation's.
CASES = {
    "one_stage": (RETINANET, ONE_STAGE, 1, ONE_STAGE_LOSSES),
    "in_parts": (RETINANET, ONE_STAGE, 2, ONE_STAGE_LOSSES),
    "two_stage": (TWO_STAGE, {"method": "defeat", "warmup_steps": 0}, 1, TWO_STAGE_LOSSES),
}


class FirstOfEach(BalancedPositiveNegativeSampler):
    """Samples as torchvision's does, and takes the first of each kind where that one draws lots."""

    def __call__(self, matched):
        kept = []
        for labels in matched:
            positive = torch.where(labels >= 1)[0][: int(self.batch_size_per_image * self.positive_fraction)]
            negative = torch.where(labels == 0)[0][: self.batch_size_per_image - len(positive)]
            kept.append(
                [torch.zeros_like(labels, dtype=torch.bool).index_fill(0, one, 1) for one in (positive, negative)]
            )
        return tuple(list(kind) for kind in zip(*kept, strict=True))


def step_and_gradients(dataset, group, case):
    """One step of this process's share; the values it reports and the gradients it leaves."""
    config, distillation, parts, _ = CASES[case]
    torch.manual_seed(0)
    student = detectors.build(config, CLASSES).train()
    teacher = detectors.build(config, CLASSES).eval().requires_grad_(False)
    for name, parameter in [*teacher.named_parameters(), *student.named_parameters()]:
        if name.endswith("cls_logits.weight"):  # detectors that are surer of some images, and places, than of others
            torch.nn.init.normal_(parameter, std=1.0 if parameter.requires_grad else 5.0)
    for one in student.modules():
        if isinstance(one, (RegionProposalNetwork, RoIHeads)):
            plain = one.fg_bg_sampler
            one.fg_bg_sampler = FirstOfEach(plain.batch_size_per_image, plain.positive_fraction)
    method = methods.build(distillation, student, teacher)
    schedule = ScheduleConfig(batch_size=4, accumulation=parts, warmup_steps=0, gradient_clip=0)
    step = Step(student, method=method, teacher=teacher, schedule=schedule, group=group, device=CPU)
    reader = ImageReader(dataset, canonical.read(dataset).in_split("train"))
    disable_training_resize(student)
    batches = TrainingBatches(
        reader,
        batch_size=4,
        size=InputSize.from_detector(student),
        augmentation=AugmentationConfig(),
        device=CPU,
        rank=group.rank,
        world_size=group.size,
    )
    batch = next(batches.epoch(3))
    if group.is_single and parts > 1:  # the n-th parts of all shares are what goes through together
        order = [share * 4 // 2 + part for part in range(parts) for share in range(2)]
        batch = Batch.of([(batch.images[i], batch.targets[i]) for i in order])
    values = step(batch, StepInfo(step=0, steps=4, epoch=0, epochs=1), measured=True).values
    return values, {name: one.grad for name, one in step.losses.named_parameters()}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    shapes(root)
    return root / "canonical"


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_gradient_of_one_with_the_joined_batch(dataset, case):
    root = dataset.parent
    processes = [subprocess.Popen([sys.executable, "-c", STEP, str(rank), str(root), case]) for rank in range(2)]
    values, gradients = step_and_gradients(dataset, ProcessGroup(), case)
    assert [process.wait(120) for process in processes] == [0, 0]
    shares = [torch.load(root / f"{case}-{rank}.pt") for rank in range(2)]
    assert shares[0][0] == shares[1][0]
    found, averaged = shares[0]
    assert found.keys() == values.keys()
    assert {f"loss/{name}" for name in CASES[case][-1]} < values.keys()
    for name, value in values.items():
        if not name.startswith("gradient_share/"):  # of each process's own share of the batch
            assert found[name] == pytest.approx(value, rel=1e-5), name
        assert found[name] > 0, f"{name} is silent"
    # Adapters too: no part of the loss is outside of what is averaged.
    assert any(name.startswith("method.") for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(averaged[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
        assert torch.equal(averaged[name], shares[1][1][name])


def job(**changes):
    return spec(resources={"gpus": 2}, **changes)


def test_a_whole_run_of_two_processes_resumes_to_the_same_bytes(dataset, tmp_path):
    plain = {"epochs": 2, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 2, "checkpoint_minutes": 1e-9}
    whole = write_run(tmp_path / "whole", dataset, job(schedule=plain))
    result = run_alone(whole)
    assert result["status"] == "succeeded", result
    assert result["results"]["student"]["images"] == 6
    assert json.loads((whole / "rank-1" / "result.json").read_text())["status"] == "succeeded"

    # The first process alone is asked to end, as the supervisor does it: both stop after the same step.
    first = write_run(tmp_path / "first", dataset, job(schedule=plain))
    process = subprocess.Popen([sys.executable, "-m", "defeat.engine.run", str(first)])
    log, deadline = first / "events.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text().count('"type": "checkpoint"') >= 4):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 3
    assert json.loads((first / "rank-1" / "result.json").read_text())["status"] == "cancelled"
    second = write_run(tmp_path / "second", dataset, job(schedule=plain), resume=str(first / "checkpoints" / "last.pt"))
    assert run_alone(second)["status"] == "succeeded"
    for name in ("student-last.safetensors", "student-best.safetensors", "teacher.safetensors"):
        assert (second / "artifacts" / name).read_bytes() == (whole / "artifacts" / name).read_bytes()


def script_of(script, tmp_path):
    """Write a script that both processes of a run carry out instead of `defeat.engine.run`."""
    path = tmp_path / "worker_run.py"
    path.write_text(
        f"import sys\nfrom defeat.engine import ranks\nranks.COMMAND = (sys.executable, {str(path)!r})\n{script}"
    )
    return path


def failure_of(script, dataset, tmp_path):
    """Run both processes by a script instead of `defeat.engine.run`, and return how the run failed."""
    path = script_of(script, tmp_path)
    directory = write_run(tmp_path / "run", dataset, job())
    done = subprocess.run([sys.executable, path, directory], timeout=120, check=False)
    assert done.returncode == 1
    return json.loads((directory / "result.json").read_text())["failure"]


FAILING = """
from pathlib import Path
from defeat.engine import ranks, run
from defeat.engine.report import RunError
def entry(spec, inputs, reporter):
    if ranks.rank() == 1:
        raise RunError("oom", "out_of_memory", "too much for the second")
    import time; time.sleep(600)
run._entry = lambda kind: entry
sys.exit(run.main(Path(sys.argv[1])))
"""


def test_a_failure_of_the_second_is_the_runs(dataset, tmp_path, monkeypatch):
    """The first one must not wait for the second for ever once that has failed; the run's failure is the second's."""
    failure = failure_of(FAILING, dataset, tmp_path)
    assert failure == {"class": "oom", "code": "out_of_memory", "detail": "too much for the second"}


MUTE = """
from pathlib import Path
from defeat.engine import ranks, run
from defeat.engine.report import Reporter
def entry(spec, inputs, reporter):
    if ranks.rank() == 1:
        import time; time.sleep(600)
    raise ValueError("a bug")
def finish(*_args, **_kwargs):
    raise OSError(28, "No space left on device")
run._entry, Reporter.finish = lambda kind: entry, finish
sys.exit(run.main(Path(sys.argv[1])))
"""


def test_a_first_one_that_cannot_say_how_it_ended_ends_all(dataset, tmp_path):
    """Writing the failure may fail as well: no other process must go on waiting."""
    path = script_of(MUTE, tmp_path)
    done = subprocess.run([sys.executable, path, write_run(tmp_path / "run", dataset, job())], timeout=120, check=False)
    assert done.returncode == 1
    assert not (tmp_path / "run" / "result.json").exists()


EXHAUSTED = """
from pathlib import Path
import torch
from defeat.engine import ranks, run
from defeat.engine.training.step import Losses
plain = Losses.forward
def exhausted(gradient):
    raise torch.OutOfMemoryError("tried to allocate 80 GiB")
def forward(self, batch, step_info, measured):
    losses, norms = plain(self, batch, step_info, measured)
    if ranks.rank() == 1 and torch.is_grad_enabled():
        losses["classifier"].register_hook(exhausted)
    return losses, norms
Losses.forward = forward
sys.exit(run.main(Path(sys.argv[1])))
"""


def test_out_of_memory_in_one_of_two_is_reported(dataset, tmp_path):
    """In the backward pass, in which the processes exchange gradients: the one that fails must not begin to count."""
    failure = failure_of(EXHAUSTED, dataset, tmp_path)
    detail = "2 images at a time do not fit into memory (tried to allocate 80 GiB)"
    assert failure == {"class": "oom", "code": "out_of_memory", "detail": detail}


def test_batch_norm_is_not_shared_on_a_cpu(dataset, tmp_path):
    directory = write_run(tmp_path / "run", dataset, job(schedule={**spec()["schedule"], "sync_batch_norm": True}))
    failure = run_alone(directory)["failure"]
    assert (failure["class"], failure["code"]) == ("user", "sync_batch_norm_needs_gpus")
    assert "schedule.sync_batch_norm is on, and the 2 processes of this run have no GPUs" in failure["detail"]


def test_the_second_ends_when_the_first_is_killed(dataset, tmp_path):
    directory = write_run(tmp_path / "run", dataset, job(schedule={**spec()["schedule"], "epochs": 1000}))
    process = subprocess.Popen([sys.executable, "-m", "defeat.engine.run", str(directory)])
    log, deadline = directory / "events.jsonl", time.monotonic() + 120
    while not (log.exists() and '"phase": "teacher"' in log.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (second,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert psutil.wait_procs([second], timeout=60)[1] == []


def test_gpus_must_share_the_batch():
    given = {key: value for key, value in job().items() if key != "name"}
    with pytest.raises(RunError, match=r"schedule\.batch_size: it must be a multiple of .*, which is 3"):
        JobConfig.parse({**given, "resources": {"gpus": 3}}, where="spec")


@pytest.mark.parametrize(
    ("size", "device", "free", "warned"),
    [(2, "cuda", 64 * 2**20, True), (2, "cuda", 2**30, False), (1, "cuda", 0, False), (2, "cpu", 0, False)],
)
def test_little_shared_memory_for_several_gpus_is_warned_of(monkeypatch, size, device, free, warned):
    messages = []
    monkeypatch.setattr(process_group.shutil, "disk_usage", lambda _path: SimpleNamespace(free=free))
    reporter = SimpleNamespace(message=lambda *words: messages.append(words))
    process_group.warn_of_little_shared_memory(ProcessGroup(0, size), torch.device(device), reporter)
    assert [words[:2] for words in messages] == [("warn", "little_shared_memory")] * warned
    if warned:
        assert "64 MiB are free in /dev/shm" in messages[0][2]


def test_gpus_meet_by_nccl_and_objects_go_by_the_cpu(monkeypatch):
    """The calls that a run on several GPUs makes, without any: each process names its own device."""
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("device", device)))
    monkeypatch.setattr(
        process_group.distributed, "init_process_group", lambda backend, **named: calls.append((backend, named))
    )
    monkeypatch.setattr(
        process_group.distributed, "new_group", lambda **named: calls.append(("group", named)) or "by cpu"
    )
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    joined = ProcessGroup.join(torch.device("cuda", 1))
    assert (joined.rank, joined.size, joined.by_cpu) == (1, 2, "by cpu")
    (_, device), (backend, named), (_, group) = calls
    assert device == named["device_id"] == torch.device("cuda", 1)
    assert backend == "nccl"
    assert named["timeout"] <= timedelta(minutes=15) < group["timeout"]
    assert group["backend"] == "gloo"
