"""The handler for datasets, whose run imports the upload or the referenced directory."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

from app.models import Dataset
from app.storage import Stored
from defeat.engine.report import RunError
from worker.rundir import RunDirectory
from worker.tasks.assets import AssetHandler
from worker.tasks.base import Outcome, Request


class DatasetHandler(AssetHandler[Dataset]):
    """Works on dataset rows."""

    model = Dataset
    artifact = "dataset.tar"
    needed: ClassVar = ("format", "classes", "splits", "content_hash", "report")
    at_fault: ClassVar = frozenset({"data"})

    def prepare(self, row: Dataset, directory: Path, cleanup: ExitStack) -> Request:
        """Fetch the upload, or check the reference again, because its target may have changed."""
        del cleanup
        spec = {
            "max_dropped_fraction": row.max_dropped_fraction,
            "max_unpacked_bytes": self.settings.max_unpacked_bytes,
            "max_unpacked_files": self.settings.max_unpacked_files,
        }
        inputs: dict[str, str | None] = {"archive": None, "directory": None}
        if row.source["kind"] == "reference":
            path = self._referenced(row.source["uri"])
            inputs["directory" if path.is_dir() else "archive"] = str(path)
        elif row.upload_key is None:
            raise RunError("infra", "upload_missing", f"{row.id} was queued without an upload")
        else:
            inputs["archive"] = self.fetch(row.upload_key, directory / "upload", "the upload")
        return Request("import_dataset", spec, inputs)

    def _referenced(self, uri: str) -> Path:
        parts = urlsplit(uri)
        if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
            raise RunError("data", "reference_not_allowed", f"{uri} is not a file:/// reference")
        path = Path(unquote(parts.path)).resolve()
        roots = [root.resolve() for root in self.settings.dataset_roots]
        if not any(path.is_relative_to(root) for root in roots):
            known = ", ".join(map(str, roots)) or "none are configured (DEFEAT_DATASET_ROOTS)"
            raise RunError("data", "reference_not_allowed", f"{uri} is outside the allowed directories: {known}")
        if not path.is_dir() and not path.is_file():
            raise RunError("data", "reference_missing", f"{uri} is neither a directory nor a file on this worker")
        return path

    def complete(self, outcome: Outcome, directory: RunDirectory) -> Outcome:
        """Add the report, which the run writes as a file if the dataset is invalid."""
        if outcome.status == "succeeded":
            return super().complete(outcome, directory)
        report = directory.read_json("artifacts/report.json")
        return outcome if report is None else replace(outcome, results={**outcome.results, "report": report})

    def values(self, outcome: Outcome, stored: Stored | None) -> dict[str, Any]:
        """Return the dataset's description and the report; an invalid dataset has its report too."""
        del stored
        return {name: outcome.results[name] for name in self.needed if name in outcome.results}
