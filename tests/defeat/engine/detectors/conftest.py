"""Fixtures of the detectors' tests."""

import pytest
from torchvision.models import vgg

from tests.support.ssd import NARROW_VGG


@pytest.fixture
def narrow_vgg(monkeypatch):
    """Give SSD a VGG that takes a tenth of the time, with the real one's strides and outputs."""
    monkeypatch.setitem(vgg.cfgs, "D", NARROW_VGG)
