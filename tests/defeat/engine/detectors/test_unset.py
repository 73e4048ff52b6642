"""Building without values: nothing is drawn, and after loading nothing is left as it was found."""

import pytest
import safetensors.torch
import torch
from torch import nn

from defeat.engine import detectors
from defeat.engine.detectors.unset import Unset
from tests.support.training import CLASSES, TINY

SPECS = [
    TINY,
    {"architecture": "fcos", "backbone": "torchvision/resnet18", "pyramid_channels": 32},
    {"architecture": "mask_rcnn", "backbone": "torchvision/regnet_y_400mf", "pyramid_channels": 16},
    {"architecture": "retinanet", "backbone": "torchvision/swin_t", "pyramid_channels": 32},
    {"architecture": "faster_rcnn", "backbone": "timm/convnext_atto", "frozen_batch_norm": True},
    {"architecture": "ssd"},
    {"architecture": "ssdlite"},
]


def name_of(spec):
    return f"{spec['architecture']} {spec.get('backbone', '')}"


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_a_detector_is_loaded_whole_and_without_a_draw(spec, tmp_path, monkeypatch):
    torch.manual_seed(0)
    saved = detectors.build(spec, CLASSES)
    detectors.save(saved, tmp_path / "d.safetensors")
    before, built = torch.get_rng_state(), detectors.build

    def spoilt(*args, **kwargs):
        """Make sure that memory that nobody has set is not by chance what is loaded."""
        detector = built(*args, **kwargs)
        with torch.no_grad():
            for tensor in detector.state_dict().values():
                tensor.fill_(7)
        return detector

    monkeypatch.setattr(detectors, "build", spoilt)
    loaded = detectors.load(tmp_path / "d.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in saved.state_dict().items())
    ours, theirs = (dict(detector.named_buffers()) for detector in (loaded, saved))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), "a buffer that no file holds"


def test_draws_are_back_afterwards():
    with pytest.raises(ValueError, match="inside"), Unset():
        raise ValueError("inside")
    torch.manual_seed(0)
    one = nn.Linear(4, 4)
    torch.manual_seed(0)
    with Unset():
        nn.Linear(4, 4)
    other = nn.Linear(4, 4)
    assert torch.equal(one.weight, other.weight)


def test_what_is_missing_is_still_found_missing(tmp_path):
    detector = detectors.build(TINY, CLASSES)
    state = detector.state_dict()
    detectors.save(detector, tmp_path / "d.safetensors")
    with safetensors.safe_open(tmp_path / "d.safetensors", framework="pt") as file:
        metadata = file.metadata()
    state.pop(next(iter(state)))
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "d", metadata)
    with pytest.raises(detectors.RunError, match="Missing key"):
        detectors.load(tmp_path / "d")
