"""Datasets: images with boxes."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import cast

from defeat.client.archive import write_tar
from defeat.client.errors import ClientError, InvalidInput
from defeat.client.resource import Resource, wait_until
from defeat.client.transfer import OnProgress, upload
from defeat.client.types import ASSET_TERMINAL, Dataset, Report


class Datasets(Resource):
    """`/v1/datasets`."""

    KIND = "datasets"

    def add(
        self,
        path_or_uri: str | Path,
        name: str | None = None,
        max_dropped_fraction: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> Dataset:
        """Create a dataset and upload its content. Returns before the server has imported it (see `wait`).

        `path_or_uri` is a directory (uploaded as a tar), an archive (zip, tar, tar.gz; uploaded as it is), or a `file://`
        URI of a directory or an archive that the *server* reads. `name` defaults to the last part of the path.
        `max_dropped_fraction` (0 to 1; None: the server's default) is the largest fraction of boxes and images that
        may be unusable in a valid dataset.

        Raises `InvalidInput` if the path cannot be uploaded, `ApiError`, `ConnectionFailed`. A dataset whose upload
        failed stays `awaiting_upload`; a note of the exception has its id.
        """
        text = str(path_or_uri)
        body = {} if max_dropped_fraction is None else {"max_dropped_fraction": max_dropped_fraction}
        if "://" in text:
            source = {"kind": "reference", "uri": text}
            default_name = text.rstrip("/").rpartition("/")[2]
            return cast(
                Dataset,
                self._transport.create("/v1/datasets", {"name": name or default_name, "source": source, **body}),
            )
        path = Path(path_or_uri)
        with opened(path, what="dataset") as file:
            default_name = path.resolve().name
            dataset = self._transport.create(
                "/v1/datasets", {"name": name or default_name, "source": {"kind": "upload"}, **body}
            )
            with naming(dataset["id"]):
                upload(
                    self._transport,
                    self._path(dataset["id"], "content"),
                    file,
                    is_awaited=lambda: self.get(dataset["id"])["status"] == "awaiting_upload",
                    on_progress=on_progress,
                )
        return self.get(dataset["id"])

    def get(self, dataset_id: str) -> Dataset:
        """Return one dataset."""
        return cast(Dataset, self._transport.get(self._path(dataset_id)))

    def list(self) -> Iterator[Dataset]:
        """Yield every dataset, newest first, and request pages as needed."""
        return self._pages("/v1/datasets")

    def report(self, dataset_id: str) -> Report:
        """Return the report of the dataset's check."""
        return cast(Report, self._transport.get(self._path(dataset_id, "report")))

    def delete(self, dataset_id: str) -> None:
        """Delete a dataset that no job refers to."""
        self._transport.delete(self._path(dataset_id))

    def wait(
        self,
        dataset_id: str,
        *,
        timeout_s: float | None = None,
        poll_s: float = 1.0,
        on_update: Callable[[Dataset], None] | None = None,
    ) -> Dataset:
        """Return the dataset once it is ready, invalid or failed; raises `WaitTimeout` after `timeout_s` seconds."""
        return wait_until(
            lambda: self.get(dataset_id), ASSET_TERMINAL, timeout_s=timeout_s, poll_s=poll_s, on_update=on_update
        )


@contextmanager
def opened(path: Path, *, what: str) -> Iterator[BufferedIOBase]:
    """Open the file at `path`, or a tar of the directory at `path`, for reading."""
    try:
        if path.is_dir():
            with tempfile.TemporaryFile(prefix="defeat-") as tar:
                write_tar(path, tar)
                tar.seek(0)
                yield tar
        else:
            with path.open("rb") as file:
                yield file
    except FileNotFoundError as error:
        raise InvalidInput(f"{error.filename}: no such {what}") from error


@contextmanager
def naming(resource_id: str) -> Iterator[None]:
    """Add a note with the resource's id to an exception: it exists, but has no content."""
    try:
        yield
    except (ClientError, OSError) as error:
        error.add_note(f"{resource_id} was created and awaits its content; delete it, then add it again")
        raise
