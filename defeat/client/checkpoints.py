"""Checkpoints: weights of detectors."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from defeat.client.datasets import naming, opened
from defeat.client.errors import InvalidInput
from defeat.client.resource import Resource, wait_until
from defeat.client.transfer import OnProgress, download, upload
from defeat.client.types import ASSET_TERMINAL, Checkpoint


class Checkpoints(Resource):
    """`/v1/checkpoints`."""

    KIND = "checkpoints"

    def add(
        self,
        path: str | Path,
        name: str,
        detector: dict[str, Any] | None = None,
        classes: Sequence[str] | None = None,
        on_progress: OnProgress | None = None,
    ) -> Checkpoint:
        """Create a checkpoint and upload its weights (safetensors, or a torch file of tensors).

        `detector` is the detector spec and `classes` the class names in the order of the weights' labels; None: the
        file's header has them. Returns before the server has checked it (see `wait`). Raises like `Datasets.add`.
        """
        path = Path(path)
        if path.is_dir():
            raise InvalidInput(f"{path} is a directory; pass the weights file")
        body = {"name": name, "detector": detector, "classes": None if classes is None else list(classes)}
        with opened(path, what="weights file") as file:
            checkpoint = self._transport.create("/v1/checkpoints", body)
            with naming(checkpoint["id"]):
                upload(
                    self._transport,
                    self._path(checkpoint["id"], "content"),
                    file,
                    is_awaited=lambda: self.get(checkpoint["id"])["status"] == "awaiting_upload",
                    on_progress=on_progress,
                )
        return self.get(checkpoint["id"])

    def get(self, checkpoint_id: str) -> Checkpoint:
        """Return one checkpoint."""
        return cast(Checkpoint, self._transport.get(self._path(checkpoint_id)))

    def list(self) -> Iterator[Checkpoint]:
        """Yield every checkpoint, newest first, and request pages as needed."""
        return self._pages("/v1/checkpoints")

    def download(self, checkpoint_id: str, path: str | Path, on_progress: OnProgress | None = None) -> Path:
        """Write the weights to the file `path` and return it. Resumes an interrupted download.

        Raises `InvalidInput` unless the checkpoint is ready, and like `defeat.client.transfer.download`.
        """
        checkpoint = self.get(checkpoint_id)
        if checkpoint["sha256"] is None or checkpoint["size_bytes"] is None:
            raise InvalidInput(f"{checkpoint_id} is {checkpoint['status']}: it can be downloaded once it is ready")
        return download(
            self._transport,
            self._path(checkpoint_id, "content"),
            Path(path),
            sha256=checkpoint["sha256"],
            size_bytes=checkpoint["size_bytes"],
            on_progress=on_progress,
        )

    def delete(self, checkpoint_id: str) -> None:
        """Delete a checkpoint."""
        self._transport.delete(self._path(checkpoint_id))

    def wait(
        self,
        checkpoint_id: str,
        *,
        timeout_s: float | None = None,
        poll_s: float = 1.0,
        on_update: Callable[[Checkpoint], None] | None = None,
    ) -> Checkpoint:
        """Return the checkpoint once it is ready, invalid or failed; raises `WaitTimeout` after `timeout_s` seconds."""
        return wait_until(
            lambda: self.get(checkpoint_id), ASSET_TERMINAL, timeout_s=timeout_s, poll_s=poll_s, on_update=on_update
        )
