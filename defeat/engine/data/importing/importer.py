"""The `import_dataset` run: an archive or a directory in, a checked canonical dataset and a report out."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from defeat.engine.data import archive, canonical
from defeat.engine.data.importing import detect_format
from defeat.engine.data.importing.base import Source
from defeat.engine.data.importing.check import Checked, check, check_classes, check_whole
from defeat.engine.data.importing.problems import Problems
from defeat.engine.report import Reporter, RunError

_PROGRESS_EVERY_S = 0.5


class _Import:
    """One import, and how far it came: a failed one is reported as far as it got."""

    def __init__(self, spec: Mapping[str, Any], reporter: Reporter) -> None:
        self.max_dropped_fraction: float = spec["max_dropped_fraction"]
        self.problems = Problems()
        self._spec = spec
        self._reporter = reporter
        self._format: str | None = None
        self._dataset = canonical.CanonicalDataset((), ())
        self._last_progress = float("-inf")

    def carry_out(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Import, and return the run's results without the report."""
        checked = self._check(self._bring(inputs))
        self._warn()
        path = self._pack(checked)
        return {
            "format": self._format,
            "classes": list(checked.dataset.classes),
            "splits": checked.dataset.counts(),
            "content_hash": canonical.content_hash(checked.dataset),
            "size_bytes": path.stat().st_size,
        }

    def _bring(self, inputs: Mapping[str, Any]) -> Path:
        """Return the directory that holds the dataset's files."""
        if inputs.get("directory") is not None:
            directory = Path(inputs["directory"])
            if not directory.is_dir():
                raise RunError("data", "missing_directory", f"{directory} is not a directory that the worker can see")
            return directory
        unpacked = self._reporter.directory / "unpacked"
        archive.unpack(
            Path(inputs["archive"]),
            unpacked,
            max_bytes=self._spec["max_unpacked_bytes"],
            max_files=self._spec["max_unpacked_files"],
            tick=lambda done: self._tick("importing", 0.3 * done),
        )
        return unpacked

    def _check(self, root: Path) -> Checked:
        source = Source(root)
        format_, directory = detect_format(source.root)
        self._format = format_.name
        parsed = format_.parse(source, directory, self.problems, lambda done: self._tick("importing", 0.3 + 0.1 * done))
        check_classes(parsed, self.problems)
        self.problems.raise_fatal()
        checked = check(parsed, self.problems, lambda done: self._tick("checking", 0.4 + 0.4 * done))
        self._dataset = checked.dataset
        check_whole(checked.dataset, self.problems, self.max_dropped_fraction)
        return checked

    def _warn(self) -> None:
        for problem in self.problems:
            if problem.severity == "dropped":
                entry = problem.as_json()
                example = problem.examples[0]
                text = f"{problem.count} dropped: {entry['summary']} (first: {example['file']}: {example['detail']})"
                self._reporter.message("warn", problem.code, text)

    def _pack(self, checked: Checked) -> Path:
        # Beside the artifacts until it is whole: a cancelled run must not offer half a dataset.
        part = self._reporter.directory / "dataset.tar.part"
        canonical.pack(
            part, checked.dataset, checked.sources, tick=lambda done: self._tick("checking", 0.8 + 0.2 * done)
        )
        return part.replace(self._reporter.artifact("dataset.tar", kind="dataset", content_type="application/x-tar"))

    def _tick(self, phase: str, fraction: float) -> None:
        self._reporter.check_cancelled()
        now = time.monotonic()
        if now - self._last_progress >= _PROGRESS_EVERY_S or fraction in (0.0, 1.0):
            self._last_progress = now
            self._reporter.progress(phase, fraction=fraction)

    def report(self) -> dict[str, Any]:
        """Return the report, as docs/api.md has it; counts are of what is kept."""
        images = self._dataset.images
        splits = self._dataset.counts()
        return {
            "format": self._format,
            "images": len(images),
            "boxes": sum(split["boxes"] for split in splits.values()),
            "masks": self._dataset.masks,
            "classes": _class_counts(self._dataset),
            "splits": splits,
            "problems": [problem.as_json() for problem in self.problems],
            "dropped_fraction": self.problems.dropped_fraction,
            "max_dropped_fraction": self.max_dropped_fraction,
        }


def _class_counts(dataset: canonical.CanonicalDataset) -> list[dict[str, Any]]:
    """Return, for each class and split, the images that show the class and its boxes."""
    counts: list[dict[str, dict[str, int]]] = [
        {split: {"images": 0, "boxes": 0} for split in dataset.counts()} for _ in dataset.classes
    ]
    for image in dataset.images:
        for box in image.boxes:
            counts[box.class_index][image.split]["boxes"] += 1
        for class_index in {box.class_index for box in image.boxes}:
            counts[class_index][image.split]["images"] += 1
    return [{"name": name, "splits": splits} for name, splits in zip(dataset.classes, counts, strict=True)]


def run(spec: Mapping[str, Any], inputs: Mapping[str, Any], reporter: Reporter) -> dict[str, Any]:
    """Import a dataset.

    `spec` has `max_dropped_fraction` (0 to 1), `max_unpacked_bytes` and `max_unpacked_files`; `inputs` has `archive` (a
    file of any kind that `archive.unpack` reads) or `directory` (read in place), the other null.

    Artifacts: `dataset.tar`, and `report.json` whether or not the dataset is valid.

    Raises:
        RunError: class `data` if the dataset is invalid; `problems.SUMMARIES` has the codes.
        Cancelled: the run was asked to end.
        OSError: the disk is full.
    """
    work = _Import(spec, reporter)
    try:
        results = work.carry_out(inputs)
    except RunError as error:
        if error.failure_class == "data":
            if not work.problems.has(error.code, "fatal"):
                work.problems.fatal(error.code, "", error.detail)
            _write_report(work.report(), reporter)
        raise
    report = work.report()
    _write_report(report, reporter)
    return {**results, "report": report}


def _write_report(report: dict[str, Any], reporter: Reporter) -> None:
    path = reporter.artifact("report.json", kind="report", content_type="application/json")
    path.write_text(json.dumps(report, allow_nan=False))
