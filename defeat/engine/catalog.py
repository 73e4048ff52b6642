"""Writes the catalog: detectors, methods, formats and parameters, from the engine's registries and configs.

`python -m defeat.engine.catalog FILE` writes the file, with what the modules in `DEFEAT_PLUGINS` register; the service
reads `app/specs/catalog.json`, or the file that its `DEFEAT_CATALOG` names. With `--check` it writes nothing and exits
1 if FILE is out of date.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from defeat.engine import plugins
from defeat.engine.config import Config
from defeat.engine.data.importing import FORMATS
from defeat.engine.data.loading.config import AugmentationConfig
from defeat.engine.detectors import DETECTORS, Detector, Family, build
from defeat.engine.detectors.backbones import BACKBONES, STRIDES, Pyramid, build_pyramid
from defeat.engine.detectors.pretrained import classes_of, published
from defeat.engine.evaluation.config import EvaluationConfig
from defeat.engine.methods import METHODS, Entry
from defeat.engine.methods.combined import MemberConfig
from defeat.engine.report import RunError
from defeat.engine.training.config import ResourcesConfig, ScheduleConfig

FORMAT_VERSION = 2
ODD_SIDE = 300  # px; SSD's, and a multiple of stride 4 alone: the maps of all other strides are rounded


def _schema(config: type[Config]) -> dict[str, Any]:
    return config.model_json_schema()


def _backbone(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        pyramid = build_pyramid(
            name, strides=STRIDES, channels=8, extra_levels="none", pretrained=False, frozen_batch_norm=False
        )
        maps = pyramid.eval().body(torch.zeros(1, 3, ODD_SIDE, ODD_SIDE))
    return {
        "rounds": _rounding(name, STRIDES, [features.shape[-1] for features in maps.values()]),
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


def _rounding(name: str, strides: Sequence[int], sides: Sequence[int]) -> str:
    """Return whether maps of these sides, of an image of ODD_SIDE, are rounded "up" or "down".

    Raises `RunError("infra", "catalog_failed", …)` if they are rounded otherwise: the service could not compute them.
    """
    ways = {"up": [-(-ODD_SIDE // stride) for stride in strides], "down": [ODD_SIDE // stride for stride in strides]}
    for way, expected in ways.items():
        if list(sides) == expected:
            return way
    detail = f"the maps of {name} at strides {list(strides)} have sides {list(sides)} at {ODD_SIDE} px, must be {ways}"
    raise RunError("infra", "catalog_failed", detail)


def _backbones(schema: dict[str, Any]) -> list[str]:
    member = schema["properties"]["backbone"]
    return list(member.get("enum") or [member["const"]])


def _on_meta(family: Family) -> Iterator[tuple[dict[str, Any], Detector]]:
    """Yield a detector of the family for each choice of backbone and flags, without memory, and that choice."""
    members = _schema(family.config)["properties"]
    choices = {
        key: [False, True] if member.get("type") == "boolean" else member.get("enum") or [member["const"]]
        for key, member in members.items()
        if key == "backbone" or member.get("type") == "boolean"
    }
    for values in product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        with torch.device("meta"):
            yield chosen, build({"architecture": family.name, **chosen}, ["object"])


def _family(family: Family) -> dict[str, Any]:
    """Return the facts about a family. `channels` and `rounds` are measured on its detectors."""
    schema = _schema(family.config)
    entry: dict[str, Any] = {
        "summary": family.summary,
        "head": family.head,
        "provides": list(family.provides),
        "normalizes_coarsest_map": family.detector.normalizes_coarsest_map,
        "anchors": family.anchors and asdict(family.anchors),
        "channels": [],
        "rounds": None,
        "schema": schema,
    }
    if "pyramid_channels" not in schema["properties"]:
        entry["channels"] = [
            {"of": chosen, "channels": list(detector.channels)} for chosen, detector in _on_meta(family)
        ]
    if "backbone" not in family.provides or not set(_backbones(schema)) <= set(BACKBONES):
        _, detector = next(_on_meta(family))
        with torch.device("meta"):
            maps = detector.eval().features(torch.zeros(1, 3, ODD_SIDE, ODD_SIDE))
        # Those of the spec: SSD's last two levels have 3 and 1 cells, whatever the image.
        strides = list(detector.config.model_dump()["strides"])
        sides = [features.shape[-1] for features in maps.values()]
        entry["rounds"] = _rounding(family.name, strides, sides[: len(strides)])
    return entry


def _method(entry: Entry) -> dict[str, Any]:
    return {
        "summary": entry.summary,
        "needs": list(entry.needs),
        "weights": entry.weights,
        "head_weights": entry.weights_of("proposals"),
        "backbone_weights": entry.weights_of("backbone"),
        "logit_weights": entry.weights_of("logits"),
        "backbone_strides": list(entry.backbone_strides),
        "needs_teacher": entry.needs_teacher,
        "schema": _schema(entry.config),
    }


def catalog() -> dict[str, Any]:
    """Return the catalog: JSON Schemas of every config, backbones with their sizes, pretrained detectors, formats.

    A backbone `rounds` the sides of its maps up or down, where the image's are no multiples of 32. So does a family;
    null: as its backbone. Two backbones have the same parameters up to a stride where their `layouts` are the same
    for it. `channels` are those of a family's levels, finest first, by the keys of a spec that decide them; empty for
    families with `pyramid_channels`. `anchors`: see `defeat.rules.anchors.AnchorSizes`.
    """
    return {
        "format_version": FORMAT_VERSION,
        "detectors": {name: _family(family) for name, family in DETECTORS.items()},
        "pretrained": {
            name: {
                "detector": entry.config.model_dump(mode="json"),
                "weights": {key: {"classes": classes_of(weights)} for key, weights in entry.weights.items()},
            }
            for name, entry in published().items()
        },
        "backbones": {name: _backbone(name) for name in BACKBONES},
        "methods": {name: _method(entry) for name, entry in METHODS.items()},
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
    try:
        plugins.load()
        text = json.dumps(catalog(), indent=1, sort_keys=True) + "\n"
    except RunError as error:
        sys.exit(error.detail)
    path = Path(paths[0])
    if not check:
        path.write_text(text)
        return 0
    if path.exists() and path.read_text() == text:
        return 0
    print(f"{path} is out of date: run `make catalog`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
