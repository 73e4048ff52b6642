"""The API, which has no torch, refuses the pairs that a method's constructor refuses: drawn at random, seed fixed."""

import random
from typing import Any

import pytest
import torch

from app.specs.catalog import Catalog, load_catalog
from app.specs.methods import check_methods
from app.specs.pairing import pair_problems
from app.specs.validation import check_detector
from defeat.engine import detectors, methods
from defeat.engine.detectors.backbones import STRIDES
from defeat.engine.report import RunError

Spec = dict[str, Any]
PYRAMIDS = [list(STRIDES[i:j]) for i in range(4) for j in range(i + 1, 5)]
# One that rounds its maps' sides up, one that rounds them down.
BACKBONES = ["timm/resnet10t", "timm/convnext_atto"]
NO_HEAD = {"head_object_weight": 0, "head_background_weight": 0}
METHODS: list[Spec] = [
    {"method": "fitnet"},
    {"method": "pkd"},
    {"method": "fgfi"},
    {"method": "frs"},
    {"method": "frs", "logits_weight": 0},
    {"method": "defeat"},
    {"method": "defeat", **NO_HEAD},
    {"method": "defeat", **NO_HEAD, "backbone_object_weight": 1},
]


def drawn(catalog: Catalog, draw: random.Random) -> Spec:
    """A complete detector spec; only with what decides whether it pairs."""
    spec: Spec = {"architecture": draw.choice(list(catalog.detectors))}
    members = catalog.detectors[spec["architecture"]]["schema"]["properties"]
    choices: dict[str, list[Any]] = {
        "pool_level": [True, False],
        "extra_levels": ["none", "p6p7", "p6p7_backbone"],
        "pyramid_channels": [32, 64],
        "anchor_octaves": [1, 2],
        "reduced_tail": [True, False],
        "size": members.get("size", {}).get("enum", [64, 320]),
    }
    if "frozen_batch_norm" in members and spec["architecture"] != "faster_rcnn_mobilenet":
        choices |= {"backbone": BACKBONES, "strides": PYRAMIDS}
    elif "reduced_tail" in members:
        choices["backbone"] = members["backbone"]["enum"]
    spec |= {key: draw.choice(values) for key, values in choices.items() if key in members}
    if "head_channels" in members:
        spec["head_channels"] = 16
    return complete(catalog, spec)


def complete(catalog: Catalog, spec: Spec) -> Spec:
    section = check_detector(catalog, spec, ())
    assert section.value is not None, section.problems
    return section.value


def built(spec: Spec) -> detectors.Detector:
    with torch.device("meta"):
        return detectors.build(spec, ["object"])


def refusal(spec: Spec, student: detectors.Detector, teacher: detectors.Detector) -> str | None:
    """The first of what the engine refuses, where the API names all; None where it builds the method."""
    try:
        with torch.device("meta"):
            methods.build(spec, student, teacher)
    except RunError as error:
        return error.code
    return None


@pytest.mark.parametrize("seed", range(5))
def test_what_pairs(seed):
    catalog, draw = load_catalog(), random.Random(seed)
    specs = [drawn(catalog, draw) for _ in range(8)]
    models = [built(spec) for spec in specs]
    for ours, student in zip(specs, models, strict=True):
        for theirs, teacher in zip(specs, models, strict=True):
            spec = draw.choice(METHODS)
            chosen, problems = check_methods(catalog, spec, ("distillation",))
            assert not problems
            found = pair_problems(catalog, chosen, ours, theirs, teacher_is_free=draw.random() < 0.5)
            refused = {problem["code"] for problem in found}
            code = refusal(spec, student, teacher)
            assert code in refused if code else not refused, (spec, ours, theirs, code, refused)
