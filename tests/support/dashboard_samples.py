"""What jobs and datasets hold, as real ones do: specs, losses, evaluations, a report."""

import math
import random
from collections.abc import Iterable
from typing import Any

from app.models import JobEvaluation, JobMetric

CLASSES = ["RBC", "WBC", "Platelets"]
STEPS_PER_EPOCH = 26
EPOCHS = 12
SPLITS = {
    "train": {"images": 205, "boxes": 2805},
    "val": {"images": 87, "boxes": 1121},
    "test": {"images": 72, "boxes": 962},
}
HARDNESS = {"RBC": 0.92, "WBC": 1.1, "Platelets": 0.66}
OOM = (
    "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has 15.77 GiB in all, of which 1.02 GiB is free; "
    "lower schedule.batch_size or the detector's image size"
)


def spec(
    dataset_id: str, name: str, *, method: str = "defeat", backbone: str = "timm/mobilenetv3_small_050"
) -> dict[str, Any]:
    """Return a resolved job spec."""
    schedule = {"epochs": EPOCHS, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.02, "momentum": 0.9}

    def _detector(body: str, channels: int) -> dict[str, Any]:
        return {"architecture": "faster_rcnn", "backbone": body, "channels": channels, "image_size": [640, 480]}

    teacher = {
        "source": "train",
        "detector": _detector("timm/resnet18", 64),
        "initial_weights": "random",
        "schedule": {**schedule, "epochs": 10},
    }
    weights = {"neck_object_weight": 4.0, "neck_background_weight": 16.0, "proposals": "student", "mask": "paper"}
    return {
        "name": name,
        "labels": {},
        "dataset": dataset_id,
        "teacher": teacher if method != "baseline" else None,
        "student": {"detector": _detector("timm/mobilenetv3_small_050", 32), "initial_weights": "random"},
        "distillation": {"method": method, **(weights if method != "baseline" else {})},
        "schedule": schedule,
        "evaluation": {"split": "val", "every_epochs": 1},
        "augmentation": {"horizontal_flip": 0.5},
        "seed": 0,
    }


def metrics(ap: float, rng: random.Random) -> dict[str, Any]:
    """Return the metrics of an evaluation with about this AP (0 to 1)."""
    per_class = []
    for name, hardness in HARDNESS.items():
        value = min(0.98, ap * hardness * rng.uniform(0.98, 1.02))
        per_class.append({"class": name, "ap": round(value, 4), "ap50": round(min(0.995, value**0.45), 4)})
    mean = sum(row["ap"] for row in per_class) / len(per_class)
    mean50 = sum(row["ap50"] for row in per_class) / len(per_class)
    return {
        "ap": round(mean, 4),
        "ap50": round(mean50, 4),
        "ap75": round(mean * 1.08, 4),
        "ap_small": None,
        "ap_medium": round(mean * 0.9, 4),
        "ap_large": round(mean * 1.1, 4),
        **{f"ar_{n}": round(min(1.0, mean * 1.15), 4) for n in (1, 10, 100)},
        "ar_small": None,
        "ar_medium": round(mean, 4),
        "ar_large": round(min(1.0, mean * 1.2), 4),
        "per_class": per_class,
        "images": 87,
        "detections": 1412,
    }


def losses(subject: str, job_id: str, epochs: float, *, distilled: bool, seed: int) -> Iterable[JobMetric]:
    """Yield a training's log: losses that fall with noise, a row every other step."""
    rng = random.Random(seed)
    for step in range(1, int(epochs * STEPS_PER_EPOCH) + 1, 2):
        fall = math.exp(-step / 90)
        parts = {
            "loss/classifier": 0.18 + 0.9 * fall,
            "loss/box_reg": 0.22 + 0.35 * (1 - math.exp(-step / 25)) * (0.4 + 0.6 * fall),
            "loss/objectness": 0.03 + 0.6 * fall,
            "loss/rpn_box_reg": 0.05 + 0.12 * fall,
        }
        if distilled:
            parts |= {
                "loss/neck_object": 0.35 + 1.1 * fall,
                "loss/neck_background": 0.2 + 0.8 * fall,
                "loss/head_object": 0.12 + 0.4 * fall,
                "loss/head_background": 0.02 + 0.1 * fall,
            }
        parts = {name: round(value * rng.lognormvariate(0, 0.09), 5) for name, value in parts.items()}
        pulls = (
            {name.replace("loss/", "gradient_share/"): value for name, value in parts.items()} if step % 5 == 1 else {}
        )
        yield JobMetric(
            job_id=job_id,
            subject=subject,
            step=step,
            epoch=step / STEPS_PER_EPOCH,
            values={
                "loss/total": round(sum(parts.values()), 5),
                **parts,
                **{name: value / sum(pulls.values()) for name, value in pulls.items()},
                "learning_rate": 0.02,
                "images_per_s": round(rng.uniform(38, 44), 2),
            },
        )


def evaluations(job_id: str, subject: str, epochs: int, best: float, *, seed: int) -> list[JobEvaluation]:
    """Return evaluations after each epoch that climb towards `best`."""
    rng = random.Random(seed)
    return [
        JobEvaluation(
            job_id=job_id,
            subject=subject,
            epoch=epoch,
            metrics=metrics(best * (1 - math.exp(-epoch / 3.2)) * rng.uniform(0.98, 1.01), rng),
        )
        for epoch in range(1, epochs + 1)
    ]


def report() -> dict[str, Any]:
    """Return a dataset's report with problems that can be lived with."""
    counts = {
        "train": {"images": 205, "boxes": 2805},
        "val": {"images": 87, "boxes": 1121},
        "test": {"images": 72, "boxes": 962},
    }
    shares = {"RBC": 0.85, "WBC": 0.076, "Platelets": 0.074}
    return {
        "format": "voc",
        "images": 364,
        "boxes": 4888,
        "classes": [
            {
                "name": name,
                "splits": {
                    split: {
                        "images": round(n["images"] * (0.99 if name == "RBC" else 0.6)),
                        "boxes": round(n["boxes"] * share),
                    }
                    for split, n in counts.items()
                },
            }
            for name, share in shares.items()
        ],
        "splits": SPLITS,
        "problems": [
            {
                "code": "box_outside",
                "severity": "note",
                "count": 12,
                "summary": "boxes reach beyond their image and were clipped to it",
                "examples": [{"file": "Annotations/BloodImage_00016.xml", "detail": "xmax 642 > width 640"}],
            },
            {
                "code": "box_empty",
                "severity": "dropped",
                "count": 2,
                "summary": "boxes have no area",
                "examples": [
                    {"file": "Annotations/BloodImage_00338.xml", "detail": "xmin 12 = xmax 12"},
                    {"file": "Annotations/BloodImage_00340.xml", "detail": "ymin 0 = ymax 0"},
                ],
            },
        ],
        "dropped_fraction": 0.0004,
        "max_dropped_fraction": 0.05,
    }
