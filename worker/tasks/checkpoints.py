"""The handler for checkpoints, whose run checks the uploaded weights."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from app.models import Checkpoint
from app.storage import Stored
from defeat.engine.report import RunError
from worker.tasks.assets import AssetHandler
from worker.tasks.base import Outcome, Request


class CheckpointHandler(AssetHandler[Checkpoint]):
    """Works on checkpoint rows."""

    model = Checkpoint
    artifact = "checkpoint.safetensors"
    needed: ClassVar = ("detector", "classes", "coverage")
    at_fault: ClassVar = frozenset({"data", "user"})

    def prepare(self, row: Checkpoint, directory: Path, cleanup: ExitStack) -> Request:
        """Fetch the uploaded weights."""
        del cleanup
        if row.upload_key is None:
            raise RunError("infra", "upload_missing", f"{row.id} was queued without an upload")
        weights = self.fetch(row.upload_key, directory / "upload", "the upload")
        return Request("check_checkpoint", {"detector": row.detector, "classes": row.classes}, {"weights": weights})

    def values(self, outcome: Outcome, stored: Stored | None) -> dict[str, Any]:
        """Return what the file contains; an invalid checkpoint has its coverage too."""
        values = {name: outcome.results[name] for name in self.needed if name in outcome.results}
        return values if stored is None else values | {"sha256": stored.sha256}
