"""The catalog: the engine's detectors, methods and parameters, as `python -m defeat.engine.catalog` wrote them."""

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

import structlog

from app.errors import Unavailable
from app.settings import get_settings

log = structlog.get_logger(__name__)

FORMAT_VERSION = 2


class Catalog:
    """Read access to the catalog's document; `defeat.engine.catalog.catalog` defines its format."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self._deciding: dict[tuple[str, str], tuple[str, ...]] = {}

    @property
    def detectors(self) -> dict[str, Any]:
        """Detector families by architecture: summary, head, provides, channels, anchors, how maps round, schema."""
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

    def family(self, detector: Mapping[str, Any]) -> dict[str, Any]:
        """Return the family of a detector spec."""
        return dict(self.document["detectors"][detector["architecture"]])

    def fields(self, detector: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON Schema of each key of a detector spec; `defeat.engine.detectors.config` has its `x-` keys."""
        return dict(self.document["detectors"][detector["architecture"]]["schema"]["properties"])

    def deciding(self, what: str, *detectors: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the keys that decide `what` of one of these detectors: see `defeat.engine.detectors.config.Decides`.

        Those with values for every stride come first, then those that only add levels.
        """
        keys: list[str] = []
        for detector in detectors:
            at = detector["architecture"], what
            if at not in self._deciding:
                fields = self.fields(detector)
                found = [key for key, field in fields.items() if what in field.get("x-decides", ())]
                self._deciding[at] = tuple(sorted(found, key=lambda key: "x-extra-levels" in fields[key]))
            keys += self._deciding[at]
        return tuple(dict.fromkeys(keys))


@lru_cache(maxsize=1)
def load_catalog() -> Catalog:
    """Read the catalog that `DEFEAT_CATALOG` names, or the packaged one, once per process.

    Raises `Unavailable` if there is none, or one of another format.
    """
    named = get_settings().catalog
    file = named or resources.files("app.specs") / "catalog.json"
    try:
        document = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise _unavailable(file, f"cannot be read: {error}") from error
    version = document.get("format_version", "none") if isinstance(document, dict) else "none"
    if version != FORMAT_VERSION:
        raise _unavailable(file, f"has format {version}; this version reads {FORMAT_VERSION}")
    return Catalog(document)


def _unavailable(file: Traversable, reason: str) -> Unavailable:
    """Log what the operator needs; the caller learns no path of the server."""
    log.error(
        "catalog_unavailable", file=str(file), reason=reason, written_by=f"python -m defeat.engine.catalog {file}"
    )
    return Unavailable("the service cannot read its catalog of detectors and methods; its log has the reason")
