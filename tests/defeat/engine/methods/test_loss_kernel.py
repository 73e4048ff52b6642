"""The benchmark of the neck loss on a GPU, rehearsed on a CPU at a small size."""

import json

import pytest
import torch

from benchmarks import loss_kernel
from benchmarks.loss_kernel import Size, main, measure_device

SMALL = Size(images=2, channels=4, height=64, width=96, boxes=3, repeats=2)


def test_each_form_is_measured_and_agrees():
    found = measure_device(SMALL, torch.device("cpu"), copied_bytes=2**16)
    assert json.loads(json.dumps(found)) == found
    assert found["copy_bytes_per_second"] > 0
    kinds = {(case["dtype"], case["layout"], case["levels"]) for case in found["cases"]}
    assert len(kinds) == len(found["cases"]) == 8
    for case in found["cases"]:
        assert case["milliseconds"].keys() == case["bandwidth_share"].keys() == {"kernel", "blocks", "plain"}
        assert case["gradient_difference"] == case["value_difference"]["kernel"] == 0
        assert case["value_difference"]["plain"] <= 1e-5
        assert not case["kernel_used"]
        if case["levels"] == 1:
            # 2 images of 4 channels and 16 x 24 cells: two maps forward, three backward.
            assert case["moved_bytes"] == 5 * 2 * 4 * 16 * 24 * (4 if case["dtype"] == "torch.float32" else 2)
    assert not found["ok"]  # a GPU without the kernel would be a failure


@pytest.mark.parametrize(("arguments", "images"), [(["--quick"], 2), ([], 8)])
def test_the_gpu_is_asked_for_by_name(monkeypatch, capsys, arguments, images):
    asked = []

    def measured(size, device, *, copied_bytes):
        asked.append((size.images, device, copied_bytes))
        return {"ok": True}

    monkeypatch.setattr(loss_kernel, "measure_device", measured)
    assert main([*arguments, "--device", "cuda"]) == 0
    assert asked == [(images, torch.device("cuda", 0), 2**30)]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"benchmark": "loss_kernel", "ok": True}
