"""The run directory, as the supervisor reads it. docs/architecture.md has the format.

A run opens hostile files, so the supervisor trusts nothing that a run writes: it validates events and result, replaces
characters that a database rejects, bounds sizes, and refuses paths that lead out of the directory.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import Field, TypeAdapter, ValidationError

from app.stack.processes import Locked, locked
from app.storage import check_key
from defeat.engine.events import CheckpointOffer, Evaluation, Event, Failure, Message, Metrics, Progress, Result

MAX_LINE_BYTES = 1024 * 1024
MAX_JSON_BYTES = 64 * 1024 * 1024
LOG_TAIL_LINES = 20
_LOG_TAIL_BYTES = 64 * 1024
_MAX_LOG_LINE = 500
_MAX_DETAIL = 20_000

_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="type")])
_RESULT = TypeAdapter(Result)


@dataclass(frozen=True, kw_only=True)
class RecordedMessage(Message):
    """A message as the worker records it: from the run, or from the worker itself.

    Attributes:
        origin: where in this attempt it comes from: the byte offset of its line in `events.jsonl`, or a name that the
            worker gives it. A message that is sent twice is recorded once, by its origin. None: it belongs to a write
            that can happen only once.
    """

    origin: str | None = None


RecordedEvent = Progress | RecordedMessage | Metrics | Evaluation | CheckpointOffer


class BadResult(Exception):
    """A document that the run wrote cannot be read; the message names the reason."""


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _clean(value: Any) -> Any:
    """Replace the characters that databases reject in text: NUL and unpaired surrogates."""
    if isinstance(value, str):
        return value.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return value


def _load_json(data: bytes) -> Any:
    """Return the JSON document, cleaned. Raises `ValueError`."""
    try:
        return _clean(json.loads(data, parse_constant=_reject_constant))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _parse_event(line: bytes, offset: int) -> RecordedEvent:
    """Return the event in the line that begins at byte `offset`, or a warning for one that is malformed."""
    try:
        event = _EVENT.validate_python(_load_json(line))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return _malformed(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", line, offset)
    except ValueError as error:
        return _malformed(str(error), line, offset)
    return RecordedMessage(**vars(event), origin=str(offset)) if isinstance(event, Message) else event


def _malformed(reason: str, line: bytes, offset: int) -> RecordedMessage:
    start = _clean(line[:200].decode("utf-8", "replace"))
    return RecordedMessage(
        level="warn",
        code="malformed_event",
        message=f"the run wrote an unreadable event ({reason}): {start}",
        origin=str(offset),
    )


class EventTail:
    """Reads `events.jsonl` while it grows, in whole lines.

    `read` returns the same events until `commit` confirms that they were recorded, so no event is lost while the
    database does not answer, and none is held in memory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = self._next_offset = 0
        self._in_long_line = self._next_in_long_line = False

    def read(self) -> list[RecordedEvent]:
        """Return the events of the next whole lines, at most about 1 MiB of them; none if there are none yet."""
        data = self._data()
        end = data.rfind(b"\n") + 1
        self._next_in_long_line = self._in_long_line
        if end == 0 and len(data) < MAX_LINE_BYTES:
            self._next_offset = self._offset
            return []
        if end == 0:
            self._next_offset, self._next_in_long_line = self._offset + len(data), True
            if self._in_long_line:
                return []
            return [_malformed(f"a line of more than {MAX_LINE_BYTES} bytes", data, self._offset)]
        self._next_offset, self._next_in_long_line = self._offset + end, False
        events: list[RecordedEvent] = []
        offset = self._offset
        for number, line in enumerate(data[:end].split(b"\n")[:-1]):
            # The first line may be the rest of a line that was rejected as too long.
            if number or not self._in_long_line:
                events.append(_parse_event(line, offset))
            offset += len(line) + 1
        return events

    def _data(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                return file.read(MAX_LINE_BYTES)
        except FileNotFoundError:
            return b""

    def commit(self) -> None:
        """Continue after what the last `read` returned."""
        self._offset, self._in_long_line = self._next_offset, self._next_in_long_line

    @property
    def exhausted(self) -> bool:
        """Whether every whole line was read and committed."""
        data = self._data()
        return b"\n" not in data and len(data) < MAX_LINE_BYTES


class RunDirectory:
    """The directory of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = path / "log.txt"
        self.events = EventTail(path / "events.jsonl")

    def write_request(self, request: Mapping[str, Any]) -> None:
        """Write `run.json`."""
        (self.path / "run.json").write_text(json.dumps(request), encoding="utf-8")

    def result(self) -> Result | None:
        """Return the run's result, or None if it wrote none. Raises `BadResult` if it cannot be read."""
        document = self.read_json("result.json")
        if document is None:
            return None
        try:
            result = _RESULT.validate_python(document)
            for artifact in result.artifacts:
                self.file(f"artifacts/{artifact.name}")
        except ValueError as error:
            raise BadResult(f"result.json: {error}") from error
        return result if result.failure is None else replace(result, failure=_cut(result.failure))

    def read_json(self, name: str) -> Any:
        """Return the JSON document in the file `name`, or None if there is no such file. Raises `BadResult`."""
        try:
            path = self.file(name)
            size = path.stat().st_size
            if size > MAX_JSON_BYTES:
                raise BadResult(f"{name} has {size} bytes, more than {MAX_JSON_BYTES}")
            return _load_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise BadResult(f"{name}: {error}") from error

    def file(self, name: str) -> Path:
        """Return the path of the regular file `name` in the directory.

        Raises `ValueError` for a name that is not made of plain segments, and for a link.
        """
        path = self.path / check_key(name)
        if path.resolve() != self.path.resolve() / name:
            raise ValueError(f"{name} is a link")
        if path.exists() and not path.is_file():
            raise ValueError(f"{name} is not a file")
        return path

    def log_tail(self) -> list[str]:
        """Return the last lines of the run's output, at most 20, each cut to 500 characters."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - _LOG_TAIL_BYTES))
                text = file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return []
        return [_clean(line[:_MAX_LOG_LINE]) for line in text.splitlines()[-LOG_TAIL_LINES:]]


def _cut(failure: Failure) -> Failure:
    """Shorten a detail that is too long: one that quotes much of a hostile file still names the reason."""
    return {"class": failure["class"], "code": failure["code"], "detail": failure["detail"][:_MAX_DETAIL]}


def remove_dead_runs(runs: Path) -> None:
    """Remove the run directories whose supervisor has ended. Safe while other workers use theirs."""
    for lock in runs.glob("*.lock"):
        try:
            with locked(lock):
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)
        except Locked:
            continue
