"""The `distill` run: get the teacher, train the student with a method, measure both, leave the artifacts."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from defeat.engine import detectors, methods
from defeat.engine.data import canonical
from defeat.engine.data.canonical import CanonicalDataset, Split
from defeat.engine.data.loading.loader import ImageReader
from defeat.engine.detectors.base import Detector, full_coverage
from defeat.engine.detectors.pretrained import load_pretrained
from defeat.engine.detectors.unset import Unset
from defeat.engine.evaluation.evaluate import summary
from defeat.engine.evaluation.gallery import write_gallery
from defeat.engine.report import Reporter, RunError, Subject
from defeat.engine.training.checkpoint import Best, TrainingState
from defeat.engine.training.config import JobConfig, StudentConfig, TeacherConfig
from defeat.engine.training.logger import History, Plan
from defeat.engine.training.process_group import ProcessGroup, local_device, warn_of_little_shared_memory
from defeat.engine.training.seeds import reseed
from defeat.engine.training.train import EVALUATION_COST, TEACHER_COST, Context, Training, evaluate
from defeat.engine.training.trainable import require_trainable

# Parts of a job's spec that only the service reads.
SERVICE_KEYS = frozenset({"name", "labels", "dataset"})


def run(spec: Mapping[str, Any], inputs: Mapping[str, Any], reporter: Reporter) -> dict[str, Any]:
    """Carry out one distillation; see docs/architecture.md for spec, inputs and results.

    Raises:
        RunError: the spec or the data asks for what cannot be.
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
    resume = TrainingState.load(Path(inputs["resume"])) if inputs["resume"] else None
    context = _context(config, dataset, inputs, device, reporter, group)
    if resume:
        context.history.metrics, context.history.evaluations = resume.history["metrics"], resume.history["evaluations"]
        context.plan.done = resume.done
        where = f"epoch {resume.epoch}" + (f" and {resume.step} steps" if resume.step else "")
        reporter.message("info", "resumed", f"going on after {where} of the {resume.subject}'s training")

    # All are built before the teacher is trained: what cannot be paired or trained is said at once, not hours later.
    teacher = _build_teacher(config, inputs, context)
    student = _build(config.student, dataset.classes, inputs["student"], seed=config.seed, subject="student").to(device)
    _require_trainable(config, teacher, student, context)
    reseed(config.seed, "student", "method")
    method = methods.build(config.distillation, student, teacher).to(device)

    teacher_metrics = None
    if teacher is not None and config.teacher is not None:
        teacher_metrics = _ready_teacher(config.teacher, teacher, context, resume)

    def _save(state: TrainingState) -> None:
        if teacher is not None and config.trains_teacher:
            state.teacher = teacher.state_dict()
        state.teacher_metrics = teacher_metrics
        _keep(context, state)

    training = Training(
        context,
        student,
        subject="student",
        teacher=teacher,
        method=method,
        schedule=config.schedule,
        save=_save,
    )
    best = training.run(resume if resume and resume.subject == "student" else None)
    return _finish(config, context, teacher, teacher_metrics, student, best) if group.is_main else {}


def _require_trainable(config: JobConfig, teacher: Detector | None, student: Detector, context: Context) -> None:
    trained = [(student, config.schedule, "schedule")]
    if teacher is not None and config.teacher is not None and config.trains_teacher:
        trained.append((teacher, config.teacher.schedule, "teacher.schedule"))
    for detector, schedule, where in trained:
        require_trainable(
            detector,
            schedule,
            config.augmentation,
            images=len(context.train_images),
            processes=context.group.size,
            where=where,
        )


def _keep(context: Context, state: TrainingState) -> None:
    """Write the one training checkpoint that the run keeps, and offer it for another attempt."""
    path = context.reporter.directory / "checkpoints" / "last.pt"
    state.save(path)
    context.reporter.checkpoint(path)


def _context(
    config: JobConfig,
    dataset: CanonicalDataset,
    inputs: Mapping[str, Any],
    device: torch.device,
    reporter: Reporter,
    group: ProcessGroup,
) -> Context:
    def _split(name: Split) -> ImageReader:
        images = dataset.in_split(name)
        if not images:
            splits = ", ".join(dataset.counts())
            raise RunError("user", "split_missing", f"the dataset has no {name} split; it has: {splits}")
        return ImageReader(Path(inputs["dataset"]), images)

    train_images, eval_images = _split("train"), _split(config.evaluation.split)
    every, evaluated = config.evaluation.every_epochs, len(eval_images) * EVALUATION_COST
    step_cost = 1.0 if config.teacher is None else 1.0 + TEACHER_COST
    total = config.schedule.epochs * len(train_images) * step_cost + evaluated * -(-config.schedule.epochs // every)
    if config.teacher is not None and config.trains_teacher:
        epochs = config.teacher.schedule.epochs
        total += epochs * len(train_images) + evaluated * -(-epochs // every)
    elif config.teacher is not None:
        total += evaluated
    return Context(
        dataset=dataset,
        train_images=train_images,
        eval_images=eval_images,
        evaluation=config.evaluation,
        augmentation=config.augmentation,
        seed=config.seed,
        device=device,
        reporter=reporter,
        history=History(reporter=reporter),
        plan=Plan(total=total),
        group=group,
        image_memory_bytes=inputs["image_memory_bytes"],
    )


def _build(
    config: StudentConfig | TeacherConfig, classes: Sequence[str], weights: str | None, *, seed: int, subject: Subject
) -> Detector:
    """Build a detector to be trained, with its initial weights: random, ImageNet's, or a checkpoint's."""
    assert isinstance(config.detector, dict)
    reseed(seed, subject, "init")
    from_checkpoint = config.initial_weights not in ("random", "imagenet")
    with Unset() if from_checkpoint else nullcontext():
        detector = detectors.build(
            config.detector,
            classes,
            pretrained_backbone=config.initial_weights == "imagenet",
            where=f"{subject}.detector",
        )
    if from_checkpoint:
        if weights is None:
            raise RunError(
                "user",
                "unknown_initial_weights",
                f"{subject}.initial_weights is {config.initial_weights!r}; use random, imagenet or a checkpoint's id",
            )
        initial = detectors.load(weights)
        _require_classes(initial, classes, subject)
        initial.select_classes(classes)
        try:
            detector.load_state_dict(initial.state_dict())
        except RuntimeError as error:
            raise RunError(
                "user", "tensors_do_not_fit", f"{subject}.initial_weights do not fit {subject}.detector: {error}"[:2000]
            ) from error
    return detector


def _require_classes(detector: Detector, classes: Sequence[str], subject: Subject) -> None:
    if unknown := [name for name in classes if name not in detector.classes]:
        raise RunError(
            "user",
            f"{subject}_classes_differ",
            f"the {subject} does not know {len(unknown)} of the dataset's {len(classes)} classes: "
            f"{', '.join(unknown[:20])}; it knows: {', '.join(detector.classes[:100])}",
        )


def _take_classes(teacher: Detector, classes: Sequence[str], class_map: Mapping[str, str]) -> None:
    """Cut a teacher down to the dataset's classes, found by the teacher's names for them, and give them the dataset's.

    One of its classes cannot stand for two: each of them would get the same score, by which the head would teach the
    student not to tell them apart, and under a softmax they would count twice against the background.
    """
    if strangers := [name for name in class_map if name not in classes]:
        raise RunError(
            "user",
            "unknown_class",
            f"teacher.class_map names classes that the dataset has not: {', '.join(strangers[:20])}; it has: "
            f"{', '.join(classes[:100])}",
        )
    wanted = [class_map.get(name, name) for name in classes]
    if twice := [name for name, count in Counter(wanted).items() if count > 1]:
        raise RunError(
            "user",
            "class_map_not_one_to_one",
            f"classes of the teacher that would stand for more than one of the dataset's: {', '.join(twice[:20])}; "
            "give each a class of its own in teacher.class_map, or merge them in the dataset",
        )
    _require_classes(teacher, wanted, "teacher")
    teacher.select_classes(wanted)
    teacher.classes = list(classes)


def _build_teacher(config: JobConfig, inputs: Mapping[str, Any], context: Context) -> Detector | None:
    """Return the teacher with exactly the dataset's classes, and untrained where it is to be trained here."""
    if config.teacher is None:
        return None
    classes, source = context.dataset.classes, config.teacher.source
    if source == "train":
        teacher = _build(config.teacher, classes, inputs["teacher_initial"], seed=config.seed, subject="teacher")
    else:
        if source == "checkpoint":
            teacher = detectors.load(inputs["teacher"])
        else:
            teacher = load_pretrained(str(config.teacher.detector), str(config.teacher.weights))
        _take_classes(teacher, classes, config.teacher.class_map)
    return teacher.to(context.device)


def _ready_teacher(
    config: TeacherConfig, teacher: Detector, context: Context, resume: TrainingState | None
) -> dict[str, Any]:
    """Train the teacher if that is asked for, freeze it in eval mode, and return its metrics."""
    metrics = resume.teacher_metrics if resume and resume.subject == "student" else None
    if config.source == "train":
        if resume and resume.teacher is not None:
            teacher.load_state_dict(resume.teacher)
        else:
            metrics = _train_teacher(config, teacher, context, resume).metrics
    teacher.eval().requires_grad_(False)
    if metrics is None:
        metrics = evaluate(context, teacher, subject="teacher", epoch=0)
    context.reporter.message("info", "teacher_ready", f"the teacher reaches {summary(metrics)}")
    return metrics


def _train_teacher(config: TeacherConfig, teacher: Detector, context: Context, resume: TrainingState | None) -> Best:
    best = Training(
        context,
        teacher,
        subject="teacher",
        teacher=None,
        method=methods.build({"method": "baseline"}, teacher, None),
        schedule=config.schedule,
        save=lambda state: _keep(context, state),
    ).run(resume)
    teacher.load_state_dict(best.model)
    return best


def _finish(
    config: JobConfig,
    context: Context,
    teacher: Detector | None,
    teacher_metrics: dict[str, Any] | None,
    student: Detector,
    best: Best,
) -> dict[str, Any]:
    """Write the artifacts and return the results."""
    reporter = context.reporter
    reporter.progress("finishing", fraction=context.plan.fraction)
    student.eval()
    _leave(reporter, student, "student-last.safetensors", kind="student", epoch=config.schedule.epochs)
    student.load_state_dict(best.model)
    measured = {name: best.metrics[name] for name in ("ap", "ap50")}
    _leave(reporter, student, "student-best.safetensors", kind="student", epoch=best.epoch, **measured)
    if teacher is not None and config.trains_teacher:
        _leave(reporter, teacher, "teacher.safetensors", kind="teacher")
    write_gallery(
        reporter,
        context.eval_images,
        {"teacher": teacher, "student": student},
        classes=context.dataset.classes,
        count=config.evaluation.gallery_images,
        device=context.device,
    )
    history = reporter.artifact("metrics.json", kind="metrics", content_type="application/json")
    history.write_text(json.dumps(context.history.state()))
    reporter.message("info", "student_ready", f"the student reaches {summary(best.metrics)} after epoch {best.epoch}")
    reporter.progress("finishing", fraction=1.0, eta_s=0.0)
    return {"teacher": teacher_metrics, "student": {**best.metrics, "epoch": best.epoch}}


def _leave(reporter: Reporter, detector: Detector, name: str, *, kind: Subject, **details: Any) -> None:
    """Save a detector as an artifact; `details` stand beside what describes any detector."""
    details |= {
        "detector": detector.config.model_dump(mode="json"),
        "classes": detector.classes,
        "coverage": full_coverage(len(detector.state_dict())),
        "parameters": sum(parameter.numel() for parameter in detector.parameters()),
    }
    path = reporter.artifact(name, kind=kind, content_type="application/octet-stream", details=details)
    detectors.save(detector, path)
