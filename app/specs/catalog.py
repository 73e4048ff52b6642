"""The catalog: the engine's detectors, methods and parameters, as `python -m defeat.engine.catalog` wrote them."""

import json
from functools import lru_cache
from importlib import resources
from typing import Any

from app.errors import Unavailable


class Catalog:
    """Read access to the catalog's document; its shape is what `defeat.engine.catalog.catalog` returns."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document

    @property
    def detectors(self) -> dict[str, Any]:
        """Detector families by architecture: summary, head, provides, channels, schema."""
        return dict(self.document["detectors"])

    @property
    def backbones(self) -> dict[str, Any]:
        """Backbones with a feature pyramid by name: strides, channels, layouts, parameters, how maps are rounded."""
        return dict(self.document["backbones"])

    @property
    def methods(self) -> dict[str, Any]:
        """Distillation methods by name: summary, needs, needs_teacher, weights, which of these need more, schema."""
        return dict(self.document["methods"])

    @property
    def pretrained(self) -> dict[str, Any]:
        """Published detectors by name: their detector spec and their weights with classes."""
        return dict(self.document["pretrained"])

    def schema(self, section: str) -> dict[str, Any]:
        """Return the JSON Schema of `schedule`, `evaluation`, `augmentation`, `resources` or `combination`."""
        return dict(self.document[section]["schema"])


@lru_cache(maxsize=1)
def load_catalog() -> Catalog:
    """Read the packaged catalog, once per process."""
    file = resources.files("app.specs") / "catalog.json"
    try:
        return Catalog(json.loads(file.read_text()))
    except FileNotFoundError as error:
        raise Unavailable("app/specs/catalog.json is missing; `make catalog` writes it") from error
