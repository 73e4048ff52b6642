"""Whole runs of a tiny Mask R-CNN: its mask head learns from data with masks, and is left alone without any."""

import json
from dataclasses import replace

import pytest

from defeat.engine.data import canonical
from tests.support.training import TINY, events, run, shapes, spec, write_run

MASK = {**TINY, "architecture": "mask_rcnn", "mask_channels": 16}
LOSSES = {"loss/total", "loss/classifier", "loss/box_reg", "loss/objectness", "loss/rpn_box_reg"}


def job(**changes):
    schedule = {"epochs": 8, "batch_size": 4, "optimizer": "adamw", "learning_rate": 0.003, "warmup_steps": 2}
    augmentation = {"horizontal_flip": 0.5}
    evaluation = {"every_epochs": 8, "gallery_images": 0}
    student = {"detector": MASK, "initial_weights": "random"}
    parts = {"student": student, "schedule": schedule, "evaluation": evaluation, "augmentation": augmentation}
    return spec(teacher=None, distillation={"method": "baseline"}) | parts | changes


def logged(directory):
    return [one["values"] for one in events(directory, "metrics")]


def test_the_mask_loss_falls_and_the_masks_are_measured(tmp_path):
    shapes(tmp_path, train=24, val=4, masks=True)
    directory = write_run(tmp_path / "run", tmp_path / "canonical", job())
    result = run(directory)
    assert result["status"] == "succeeded", result
    values = [one["loss/mask"] for one in logged(directory)]
    assert values[0] > 0.5  # a mask that knows nothing costs log 2 = 0.69
    assert values[-1] < 0.6 * values[0]
    (measured,) = (one["metrics"] for one in events(directory, "evaluation"))
    masks = measured.pop("masks")
    assert masks.keys() == measured.keys() - {"images", "detections"}
    assert 0 < masks["ap50"] <= 1
    assert [one["class"] for one in masks["per_class"]] == ["square", "disc"]
    assert result["results"]["student"]["masks"] == masks


def test_without_masks_there_is_no_mask_loss(tmp_path):
    shapes(tmp_path, train=8, val=2)
    schedule = job()["schedule"] | {"epochs": 1}
    directory = write_run(tmp_path / "run", tmp_path / "canonical", job(schedule=schedule))
    result = run(directory)
    assert result["status"] == "succeeded", result
    assert all({name for name in one if name.startswith("loss/")} == LOSSES for one in logged(directory))
    assert all("masks" not in one["metrics"] for one in events(directory, "evaluation"))


@pytest.mark.parametrize("kept", [0, 1])
def test_where_one_image_has_masks_every_batch_has_the_loss(tmp_path, kept):
    """Batches without any among them: each part of the loss must be there on every process and in every step."""
    dataset = shapes(tmp_path, train=8, val=2, masks=True)
    images = tuple(
        one if one.name == f"{kept}.png" else replace(one, boxes=tuple(replace(box, mask=None) for box in one.boxes))
        for one in dataset.images
    )
    sources = {one.file: tmp_path / "canonical" / one.file for one in images}
    canonical.write(tmp_path / "few", replace(dataset, images=images), sources)
    assert json.loads((tmp_path / "few" / "dataset.json").read_text())["format_version"] == 2
    schedule = job()["schedule"] | {"epochs": 1, "batch_size": 2, "accumulation": 2}
    result = run(directory := write_run(tmp_path / "run", tmp_path / "few", job(schedule=schedule)))
    assert result["status"] == "succeeded", result
    assert all(
        {name for name in one if name.startswith("loss/")} == LOSSES | {"loss/mask"} for one in logged(directory)
    )


def test_another_family_trains_on_data_with_masks_as_on_data_without(tmp_path):
    runs = []
    for masks in (False, True):
        root = tmp_path / str(masks)
        shapes(root, train=8, val=2, masks=masks)
        schedule = job()["schedule"] | {"epochs": 1}
        student = {"detector": TINY, "initial_weights": "random"}
        runs.append(write_run(root / "run", root / "canonical", job(schedule=schedule, student=student)))
        assert run(runs[-1])["status"] == "succeeded"
    one, other = (directory / "artifacts" / "student-last.safetensors" for directory in runs)
    assert one.read_bytes() == other.read_bytes()
