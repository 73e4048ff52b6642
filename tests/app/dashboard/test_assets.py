"""The dashboard's files: addresses that change with the content, long caching, and habits that keep pages safe."""

import gzip
import re
from pathlib import Path

import httpx2
import pytest

import app.dashboard
from app.dashboard import assets
from tests.app.dashboard.conftest import Service

STATIC = Path(app.dashboard.__file__).parent / "static"


@pytest.mark.parametrize("name", ["style.css", "job.js", "icon.svg", assets.PLOTLY])
def test_files_are_kept_for_ever_and_sent_small(name: str, service: Service) -> None:
    small = httpx2.get(f"{service.url}{assets.url(name)}", headers={"Accept-Encoding": "gzip"})
    plain = httpx2.get(f"{service.url}{assets.url(name)}", headers={"Accept-Encoding": "identity"})
    assert small.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert small.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert small.content == plain.content
    assert int(small.headers["content-length"]) == len(gzip.compress(plain.content, mtime=0))


@pytest.mark.parametrize(
    "path", ["/assets/0000/style.css", "/assets/{version}/nope.js", "/assets/{version}/..%2fpages.py"]
)
def test_nothing_else_is_served(path: str, service: Service) -> None:
    assert httpx2.get(service.url + path.format(version=assets.version())).status_code == 404


def test_an_unknown_file_cannot_get_into_a_template() -> None:
    with pytest.raises(KeyError, match=r"no asset 'nope\.js'; known: api\.js"):
        assets.url("nope.js")


@pytest.mark.parametrize("path", sorted(STATIC.glob("*.js")), ids=lambda path: path.name)
def test_scripts_are_small_and_never_make_markup_from_data(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 300
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
