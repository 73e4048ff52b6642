import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples import digits


def digest(directory: Path) -> str:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    whole = hashlib.sha256()
    for path in files:
        whole.update(str(path.relative_to(directory)).encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return digits.build(tmp_path_factory.mktemp("digits"), train_scenes=40, val_scenes=10)


def load(directory, split):
    return json.loads((directory / "annotations" / f"instances_{split}.json").read_text())


@pytest.mark.parametrize(("split", "count"), [("train", 40), ("val", 10)])
def test_every_scene_has_its_image_and_at_least_one_digit(scenes, split, count):
    document = load(scenes, split)
    assert len(document["images"]) == count
    assert [(c["id"], c["name"]) for c in document["categories"]] == [(i + 1, str(i)) for i in range(10)]
    for image in document["images"]:
        with Image.open(scenes / "images" / split / image["file_name"]) as opened:
            assert opened.size == (image["width"], image["height"]) == (160, 128)
    assert {a["image_id"] for a in document["annotations"]} == {i["id"] for i in document["images"]}


def test_boxes_lie_inside_and_hold_the_bright_pixels(scenes):
    document = load(scenes, "train")
    for image in document["images"]:
        pixels = np.asarray(Image.open(scenes / "images" / "train" / image["file_name"]), dtype=float)
        inside = np.zeros(pixels.shape, dtype=bool)
        for a in document["annotations"]:
            if a["image_id"] != image["id"]:
                continue
            x, y, w, h = a["bbox"]
            assert x >= 0
            assert y >= 0
            assert x + w <= 160
            assert y + h <= 128
            assert a["area"] == w * h
            inside[y : y + h, x : x + w] = True
        assert pixels[inside].mean() > pixels[~inside].mean() + 15


def test_same_seed_same_bytes_and_another_seed_others(tmp_path):
    small = {"train_scenes": 3, "val_scenes": 2}
    first = digest(digits.build(tmp_path / "a", **small))
    assert digest(digits.build(tmp_path / "b", **small)) == first
    assert digest(digits.build(tmp_path / "c", **small, seed=1)) != first


def test_no_scan_is_in_both_splits():
    train, val = digits._scans(np.random.default_rng(0))
    assert len(train) + len(val) == 1797
    # The scans themselves are distinct images, so sharing bytes would mean sharing a scan.
    assert not {scan.pixels.tobytes() for scan in train} & {scan.pixels.tobytes() for scan in val}


def test_an_existing_data_set_is_not_mixed_with_a_new_one(tmp_path, capsys):
    arguments = [str(tmp_path), "--train-scenes", "1", "--val-scenes", "1"]
    assert digits.main(arguments) == 0
    assert "1 train and 1 val scenes" in capsys.readouterr().out
    assert digits.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"width": 47}, {"train_scenes": 0}])
def test_what_cannot_be_built_is_said(tmp_path, wrong):
    with pytest.raises(ValueError, match="at least"):
        digits.build(tmp_path, **wrong)
