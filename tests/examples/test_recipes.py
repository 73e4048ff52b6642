"""The recipes of the paper's tables: what they ask for, and a dry run of each in little."""

from pathlib import Path
from typing import Any

import pytest

from defeat.client.specs import load_spec
from defeat.engine import detectors
from defeat.engine.methods import METHODS
from defeat.engine.training.config import JobConfig
from defeat.engine.training.distill import SERVICE_KEYS
from tests.support.training import run, shapes, write_run

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))
SMALL = {"backbone": "timm/mobilenetv3_small_050", "pyramid_channels": 8, "min_size": 64, "max_size": 96}
SMALL_HEAD = {"head_channels": 16, "train_proposals": 32, "test_proposals": 16, "box_samples": 16}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shapes")
    shapes(directory, train=16, val=4)
    return directory / "canonical"


def shrunk(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe at a size for a second or two: everything that is not a size or a duration stays."""
    job = {**recipe, "evaluation": {"gallery_images": 0}}
    for who in ("teacher", "student"):
        small = SMALL | (SMALL_HEAD if recipe[who]["detector"]["architecture"] == "faster_rcnn" else {})
        job[who] = {**recipe[who], "detector": {**recipe[who]["detector"], **small}, "initial_weights": "random"}
    schedule = {**recipe["schedule"], "epochs": 2, "decay_epochs": [1], "warmup_steps": 2}
    job["teacher"]["schedule"] = {**schedule, "epochs": 1, "decay_epochs": []}
    return job | {"schedule": schedule}


def parsed(recipe: dict[str, Any]) -> JobConfig:
    return JobConfig.parse({key: value for key, value in recipe.items() if key not in SERVICE_KEYS}, where="spec")


def test_there_is_one_for_each_of_the_papers_experiments():
    assert [path.stem for path in RECIPES] == [
        "coco-faster-rcnn-r152-r50",
        "coco-retinanet-r152-r50",
        "voc-faster-rcnn-r101-r50",
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_whole_job_that_names_itself_in_its_command(path):
    recipe = load_spec(path)
    assert recipe["name"] == path.stem
    assert f"defeat jobs submit examples/recipes/{path.name} --set dataset=ds_" in path.read_text()
    config = parsed(recipe)
    assert config.trains_teacher
    for detector in (config.teacher.detector, config.student.detector):
        family = detectors.DETECTORS[detector["architecture"]]
        family.config.parse(detector, where="detector")
    # Everything but the backbone is the teacher's: the tables compare nothing else.
    assert {**config.teacher.detector, "backbone": ""} == {**config.student.detector, "backbone": ""}
    METHODS["defeat"].config.parse(recipe["distillation"], where="distillation")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_dry_run_of_a_recipe_succeeds(path, dataset, tmp_path):
    job = shrunk(load_spec(path))
    job["schedule"]["learning_rate"] = job["teacher"]["schedule"]["learning_rate"] = 1e-3  # of a batch of 16 at once
    result = run(write_run(tmp_path / "run", dataset, job))
    assert result["status"] == "succeeded", result["failure"]
    assert 0 <= result["results"]["student"]["ap"] <= 1
    assert 0 <= result["results"]["teacher"]["ap"] <= 1
    assert {artifact["name"] for artifact in result["artifacts"]} >= {"student-best.safetensors", "teacher.safetensors"}
