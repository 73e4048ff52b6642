"""Weights files that are damaged or lie: each gets a named reason, whatever torch makes of it."""

import io
import json
import random
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import pytest
import safetensors.torch
import torch

from defeat.engine import detectors
from defeat.engine.detectors.check import read_weights, run
from defeat.engine.report import Reporter, RunError
from tests.support.training import CLASSES, TINY

STATE = {"a": torch.zeros(3), "b": torch.ones(2, 2)}


def members(document: object) -> dict[str, bytes]:
    buffer = io.BytesIO()
    torch.save(document, buffer)
    with zipfile.ZipFile(buffer) as file:
        return {name: file.read(name) for name in file.namelist()}


def write(path: Path, content: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in content.items():
            file.writestr(name, data)
    return path


def refusal(path: Path) -> RunError:
    with pytest.raises(RunError) as refused:
        read_weights(path)
    return refused.value


def test_a_pickle_with_changed_bytes_is_read_or_refused(tmp_path):
    """Its errors are of many kinds: unpickling, KeyError, IndexError, TypeError, struct.error."""
    whole = members(STATE)
    code = next(name for name in whole if name.endswith("data.pkl"))
    numbers = random.Random(0)
    refused = []
    for _ in range(300):
        damaged = bytearray(whole[code])
        damaged[numbers.randrange(len(damaged))] = numbers.randrange(256)
        try:
            read_weights(write(tmp_path / "x.pt", {**whole, code: bytes(damaged)}))
        except RunError as error:
            refused.append(error)
    assert {(error.failure_class, error.code) for error in refused} == {("data", "not_a_checkpoint")}
    kinds = {type(error.__cause__) for error in refused}
    assert {KeyError, UnpicklingError} <= kinds


def test_a_compressed_torch_file_is_refused_before_it_is_unpacked(tmp_path):
    bomb = write(tmp_path / "x.pt", members({"a": torch.zeros(1_000_000)}), zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 100_000
    assert "compressed" in refusal(bomb).detail


@pytest.mark.parametrize(
    "value",
    [torch.ones(3).to_sparse(), torch.ones(3, device="meta"), torch.ones(3, dtype=torch.complex64), [1.0, 2.0]],
    ids=["sparse", "meta", "complex", "list"],
)
def test_what_is_no_dense_tensor_of_numbers_is_no_weight(tmp_path, value):
    torch.save({"a": value}, tmp_path / "x.pt")
    assert "holds no state_dict" in refusal(tmp_path / "x.pt").detail


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ("{", "bad_header"),
        ("[" * 100_000, "bad_header"),
        ('{"format_version": 2}', "unknown_format_version"),
        (json.dumps({"format_version": 1, "detector": TINY, "classes": "disc"}), "bad_header"),
        (json.dumps({"format_version": 1, "detector": TINY, "classes": [["disc"]]}), "bad_header"),
        (json.dumps({"format_version": 1, "detector": TINY, "classes": []}), "bad_classes"),
        (json.dumps({"format_version": 1, "detector": TINY, "classes": ["disc", "disc"]}), "bad_classes"),
        (
            json.dumps({"format_version": 1, "detector": {"architecture": ["x"]}, "classes": ["a"]}),
            "unknown_architecture",
        ),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, code):
    safetensors.torch.save_file(STATE, tmp_path / "x.safetensors", {detectors.METADATA_KEY: header})
    with pytest.raises(RunError) as refused:
        run({"detector": None, "classes": None}, {"weights": str(tmp_path / "x.safetensors")}, Reporter(tmp_path))
    assert refused.value.code == code


def test_a_long_contradiction_is_told_in_short(tmp_path):
    header = {"format_version": 1, "detector": TINY, "classes": [f"class {number}" for number in range(5000)]}
    safetensors.torch.save_file(STATE, tmp_path / "x.safetensors", {detectors.METADATA_KEY: json.dumps(header)})
    spec = {"detector": None, "classes": list(CLASSES)}
    with pytest.raises(RunError) as refused:
        run(spec, {"weights": str(tmp_path / "x.safetensors")}, Reporter(tmp_path))
    assert refused.value.code == "classes_differ"
    assert "given as 'square', 'disc' (2), and the file has 'class 0', " in refused.value.detail
    assert len(refused.value.detail) < 1000
