"""The run directory, from the supervisor's side. See docs/architecture.md for the format.

A run opens hostile files, so nothing that it writes is believed: events and result are validated, text is cleaned of
what a database would refuse, sizes are bounded, and a path may not lead out of the directory.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from app.stack.processes import Locked, locked
from app.storage import check_key

MAX_LINE_BYTES = 1024 * 1024
MAX_JSON_BYTES = 64 * 1024 * 1024
LOG_TAIL_LINES = 20
_LOG_TAIL_BYTES = 64 * 1024
_MAX_LOG_LINE = 500
_MAX_DETAIL = 20_000

Count = Annotated[int, Field(ge=0, lt=2**31)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True)

    time: AwareDatetime | None = None


class Progress(_Event):
    """Where the run is; `fraction` is of the whole run."""

    type: Literal["progress"]
    phase: str = Field(max_length=40)
    fraction: float = Field(ge=0, le=1)
    epoch: Count | None = None
    epochs: Count | None = None
    step: Count | None = None
    steps: Count | None = None
    eta_s: Finite | None = None
    images_per_s: Finite | None = None


class Message(_Event):
    """Something to tell people.

    `origin` is where in this attempt it comes from, by which it is recorded once however often it is sent: the place of
    its line in `events.jsonl`, or what the worker calls it. None: it is sent with a write that can happen only once.
    """

    type: Literal["message"] = "message"
    origin: str | None = Field(default=None, max_length=40)
    level: Literal["info", "warn", "error"]
    code: str = Field(max_length=60)
    message: str = Field(max_length=20_000)


class Metrics(_Event):
    """What was logged at one optimiser step."""

    type: Literal["metrics"]
    subject: Literal["teacher", "student"]
    step: Count
    epoch: Finite
    values: dict[str, Finite | None]


class Evaluation(_Event):
    """COCO metrics of one detector after one epoch."""

    type: Literal["evaluation"]
    subject: Literal["teacher", "student"]
    epoch: Count
    metrics: dict[str, Any]


class CheckpointOffer(_Event):
    """A training checkpoint, by its path in the run directory, for another attempt to go on from."""

    type: Literal["checkpoint"]
    path: str = Field(max_length=200)


Event = Progress | Message | Metrics | Evaluation | CheckpointOffer
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="type")])


class Failure(BaseModel):
    """Why a run failed, as it said."""

    failure_class: Literal["user", "data", "oom", "infra"] = Field(alias="class")
    code: str = Field(max_length=60)
    # Cut rather than refused: a reason that quotes too much of a hostile file is still the reason.
    detail: Annotated[str, AfterValidator(lambda detail: detail[:_MAX_DETAIL])]


class ResultArtifact(BaseModel):
    """A file under `artifacts/`, as the run registered it."""

    name: str = Field(max_length=200)
    kind: str = Field(max_length=20)
    content_type: str = Field(max_length=100, pattern=r"^[\w.+-]+/[\w.+-]+(; ?charset=[\w-]+)?$")
    details: dict[str, Any]


class Result(BaseModel):
    """`result.json`."""

    status: Literal["succeeded", "failed", "cancelled"]
    results: dict[str, Any] = {}
    failure: Failure | None = None
    artifacts: list[ResultArtifact] = Field(default=[], max_length=1000)


class BadResult(Exception):
    """A document that the run left cannot be read; the message says why."""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _clean(value: Any) -> Any:
    """Replace what no database takes in text: NUL, and halves of surrogate pairs."""
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
        return _clean(json.loads(data, parse_constant=_refuse_constant))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _parse_event(line: bytes) -> Event:
    try:
        return _EVENT.validate_python(_load_json(line))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return _malformed(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", line)
    except ValueError as error:
        return _malformed(str(error), line)


def _malformed(reason: str, line: bytes) -> Message:
    start = _clean(line[:200].decode("utf-8", "replace"))
    return Message(
        level="warn", code="malformed_event", message=f"the run wrote an unreadable event ({reason}): {start}"
    )


def _at(place: int, event: Event) -> Event:
    """Return the event as the line that begins at byte `place`, whatever it says of itself."""
    return event.model_copy(update={"origin": str(place)}) if isinstance(event, Message) else event


class EventTail:
    """Reads `events.jsonl` while it grows, whole lines only.

    What was read is read again until `commit` says that it was recorded, so no event is lost while the database is
    away, and none is held in memory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = self._next_offset = 0
        self._in_long_line = self._next_in_long_line = False

    def read(self) -> list[Event]:
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
            return [_at(self._offset, _malformed(f"a line of more than {MAX_LINE_BYTES} bytes", data))]
        self._next_offset, self._next_in_long_line = self._offset + end, False
        events: list[Event] = []
        place = self._offset
        for number, line in enumerate(data[:end].split(b"\n")[:-1]):
            # The rest of a line whose start was refused is no event.
            if number or not self._in_long_line:
                events.append(_at(place, _parse_event(line)))
            place += len(line) + 1
        return events

    def _data(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                return file.read(MAX_LINE_BYTES)
        except FileNotFoundError:
            return b""

    def commit(self) -> None:
        """Go on behind what the last `read` returned."""
        self._offset, self._in_long_line = self._next_offset, self._next_in_long_line

    @property
    def exhausted(self) -> bool:
        """Whether every whole line has been read and committed."""
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
        """Return the run's result, or None if it left none. Raises `BadResult` if it cannot be read."""
        document = self.read_json("result.json")
        if document is None:
            return None
        try:
            result = Result.model_validate(document)
            for artifact in result.artifacts:
                self.file(f"artifacts/{artifact.name}")
        except ValueError as error:
            raise BadResult(f"result.json: {error}") from error
        return result

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

        Raises `ValueError` for a name that is not made of plain segments, or that a link leads out of the directory.
        """
        path = self.path / check_key(name)
        if path.resolve() != self.path.resolve() / name:
            raise ValueError(f"{name} is a link")
        if path.exists() and not path.is_file():
            raise ValueError(f"{name} is not a file")
        return path

    def log_tail(self) -> list[str]:
        """Return the last lines of what the run printed, at most 20 of at most 500 characters."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - _LOG_TAIL_BYTES))
                text = file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return []
        return [_clean(line[:_MAX_LOG_LINE]) for line in text.splitlines()[-LOG_TAIL_LINES:]]


def remove_dead_runs(runs: Path) -> None:
    """Remove the run directories whose supervisor is gone. Safe while others work."""
    for lock in runs.glob("*.lock"):
        try:
            with locked(lock):
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)
        except Locked:
            continue
