"""Writes `app/specs/catalog.json`: what can be asked for, from the engine's registries and configs.

`python -m defeat.engine.catalog FILE` writes; with `--check` it writes nothing and exits 1 if FILE is out of date.
"""

import hashlib
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch

from defeat.engine.config import Config
from defeat.engine.data.importing import FORMATS
from defeat.engine.data.loading.config import AugmentationConfig
from defeat.engine.detectors import DETECTORS, Family, build
from defeat.engine.detectors.backbones import BACKBONES, STRIDES, Pyramid, build_pyramid
from defeat.engine.detectors.pretrained import PRETRAINED, classes_of
from defeat.engine.evaluation.config import EvaluationConfig
from defeat.engine.methods import METHODS
from defeat.engine.methods.combined import MemberConfig
from defeat.engine.training.config import ResourcesConfig, ScheduleConfig

ODD_SIDE = 300  # px; SSD's, and a multiple of stride 4 alone: whoever halves it must round


def _schema(config: type[Config]) -> dict[str, Any]:
    return config.model_json_schema()


def _backbone(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        pyramid = build_pyramid(
            name, strides=STRIDES, channels=8, extra_levels="none", pretrained=False, frozen_batch_norm=False
        )
        maps = pyramid.eval().body(torch.zeros(1, 3, ODD_SIDE, ODD_SIDE))
    sides = [features.shape[-1] for features in maps.values()]
    rounds = {"up": [-(-ODD_SIDE // stride) for stride in STRIDES], "down": [ODD_SIDE // stride for stride in STRIDES]}
    return {
        "rounds": next(way for way, expected in rounds.items() if sides == expected),
        "strides": list(STRIDES),
        "channels": [block[0].in_channels for block in pyramid.fpn.inner_blocks],
        "layouts": [_layout(pyramid, stages) for stages in range(1, 1 + len(STRIDES))],
        "parameters": sum(parameter.numel() for parameter in pyramid.body.parameters()),
    }


def _layout(pyramid: Pyramid, stages: int) -> str:
    """Return a digest of the names and shapes of the parameters in a backbone's first stages, no fewer than before."""
    pyramid.freeze(stages)
    named = pyramid.body.named_parameters()
    shapes = sorted((name, list(tensor.shape)) for name, tensor in named if not tensor.requires_grad)
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def _channels(family: Family) -> list[dict[str, Any]]:
    """Return the channels of a family's levels, finest first, by the keys of a spec that decide them.

    Empty for families with `pyramid_channels`, which says it itself.
    """
    members = _schema(family.config)["properties"]
    if "pyramid_channels" in members:
        return []
    choices = {
        key: [False, True] if member["type"] == "boolean" else member.get("enum") or [member["const"]]
        for key, member in members.items()
        if key == "backbone" or member["type"] == "boolean"
    }
    entries = []
    for values in product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        with torch.device("meta"):
            detector = build({"architecture": members["architecture"]["const"], **chosen}, ["object"])
        entries.append({"of": chosen, "channels": list(detector.channels)})
    return entries


def catalog() -> dict[str, Any]:
    """Return the catalog: JSON Schemas of every config, backbones with their sizes, pretrained detectors, formats.

    A backbone `rounds` the sides of its maps up or down, where the image's are no multiples of 32. Two of them have
    the same parameters up to a stride where their `layouts` are the same for it.
    """
    return {
        "format_version": 1,
        "detectors": {
            name: {
                "summary": family.summary,
                "head": family.head,
                "provides": list(family.provides),
                "channels": _channels(family),
                "schema": _schema(family.config),
            }
            for name, family in DETECTORS.items()
        },
        "pretrained": {
            name: {
                "detector": entry.config.model_dump(mode="json"),
                "weights": {key: {"classes": classes_of(weights)} for key, weights in entry.weights.items()},
            }
            for name, entry in PRETRAINED.items()
        },
        "backbones": {name: _backbone(name) for name in BACKBONES},
        "methods": {
            name: {
                "summary": entry.summary,
                "needs": list(entry.needs),
                "weights": entry.weights,
                "head_weights": list(entry.head_weights),
                "backbone_weights": list(entry.backbone_weights),
                "logit_weights": list(entry.logit_weights),
                "needs_teacher": entry.needs_teacher,
                "schema": _schema(entry.config),
            }
            for name, entry in METHODS.items()
        },
        "combination": {"schema": _schema(MemberConfig)},
        "schedule": {"schema": _schema(ScheduleConfig)},
        "evaluation": {"schema": _schema(EvaluationConfig)},
        "augmentation": {"schema": _schema(AugmentationConfig)},
        "resources": {"schema": _schema(ResourcesConfig)},
        "dataset_formats": {name: {"summary": f"{entry.title}: {entry.layout}"} for name, entry in FORMATS.items()},
    }


def main(arguments: list[str]) -> int:
    """Write or check the file; return the exit code."""
    check = arguments[:1] == ["--check"]
    paths = arguments[1:] if check else arguments
    if len(paths) != 1:
        sys.exit("usage: python -m defeat.engine.catalog [--check] FILE")
    path, text = Path(paths[0]), json.dumps(catalog(), indent=1, sort_keys=True) + "\n"
    if not check:
        path.write_text(text)
        return 0
    if path.exists() and path.read_text() == text:
        return 0
    print(f"{path} is out of date: run `make catalog`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
