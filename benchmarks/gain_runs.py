"""The runs of `benchmarks.gain`: real run directories, each carried out once by `python -m defeat.engine.run`."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gain_setups import Data, Setup, Spec
from defeat.engine.data import canonical
from examples import digits

# The directory of the BCCD images, if they are not in shared/data beside the checkout.
DATA_VARIABLE = "DEFEAT_TEST_DATA"
_IMPORT_SPEC = {"max_dropped_fraction": 0.05, "max_unpacked_bytes": 2**32, "max_unpacked_files": 100_000}


class RunFailed(Exception):
    """A run failed; the message has its directory and the reason."""


def carry_out(directory: Path, kind: str, spec: Spec, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Carry out a run in `directory`, unless the same run is there and finished; return its `results`.

    Each run uses one thread: the number of cores changes neither its results nor its time.

    Raises `RunFailed` if it fails.
    """
    request = json.dumps({"kind": kind, "id": directory.name, "attempt": 1, "spec": spec, "inputs": inputs}, indent=1)
    run_file, result_file = directory / "run.json", directory / "result.json"
    if not (result_file.exists() and run_file.read_text() == request and _succeeded(result_file)):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        run_file.write_text(request)
        started = time.monotonic()
        with (directory / "log.txt").open("wb") as log:
            subprocess.run(
                [sys.executable, "-m", "defeat.engine.run", str(directory)],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                check=False,
            )
        print(f"  {directory.relative_to(directory.parents[1])}: {time.monotonic() - started:.0f} s", flush=True)
        if not _succeeded(result_file):
            failure = json.loads(result_file.read_text())["failure"] if result_file.exists() else None
            raise RunFailed(f"{directory} failed: {failure['detail'] if failure else 'see its log.txt'}")
    return dict(json.loads(result_file.read_text())["results"])


def _succeeded(result_file: Path) -> bool:
    return result_file.exists() and json.loads(result_file.read_text())["status"] == "succeeded"


def blood_cells() -> Path:
    """Return the directory of the BCCD images: `$DEFEAT_TEST_DATA/bccd`, or `shared/data/bccd` beside the checkout.

    Raises `RunFailed` if neither exists.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    directory = Path(os.environ.get(DATA_VARIABLE) or beside) / "bccd"
    if not directory.is_dir():
        raise RunFailed(f"there is no directory {directory}: set {DATA_VARIABLE} to the directory that contains bccd")
    return directory


def prepare_data(out: Path, data: Data, *, student_images: int | None, tiny: bool) -> tuple[Path, Path]:
    """Return the canonical datasets of teacher and students; they are made in `out` unless they are there.

    The students' dataset has the first `student_images` of the training split (None: all) and the same other splits.
    """
    imported = out / "import"

    def _unpack_whole(directory: Path) -> None:
        inputs = {"archive": None, "directory": str(_source(out, data, tiny))}
        carry_out(imported, "import_dataset", _IMPORT_SPEC, inputs)
        canonical.unpack(imported / "artifacts" / "dataset.tar", directory)

    whole = _made(out / "whole", _unpack_whole)
    if student_images is None:
        return whole, whole

    def _write_part(directory: Path) -> None:
        dataset = canonical.read(whole)
        kept = dataset.in_split("train")[:student_images]
        images = tuple(image for image in dataset.images if image.split != "train" or image in kept)
        sources = {image.file: whole / image.file for image in images}
        canonical.write(directory, replace(dataset, images=images), sources)

    return whole, _made(out / f"first-{student_images}", _write_part)


def _made(directory: Path, make: Callable[[Path], None]) -> Path:
    """Return the directory, made if it is not there; an unfinished one is made again."""
    if not directory.exists():
        part = directory.with_name(directory.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        make(part)
        part.rename(directory)
    return directory


def _source(out: Path, data: Data, tiny: bool) -> Path:
    if data == "bccd":
        return blood_cells()
    scenes = out / "scenes"
    shutil.rmtree(scenes, ignore_errors=True)
    return digits.build(scenes, train_scenes=16 if tiny else 400, val_scenes=8 if tiny else 100)


def train_teacher(out: Path, setup: Setup, dataset: Path) -> tuple[Path, float]:
    """Train the setup's teacher once and return its weights file and its AP, 0 to 1."""
    results = carry_out(
        out / "teacher",
        "distill",
        _job(setup, teacher=None, student=setup.teacher, method={"method": "baseline"}, seed=0)
        | {"schedule": setup.teacher_schedule},
        _inputs(dataset, teacher=None),
    )
    return out / "teacher" / "artifacts" / "student-last.safetensors", results["student"]["ap"]


def train_student(
    out: Path, setup: Setup, dataset: Path, teacher: Path, *, name: str, method: Spec, seed: int
) -> dict[str, Any]:
    """Train the setup's student with a method and a seed, and return its metrics, as `coco_metrics` has them.

    The initial weights and the order of the images follow from the seed alone: they are the same for every method.
    """
    without = method["method"] == "baseline"
    job = _job(
        setup,
        teacher=None if without else {"source": "checkpoint", "id": _id(teacher), "detector": setup.teacher},
        student=setup.student,
        method=method,
        seed=seed,
    )
    results = carry_out(
        out / f"{name}-{seed}", "distill", job, _inputs(dataset, teacher=None if without else str(teacher))
    )
    return dict(results["student"])


def _id(weights: Path) -> str:
    """Return an id that depends on the teacher's weights: a retrained teacher's students are trained again."""
    with weights.open("rb") as file:
        return f"ckpt_{hashlib.file_digest(file, 'sha256').hexdigest()[:26]}"


def _job(setup: Setup, *, teacher: Spec | None, student: Spec, method: Spec, seed: int) -> dict[str, Any]:
    return {
        "teacher": teacher,
        "student": {"detector": student},
        "distillation": method,
        "schedule": setup.student_schedule,
        # Only the last epoch's detector is evaluated: the best of several epochs would be biased upwards.
        "evaluation": {"split": setup.split, "every_epochs": 1000, "gallery_images": 0},
        "seed": seed,
        "augmentation": {"horizontal_flip": setup.horizontal_flip},
    }


def _inputs(dataset: Path, *, teacher: str | None) -> dict[str, Any]:
    others = {"student": None, "teacher_initial": None, "resume": None, "image_memory_bytes": None}
    return {"dataset": str(dataset), "teacher": teacher, **others, "device": "cpu"}
