"""The API, which has no torch, refuses the initial weights that do not fit: drawn at random, seed fixed."""

import random
from collections.abc import Mapping
from typing import Any

import pytest

from app.specs.catalog import load_catalog
from app.specs.initial_weights import tensor_problems
from defeat.engine.detectors import Detector
from tests.defeat.engine.detectors.test_api_agrees_on_pairs import built, complete

# With the first stages of others, with a layout of its own, and with as many channels as a pyramid may have.
BACKBONES = [
    "torchvision/resnet50",
    "torchvision/resnet101",
    "timm/lcnet_050",
    "timm/resnet10t",
    "torchvision/regnet_y_400mf",
]
VALUES: dict[str, list[Any]] = {
    "backbone": BACKBONES,
    "anchor_ratios": [[1.0], [0.5, 2.0], [2.0, 0.5], [0.5, 1.0, 2.0]],
    "anchor_octaves": [1, 2, 3],
    "anchor_doublings": [1, 2, 3],
    "pyramid_channels": [32, 128, 512],
    "head_channels": [16, 32],
    "batch_norm_epsilon": [None, 1e-3],
}


def values_of(key: str, member: Mapping[str, Any]) -> list[Any]:
    """What a key may be, two values at least where there are two."""
    if "const" in member:
        return [member["const"]]
    if key in VALUES and VALUES[key][0] in member.get("enum", VALUES[key]):
        return VALUES[key]
    if "enum" in member:
        return list(member["enum"])
    if member["type"] == "boolean":
        return [False, True]
    default, lowest = member["default"], member.get("minimum")
    if lowest is None or default == lowest:
        return [default, default + 1 if member["type"] == "integer" else (default or 1) / 2]
    return [default, lowest]


def fits(detector: Detector, initial: Detector) -> bool:
    try:
        detector.load_state_dict(initial.state_dict(), assign=True)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("architecture", load_catalog().detectors)
def test_what_fits(architecture):
    """A detector and one with a single key changed, each key of its spec in turn, and now and then another besides."""
    catalog, draw = load_catalog(), random.Random(architecture)
    members = catalog.detectors[architecture]["schema"]["properties"]
    choices = {key: values_of(key, member) for key, member in members.items()}
    changeable = [key for key, values in choices.items() if len(values) > 1]
    answers = set()
    for turn, key in enumerate(changeable * 2):
        base = {name: draw.choice(values) for name, values in choices.items()}
        changed = [key] if turn < len(changeable) else [key, draw.choice(changeable)]
        given = base | {name: draw.choice([one for one in choices[name] if one != base[name]]) for name in changed}
        wanted, own = (
            complete(catalog, one | {"max_size": 8192} if "max_size" in one else one) for one in (base, given)
        )
        refused = list(tensor_problems(catalog, ("student", "initial_weights"), wanted, own))
        answers.add(fit := fits(built(wanted), built(own)))
        assert fit != bool(refused), (changed, wanted, own, refused)
        # One who does what it says is not refused again.
        kept = {name: own[name] for name in own if refused and f"{name} " in refused[0]["detail"].partition("(")[2]}
        assert not list(tensor_problems(catalog, ("student", "initial_weights"), wanted | kept, own))
    assert answers == {True, False} or architecture == "ssd"
