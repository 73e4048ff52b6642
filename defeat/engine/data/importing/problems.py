"""What was found wrong with a dataset: counted, named, and with a few examples each."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from defeat.engine.report import RunError, shown

Severity = Literal["note", "dropped", "fatal"]

MAX_EXAMPLES = 20

SUMMARIES: dict[str, str] = {
    # The archive.
    "not_an_archive": "the upload is not an archive of a known kind",
    "broken_archive": "the archive is truncated or corrupt",
    "encrypted_archive": "the archive is encrypted",
    "archive_too_large": "the archive unpacks to more than is allowed",
    "unsafe_path": "a member's path is absolute, leaves the archive, or cannot be a file's name",
    "link_in_archive": "the archive holds a link, a device or another special file",
    "duplicate_path": "two members of the archive have the same path",
    "unsupported_compression": "the archive is compressed in a way that is not read here",
    # The layout.
    "missing_directory": "the directory that the dataset refers to is not there",
    "unknown_layout": "no single dataset of a known layout was found",
    "source_changed": "a file changed while it was imported",
    # Classes.
    "no_classes": "the annotations name no class",
    "inconsistent_classes": "the annotation files disagree about the classes",
    "too_many_classes": "there are more classes than are allowed",
    # Annotations.
    "unsafe_xml": "an XML file declares a document type or entities",
    "unreadable_annotation": "an annotation does not parse or lacks a part",
    "missing_annotation": "an image in a split has no annotation file",
    "duplicate_image_id": "an image is listed again under the same id",
    "duplicate_annotation_id": "an annotation has the id of an earlier one",
    "unknown_image_id": "an annotation belongs to an image that is not listed",
    "unknown_class_id": "an annotation has a category that is not listed",
    # Boxes.
    "bad_box": "a box has a coordinate that is not a finite number",
    "empty_box": "a box has no area",
    "box_outside": "a box lies outside its image",
    "box_clipped": "a box reached over its image's edge and was clipped to it",
    # Masks.
    "bad_mask": "an object's outline cannot be used: its box is kept without a mask",
    "empty_mask": "an object's outline holds no pixel of its image: its box is kept without a mask",
    # Images.
    "missing_image": "an annotated image is not there",
    "broken_image": "an image does not decode",
    "image_too_large": "an image is larger than is decoded",
    "image_size_mismatch": "the annotation states another size than the image has; the image's is used",
    "image_without_boxes": "an image has no boxes: it counts as background",
    "duplicate_image": "the same image is in one split more than once",
    "image_in_two_splits": "the same image is in more than one split: evaluation on it measures nothing",
    # The whole.
    "too_many_bad_annotations": "more would be dropped than max_dropped_fraction allows",
    "no_training_split": "no image is left to train on",
    "no_training_boxes": "the training images have no boxes",
    "no_evaluation_split": "there is neither a val nor a test split: nothing can be evaluated",
}
"""Every problem code and what it means, in one line for people."""


@dataclass
class Problem:
    """All findings of one code and severity."""

    code: str
    severity: Severity
    count: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the report's entry."""
        return {
            "code": self.code,
            "severity": self.severity,
            "count": self.count,
            "summary": SUMMARIES[self.code],
            "examples": self.examples,
        }


class Problems:
    """Collects findings and keeps count of what was listed and what is dropped.

    The dropped fraction is

        (dropped boxes + boxes of dropped images + dropped images) / (listed boxes + listed images)

    where everything that an annotation file or a split list names counts as listed, readable or not.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[str, Severity], Problem] = {}
        self._listed = 0
        self._dropped = 0

    def __iter__(self) -> Iterator[Problem]:
        """Go through the problems, fatal ones first, then dropped ones, then notes; each by first appearance."""
        order = ("fatal", "dropped", "note")
        return iter(sorted(self._found.values(), key=lambda problem: order.index(problem.severity)))

    def listed(self, *, images: int = 0, boxes: int = 0) -> None:
        """Count images and boxes that the annotations list."""
        self._listed += images + boxes

    def note(self, code: str, file: object, detail: str) -> None:
        """Record something worth knowing that costs nothing."""
        self._add(code, "note", file, detail)

    def drop(self, code: str, file: object, detail: str, *, images: int = 0, boxes: int = 0) -> None:
        """Record one finding for which `images` listed images and `boxes` listed boxes are left out."""
        self._dropped += images + boxes
        self._add(code, "dropped", file, detail)

    def fatal(self, code: str, file: object, detail: str) -> None:
        """Record a finding that makes the dataset invalid."""
        self._add(code, "fatal", file, detail)

    def _add(self, code: str, severity: Severity, file: object, detail: str) -> None:
        problem = self._found.setdefault((code, severity), Problem(code, severity))
        problem.count += 1
        if len(problem.examples) < MAX_EXAMPLES:
            problem.examples.append({"file": shown(str(file)), "detail": detail})

    def has(self, code: str, severity: Severity) -> bool:
        """Say whether `code` was recorded with this severity."""
        return (code, severity) in self._found

    @property
    def dropped_fraction(self) -> float:
        """What is left out, as a fraction of what is listed (0 to 1); see the class for the definition."""
        return self._dropped / self._listed if self._listed else 0.0

    def raise_fatal(self) -> None:
        """Raise `RunError("data", <first fatal code>, …)` naming every fatal problem, if there is one."""
        fatal = [problem for problem in self if problem.severity == "fatal"]
        if not fatal:
            return
        details = []
        for problem in fatal:
            example = problem.examples[0]
            more = f" (and {problem.count - 1} more)" if problem.count > 1 else ""
            where = f"{example['file']}: " if example["file"] else ""
            details.append(f"{where}{example['detail']}{more}")
        raise RunError("data", fatal[0].code, "; ".join(details))
