"""What the tests of SSD and SSDLite share."""

from typing import Any

SSD: dict[str, Any] = {"architecture": "ssd"}
SSDLITE: dict[str, Any] = {"architecture": "ssdlite", "backbone": "torchvision/mobilenet_v3_small", "size": 96}
# VGG-16's layers and strides; only those are wide whose outputs SSD takes.
NARROW_VGG = [4, 4, "M", 4, 4, "M", 8, 8, 8, "M", 8, 8, 512, "M", 8, 8, 512, "M"]
