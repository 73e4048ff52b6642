"""Writes `app/catalog.json`: what can be asked for, from the engine's registries and configs.

`python -m worker.catalog FILE` writes, `python -m worker.catalog --check FILE` exits 1 where FILE is out of date.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from worker.config import Config
from worker.data import FORMATS
from worker.detectors import DETECTORS
from worker.detectors.backbones import BACKBONES, STRIDES, build_pyramid
from worker.detectors.pretrained import PRETRAINED, classes_of
from worker.engine.config import AugmentationConfig, EvaluationConfig, ResourcesConfig, ScheduleConfig
from worker.methods import METHODS
from worker.methods.combined import MemberConfig


def _schema(config: type[Config]) -> dict[str, Any]:
    return config.model_json_schema()


def _backbone(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        pyramid = build_pyramid(
            name, strides=STRIDES, channels=8, extra_levels="none", pretrained=False, frozen_batch_norm=False
        )
    return {
        "strides": list(STRIDES),
        "channels": [block[0].in_channels for block in pyramid.fpn.inner_blocks],
        "parameters": sum(parameter.numel() for parameter in pyramid.body.parameters()),
    }


def catalog() -> dict[str, Any]:
    """Return the catalog: JSON Schemas of every config, backbones with their sizes, pretrained detectors, formats."""
    return {
        "format_version": 1,
        "detectors": {
            name: {
                "summary": family.summary,
                "head": family.head,
                "provides": list(family.provides),
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
        sys.exit("usage: python -m worker.catalog [--check] FILE")
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
