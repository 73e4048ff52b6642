"""Importing as the run does it, without the process around it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from defeat.engine.data.importing import importer
from defeat.engine.report import Reporter, RunError


@dataclass
class Outcome:
    """How an import ended."""

    directory: Path
    results: dict[str, Any]
    failure: RunError | None

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.directory / "artifacts/report.json").read_text())

    @property
    def tar(self) -> Path:
        return self.directory / "artifacts/dataset.tar"

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "events.jsonl").read_text().splitlines()]

    def problems(self) -> dict[str, tuple[str, int]]:
        return {problem["code"]: (problem["severity"], problem["count"]) for problem in self.report["problems"]}

    def examples(self, code: str) -> list[dict[str, str]]:
        return next(problem["examples"] for problem in self.report["problems"] if problem["code"] == code)


Import = Callable[..., Outcome]


@pytest.fixture
def run_import(tmp_path: Path) -> Iterator[Import]:
    """Import an archive (a file) or a directory; keywords change the spec."""
    reporters = []

    def run(source: Path, **spec: Any) -> Outcome:
        directory = tmp_path / f"run{len(reporters)}"
        directory.mkdir()
        reporter = Reporter(directory)
        reporters.append(reporter)
        whole = {"max_dropped_fraction": 0.9, "max_unpacked_bytes": 10**9, "max_unpacked_files": 1000, **spec}
        archive = source.is_file()
        inputs = {"archive": str(source) if archive else None, "directory": None if archive else str(source)}
        try:
            return Outcome(directory, importer.run(whole, inputs, reporter), None)
        except RunError as error:
            return Outcome(directory, {}, error)

    yield run
    for reporter in reporters:
        reporter._events.close()
