"""Detectors to be trained, with their initial weights: random, ImageNet's or a checkpoint's."""

from collections.abc import Sequence
from contextlib import nullcontext

from defeat.engine import detectors
from defeat.engine.config import require
from defeat.engine.detectors.base import Detector
from defeat.engine.detectors.unset import Unset
from defeat.engine.events import Subject
from defeat.engine.report import RunError
from defeat.engine.training.config import StudentConfig, TrainedTeacherConfig
from defeat.engine.training.seeds import reseed
from defeat.rules.classes import unknown_classes


def build_detector(
    config: StudentConfig | TrainedTeacherConfig,
    classes: Sequence[str],
    weights: str | None,
    *,
    seed: int,
    subject: Subject,
) -> Detector:
    """Build a detector with its initial weights, on the CPU.

    Args:
        config: its detector spec, and which initial weights.
        classes: names of the labels 1, 2, ….
        weights: the path of the checkpoint that `config.initial_weights` names, if it names one.
        seed: the job's seed.
        subject: whose detector it is.

    Raises:
        RunError: see `detectors.build` and `detectors.load`; `unknown_weights`; `…_classes_differ` if the
            checkpoint does not have all the classes; `tensors_do_not_fit`.
    """
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
                "unknown_weights",
                f"{subject}.initial_weights is {config.initial_weights!r}; use random, imagenet or a checkpoint's id",
            )
        initial = detectors.load(weights)
        require(unknown_classes((subject, "initial_weights"), classes, initial.classes))
        initial.select_classes(classes)
        try:
            detector.load_state_dict(initial.state_dict())
        except RuntimeError as error:
            raise RunError(
                "user", "tensors_do_not_fit", f"{subject}.initial_weights do not fit {subject}.detector: {error}"[:2000]
            ) from error
    return detector
