"""Weights files: ours go in a circle, foreign ones are checked, damaged ones are named."""

import json
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from defeat.engine import detectors
from defeat.engine.report import RunError
from tests.support.training import CLASSES, TINY, images_and_targets


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return detectors.build(TINY, CLASSES).eval()


def same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def check(tmp_path, weights, detector=None, classes=None):
    """Run the check in a process of its own, as the worker does; return the result."""
    directory = tmp_path / "run"
    directory.mkdir()
    request = {
        "kind": "check_checkpoint",
        "id": "ckpt_x",
        "attempt": 1,
        "spec": {"detector": detector, "classes": classes},
        "inputs": {"weights": str(weights)},
    }
    (directory / "run.json").write_text(json.dumps(request))
    subprocess.run(
        [sys.executable, "-m", "defeat.engine.run", str(directory)], capture_output=True, check=False, timeout=120
    )
    return json.loads((directory / "result.json").read_text()), directory / "artifacts" / "checkpoint.safetensors"


def test_a_saved_detector_comes_back_the_same(detector, tmp_path):
    detectors.save(detector, tmp_path / "d.safetensors")
    again = detectors.load(tmp_path / "d.safetensors")
    assert same(detector, again)
    assert again.classes == list(CLASSES)
    assert again.config == detector.config
    images, _ = images_and_targets()
    assert all(
        torch.equal(a["boxes"], b["boxes"]) for a, b in zip(detector.detect(images), again.detect(images), strict=True)
    )


def test_a_file_of_ours_needs_no_words(detector, tmp_path):
    detectors.save(detector, tmp_path / "d.safetensors")
    result, artifact = check(tmp_path, tmp_path / "d.safetensors")
    assert result["status"] == "succeeded", result
    total = len(detector.state_dict())
    assert result["results"]["coverage"] == {"loaded": total, "total": total, "missing": [], "unexpected": []}
    assert result["results"]["classes"] == list(CLASSES)
    assert result["results"]["detector"]["strides"] == [8, 16]
    assert same(detectors.load(artifact), detector)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3}, lambda s: {"state_dict": s}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_torch_file_with_a_spec(detector, tmp_path, wrap, prefix):
    state = {prefix + name: tensor for name, tensor in detector.state_dict().items()}
    torch.save(wrap(state), tmp_path / "d.pt")
    result, artifact = check(tmp_path, tmp_path / "d.pt", detector=TINY, classes=list(CLASSES))
    assert result["status"] == "succeeded", result
    assert same(detectors.load(artifact), detector)


def test_missing_foreign_and_misshapen_tensors_are_counted(detector, tmp_path):
    state = detector.state_dict()
    total = len(state)
    state["foreign.weight"] = torch.zeros(3)
    del state["rpn.head.cls_logits.bias"]
    state["rpn.head.cls_logits.weight"] = torch.zeros(5)
    torch.save(state, tmp_path / "d.pt")
    result, artifact = check(tmp_path, tmp_path / "d.pt", detector=TINY, classes=list(CLASSES))
    failure = result["failure"]
    assert (result["status"], failure["class"], failure["code"]) == ("failed", "data", "tensors_do_not_fit")
    assert f"{total - 2} of the detector's {total} tensors" in failure["detail"]
    for named in ("rpn.head.cls_logits.bias", "foreign.weight", "rpn.head.cls_logits.weight [5] instead of"):
        assert named in failure["detail"]
    assert not artifact.exists()


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    torch.save({"model": Harm(tmp_path / "harmed")}, tmp_path / "d.pt")
    result, _ = check(tmp_path, tmp_path / "d.pt", detector=TINY, classes=list(CLASSES))
    assert result["failure"]["code"] == "not_a_checkpoint"
    assert not (tmp_path / "harmed").exists()
    (tmp_path / "run").rename(tmp_path / "run1")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Harm(tmp_path / "harmed")))
    result, _ = check(tmp_path, tmp_path / "plain.pkl", detector=TINY, classes=list(CLASSES))
    assert result["failure"]["code"] == "not_a_checkpoint"
    assert not (tmp_path / "harmed").exists()


def test_a_file_cut_off_is_named(detector, tmp_path):
    detectors.save(detector, tmp_path / "d.safetensors")
    data = (tmp_path / "d.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    result, _ = check(tmp_path, tmp_path / "cut.safetensors")
    assert result["failure"]["code"] == "not_a_checkpoint"
    with pytest.raises(RunError, match="complete safetensors"):
        detectors.load(tmp_path / "cut.safetensors")


def test_a_nameless_file_needs_a_spec(detector, tmp_path):
    safetensors.torch.save_file(detector.state_dict(), tmp_path / "d.safetensors")
    result, _ = check(tmp_path, tmp_path / "d.safetensors", classes=list(CLASSES))
    assert result["failure"]["code"] == "detector_missing"
    assert "detector" in result["failure"]["detail"]
    with pytest.raises(RunError, match="does not name its detector"):
        detectors.load(tmp_path / "d.safetensors")


def test_a_full_disk_leaves_the_file_that_was_there(detector, tmp_path):
    """A limit on file size stands for the full disk: the kernel refuses the write in the middle."""
    path = tmp_path / "d.safetensors"
    detectors.save(detector, path)
    before = path.read_bytes()
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from defeat.engine import detectors; from defeat.engine.report import RunError\n"
        "d = detectors.load(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try: detectors.save(d, Path(sys.argv[1]))\n"
        "except RunError as e: print(e.failure_class, e.code, e.detail)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.startswith("infra disk_full could not write d.safetensors")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
