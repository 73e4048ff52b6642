"""The teacher of a distillation: built, trained on the dataset if its source says so, and frozen."""

from collections.abc import Mapping, Sequence
from typing import Any

from defeat.engine import detectors, methods
from defeat.engine.config import require
from defeat.engine.detectors.base import Detector
from defeat.engine.detectors.pretrained import load_pretrained
from defeat.engine.evaluation.evaluate import summary
from defeat.engine.training.checkpoint import TrainingCheckpoint
from defeat.engine.training.config import (
    CheckpointTeacherConfig,
    PretrainedTeacherConfig,
    TeacherConfig,
    TrainedTeacherConfig,
)
from defeat.engine.training.context import RunContext
from defeat.engine.training.initial_weights import build_detector
from defeat.engine.training.train import Trainer
from defeat.rules.classes import class_map_findings


def build_teacher(config: TeacherConfig, inputs: Mapping[str, Any], context: RunContext) -> Detector:
    """Return the teacher on the device, with exactly the dataset's classes; not trained yet if the run trains it.

    Raises:
        RunError: its weights cannot be loaded, or do not fit the spec or the classes.
    """
    classes = context.dataset.classes
    match config:
        case TrainedTeacherConfig():
            weights = inputs["teacher_initial"]
            teacher = build_detector(config, classes, weights, seed=context.seed, subject="teacher")
        case CheckpointTeacherConfig():
            teacher = detectors.load(inputs["teacher"])
            _select_classes(teacher, classes, config.class_map)
        case PretrainedTeacherConfig():
            teacher = load_pretrained(config.detector, config.weights)
            _select_classes(teacher, classes, config.class_map)
    return teacher.to(context.device)


def prepare_teacher(
    config: TeacherConfig, teacher: Detector, context: RunContext, resume: TrainingCheckpoint | None
) -> dict[str, Any]:
    """Train the teacher if its source says so, freeze it in eval mode, and return its metrics."""
    metrics = resume.teacher_metrics if resume and resume.subject == "student" else None
    if isinstance(config, TrainedTeacherConfig):
        if resume and resume.teacher is not None:
            teacher.load_state_dict(resume.teacher)
        else:
            metrics = _train(config, teacher, context, resume)
    teacher.eval().requires_grad_(False)
    if metrics is None:
        metrics = context.evaluate(teacher, subject="teacher", epoch=0)
    context.reporter.message("info", "teacher_ready", f"the teacher reaches {summary(metrics)}")
    return metrics


def _train(
    config: TrainedTeacherConfig, teacher: Detector, context: RunContext, resume: TrainingCheckpoint | None
) -> dict[str, Any]:
    """Train the teacher, load its best weights, and return their metrics."""
    best = Trainer(
        context,
        teacher,
        subject="teacher",
        teacher=None,
        method=methods.build({"method": "baseline"}, teacher, None),
        schedule=config.schedule,
        save=context.save,
    ).run(resume)
    teacher.load_state_dict(best.model)
    return best.metrics


def _select_classes(teacher: Detector, classes: Sequence[str], class_map: Mapping[str, str]) -> None:
    """Reduce a teacher to the dataset's classes, and rename its classes to the dataset's names.

    No class of the teacher may stand for two: both would get the same score, by which the head would teach the student
    not to tell them apart, and under a softmax they would count twice against the background.

    Args:
        teacher: changed in place.
        classes: the dataset's.
        class_map: the teacher's name of a class by the dataset's, where they differ.

    Raises:
        RunError: see `defeat.rules.classes.class_map_findings`.
    """
    require(class_map_findings(classes, teacher.classes, class_map))
    wanted = [class_map.get(name, name) for name in classes]
    teacher.select_classes(wanted)
    teacher.classes = list(classes)
