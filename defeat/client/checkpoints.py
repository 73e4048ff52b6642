"""Checkpoints: detectors' weights."""

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
        """Create a checkpoint and send its weights (safetensors, or a torch file of tensors).

        `detector` is a detector spec and `classes` the class names in the order of the weights; None: the file says.
        Returns it as the check begins (see `wait`). Raises what `Datasets.add` raises.
        """
        path = Path(path)
        if path.is_dir():
            raise InvalidInput(f"{path} is a directory: give the weights file")
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
        """Yield every checkpoint, newest first, as the pages are asked for."""
        return self._pages("/v1/checkpoints")

    def download(self, checkpoint_id: str, path: str | Path, on_progress: OnProgress | None = None) -> Path:
        """Write the weights to the file `path` and return it; a cut download goes on where it was.

        Raises `InvalidInput` unless the checkpoint is ready, and what `defeat.client.transfer.download` raises.
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
