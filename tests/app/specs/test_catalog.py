"""Which catalog the service reads, and what it reports of one that it cannot read."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app import logs
from app.errors import Unavailable
from app.settings import get_settings
from app.specs.catalog import Catalog, load_catalog

Load = Callable[[Path | None], Catalog]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Load the catalog that `DEFEAT_CATALOG` names."""

    def _load(path: Path | None) -> Catalog:
        monkeypatch.setenv("DEFEAT_CATALOG", "none" if path is None else str(path))
        _forget()
        return load_catalog()

    yield _load
    _forget()


def _forget() -> None:
    get_settings.cache_clear()
    load_catalog.cache_clear()


def test_the_packaged_one_unless_another_is_named(load: Load, tmp_path: Path):
    packaged = load(None)
    assert "faster_rcnn" in packaged.detectors
    document = {**packaged.document, "detectors": {}}
    (tmp_path / "catalog.json").write_text(json.dumps(document))
    assert load(tmp_path / "catalog.json").detectors == {}


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        (json.dumps({"format_version": 1}), "has format 1; this version reads 2"),
        ("[]", "has format none"),
    ],
)
def test_one_that_cannot_be_read_is_logged_with_what_writes_it(
    load: Load, tmp_path: Path, document: Any, says: str, capsys: pytest.CaptureFixture[str]
):
    logs.configure("INFO")
    path = tmp_path / "mine.json"
    if document is not None:
        path.write_text(document)
    with pytest.raises(Unavailable) as caught:
        load(path)
    logged = capsys.readouterr().err
    assert says in logged
    assert f"python -m defeat.engine.catalog {path}" in logged
    assert str(tmp_path) not in str(caught.value)
