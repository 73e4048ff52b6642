"""The `distill` run: prepare the teacher, train the student with a method, evaluate both, and write the artifacts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from defeat.engine import detectors, methods
from defeat.engine.data import canonical
from defeat.engine.detectors.base import Detector, full_coverage
from defeat.engine.evaluation.evaluate import summary
from defeat.engine.evaluation.gallery import write_gallery
from defeat.engine.events import Subject
from defeat.engine.report import Reporter
from defeat.engine.training.checkpoint import Best, TrainingCheckpoint
from defeat.engine.training.config import JobConfig, ScheduleConfig, TrainedTeacherConfig
from defeat.engine.training.context import RunContext
from defeat.engine.training.initial_weights import build_detector
from defeat.engine.training.process_group import ProcessGroup, local_device, warn_of_little_shared_memory
from defeat.engine.training.seeds import reseed
from defeat.engine.training.teacher import build_teacher, prepare_teacher
from defeat.engine.training.train import Trainer
from defeat.engine.training.trainable import require_trainable

# Parts of a job's spec that only the service reads.
SERVICE_KEYS = frozenset({"name", "labels", "dataset"})


def run(spec: Mapping[str, Any], inputs: Mapping[str, Any], reporter: Reporter) -> dict[str, Any]:
    """Carry out one distillation; see docs/architecture.md for spec, inputs and results.

    Raises:
        RunError: the spec or the data asks for something that is not possible.
        Cancelled: the run was asked to end.
    """
    config = JobConfig.parse({key: value for key, value in spec.items() if key not in SERVICE_KEYS}, where="spec")
    device = local_device(inputs["device"])
    reporter.progress("preparing", fraction=0.0)
    with ProcessGroup.join(device) as group:
        warn_of_little_shared_memory(group, device, reporter)
        return _distill(config, inputs, reporter, device, group)


def _distill(
    config: JobConfig, inputs: Mapping[str, Any], reporter: Reporter, device: torch.device, group: ProcessGroup
) -> dict[str, Any]:
    dataset = canonical.read(Path(inputs["dataset"]))
    resume = TrainingCheckpoint.load(Path(inputs["resume"])) if inputs["resume"] else None
    context = RunContext.create(config, dataset, inputs, device=device, reporter=reporter, group=group)
    if resume:
        context.resume(resume)

    # Everything is built before the teacher is trained: what does not pair or train fails now, and not hours later.
    teacher = build_teacher(config.teacher, inputs, context) if config.teacher else None
    student = build_detector(
        config.student, dataset.classes, inputs["student"], seed=config.seed, subject="student"
    ).to(device)
    _require_trainable(config, teacher, student, context)
    reseed(config.seed, "student", "method")
    method = methods.build(config.distillation, student, teacher).to(device)

    teacher_metrics = None
    if teacher is not None and config.teacher is not None:
        teacher_metrics = prepare_teacher(config.teacher, teacher, context, resume)

    def _save(checkpoint: TrainingCheckpoint) -> None:
        if teacher is not None and config.trains_teacher:
            checkpoint.teacher = teacher.state_dict()
        checkpoint.teacher_metrics = teacher_metrics
        context.save(checkpoint)

    trainer = Trainer(
        context,
        student,
        subject="student",
        teacher=teacher,
        method=method,
        schedule=config.schedule,
        save=_save,
    )
    best = trainer.run(resume if resume and resume.subject == "student" else None)
    if not group.is_main:
        return {}
    _write_artifacts(config, context, teacher, student, best)
    reporter.message("info", "student_ready", f"the student reaches {summary(best.metrics)} after epoch {best.epoch}")
    reporter.progress("finishing", fraction=1.0, eta_s=0.0)
    return {"teacher": teacher_metrics, "student": {**best.metrics, "epoch": best.epoch}}


def _require_trainable(config: JobConfig, teacher: Detector | None, student: Detector, context: RunContext) -> None:
    trained: list[tuple[Detector, ScheduleConfig, Subject, str]] = [(student, config.schedule, "student", "schedule")]
    if teacher is not None and isinstance(config.teacher, TrainedTeacherConfig):
        trained.append((teacher, config.teacher.schedule, "teacher", "teacher.schedule"))
    for detector, schedule, who, where in trained:
        require_trainable(
            detector,
            schedule,
            config.augmentation,
            images=len(context.train_images),
            processes=context.group.size,
            who=who,
            where=where,
        )


def _write_artifacts(
    config: JobConfig, context: RunContext, teacher: Detector | None, student: Detector, best: Best
) -> None:
    """Write the detectors, the gallery and the metrics; the student ends with its best weights, in eval mode."""
    reporter = context.reporter
    reporter.progress("finishing", fraction=context.progress.fraction)
    student.eval()
    _write_detector(reporter, student, "student-last.safetensors", kind="student", epoch=config.schedule.epochs)
    student.load_state_dict(best.model)
    metrics = {name: best.metrics[name] for name in ("ap", "ap50")}
    _write_detector(reporter, student, "student-best.safetensors", kind="student", epoch=best.epoch, **metrics)
    if teacher is not None and config.trains_teacher:
        _write_detector(reporter, teacher, "teacher.safetensors", kind="teacher")
    write_gallery(
        reporter,
        context.eval_images,
        {"teacher": teacher, "student": student},
        classes=context.dataset.classes,
        count=config.evaluation.gallery_images,
        device=context.device,
    )
    path = reporter.artifact("metrics.json", kind="metrics", content_type="application/json")
    path.write_text(json.dumps(context.logger.state_dict()))


def _write_detector(reporter: Reporter, detector: Detector, name: str, *, kind: Subject, **details: Any) -> None:
    """Save a detector as an artifact, with `details` beside those that describe any detector."""
    details |= {
        "detector": detector.config.model_dump(mode="json"),
        "classes": detector.classes,
        "coverage": full_coverage(len(detector.state_dict())),
        "parameters": sum(parameter.numel() for parameter in detector.parameters()),
    }
    path = reporter.artifact(name, kind=kind, content_type="application/octet-stream", details=details)
    detectors.save(detector, path)
