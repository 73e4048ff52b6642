"""Published weights: loaded from torch's cache, where a file made here stands for the download."""

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from defeat.engine.data import canonical
from defeat.engine.detectors.pretrained import classes_of, load_pretrained, published
from defeat.engine.report import RunError
from tests.support.training import TINY, run, shapes, spec, write_run

NAME, WEIGHTS = "fasterrcnn_resnet50_fpn", "COCO_V1"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A torch home whose cache holds weights of the right names and shapes, drawn here."""
    home = tmp_path_factory.mktemp("torch")
    torch.manual_seed(0)
    state = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    path = home / "hub" / "checkpoints" / Path(published()[NAME].weights[WEIGHTS].url).name
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    return home, state


def test_weights_from_the_cache(made, monkeypatch):
    home, state = made
    monkeypatch.setenv("TORCH_HOME", str(home))
    detector = load_pretrained(NAME, WEIGHTS)
    ours = detector.state_dict()
    assert all(torch.equal(ours[name], state[name]) for name in ours)
    assert len(detector.classes) == 90
    assert detector.classes[:3] == ["person", "bicycle", "car"]
    assert classes_of(published()[NAME].weights[WEIGHTS])[-1] == "toothbrush"


def test_no_network_says_where_to_put_the_file(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def _no_network(*_args, **_kwargs):
        raise URLError("Network is unreachable")

    monkeypatch.setattr("torch.hub.download_url_to_file", _no_network)
    with pytest.raises(RunError) as caught:
        load_pretrained(NAME, WEIGHTS)
    assert (caught.value.failure_class, caught.value.code) == ("infra", "weights_unavailable")
    assert "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth into hub/checkpoints under TORCH_HOME" in caught.value.detail


@pytest.mark.parametrize(("name", "weights", "says"), [("fasterrcnn", WEIGHTS, NAME), (NAME, "VOC", "known: COCO_V1")])
def test_unknown_names_list_the_choices(name, weights, says):
    with pytest.raises(RunError, match=says):
        load_pretrained(name, weights)


@pytest.mark.slow
def test_a_pretrained_teacher_teaches_a_dataset_of_some_of_its_classes(made, monkeypatch, tmp_path):
    home, _ = made
    monkeypatch.setenv("TORCH_HOME", str(home))
    monkeypatch.setattr("tests.support.training.CLASSES", ("dog", "person"))
    shapes(tmp_path, train=8, val=2)
    assert canonical.read(tmp_path / "canonical").classes == ("dog", "person")
    teacher = {"source": "pretrained", "detector": NAME, "weights": WEIGHTS}
    student = {"detector": {**TINY, "strides": [8, 16]}}
    schedule = {"epochs": 1, "batch_size": 4}
    directory = write_run(
        tmp_path / "run", tmp_path / "canonical", spec(teacher=teacher, student=student, schedule=schedule)
    )
    result = run(directory)
    assert result["status"] == "succeeded", result
    assert [one["class"] for one in result["results"]["teacher"]["per_class"]] == ["dog", "person"]
