"""What `import defeat` gives other people's programs, and what it costs."""

import json
import subprocess
import sys
from importlib.resources import files

import pytest

import defeat
from defeat.client import client, errors


def _python(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_importing_it_loads_neither_torch_nor_an_http_client():
    loaded = set(json.loads(_python("import defeat, json, sys; print(json.dumps(sorted(sys.modules)))")))
    assert "defeat" in loaded
    assert not loaded & {"torch", "torchvision", "numpy", "httpx", "httpx2", "defeat.client", "defeat.engine"}


def test_the_client_comes_without_torch():
    program = (
        "import sys; from defeat import Client, ApiError\n"
        "with Client('http://127.0.0.1:9') as client: print(client.url, issubclass(ApiError, Exception))\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    assert _python(program).split() == ["http://127.0.0.1:9", "True", "False", "False"]


def test_the_names_are_the_clients_own():
    assert defeat.Client is client.Client
    for name in set(defeat.__all__) - {"Client", "load"}:
        assert getattr(defeat, name) is getattr(errors, name)
    public = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert public == set(defeat.__all__) - {"Client", "load"}
    assert set(defeat.__all__) <= set(dir(defeat))
    with pytest.raises(AttributeError, match="'defeat' has no attribute 'Servr'"):
        _ = defeat.Servr


def test_its_types_are_published():
    assert files("defeat").joinpath("py.typed").is_file()


def test_a_saved_detector_is_loaded(tmp_path):
    torch = pytest.importorskip("torch")
    from defeat.engine import detectors
    from tests.support.tiny import TINY

    detector = detectors.build(TINY, ["cell"]).eval()
    detectors.save(detector, tmp_path / "student.safetensors")
    loaded = defeat.load(tmp_path / "student.safetensors", device="cpu")
    assert list(loaded.classes) == ["cell"]
    assert not loaded.training
    images = [torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(1))]
    for name, value in detector.detect(images)[0].items():
        assert torch.equal(loaded.detect(images)[0][name], value)


def test_loading_without_torch_says_what_to_install():
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import defeat\n"
        "try: defeat.load('student.safetensors')\n"
        "except ImportError as error: print(error)"
    )
    message = _python(program)
    assert "defeat.load needs" in message
    assert 'pip install "defeat-service[engine]"' in message
