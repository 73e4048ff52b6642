"""Output of the commands: text for people, with unsafe characters escaped, or JSON."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Column, Table
from rich.text import Text

from defeat.client.errors import ApiError, ClientError
from defeat.client.transfer import OnProgress
from defeat.client.types import Failure, Queue

FAILED, USAGE, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130

# Without a terminal lines are not wrapped, so that logs keep whole lines.
_UNWRAPPED = 100_000
# Control characters could move the cursor, rename the window or type input; direction marks reorder text.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_JSON_META = "defeat.json"


def _remember_json(context: typer.Context, value: bool) -> bool:
    context.find_root().meta[_JSON_META] = value
    return value


JsonFlag = Annotated[
    bool,
    typer.Option("--json", callback=_remember_json, help="Print JSON on stdout; messages for people go to stderr."),
]


def wants_json(context: typer.Context) -> bool:
    """Return whether `--json` was given to the command that runs."""
    return bool(context.find_root().meta.get(_JSON_META, False))


def safe(text: object, style: str = "") -> Text:
    """Return untrusted text for a terminal: markup is not interpreted, control characters are escaped."""
    return Text(_UNSAFE.sub(lambda match: match.group().encode("unicode_escape").decode(), str(text)), style=style)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, markup=False, width=None if stream.isatty() else _UNWRAPPED)


class Output:
    """A command's output. `console` writes to stdout, or to stderr with `--json`; `errors` to stderr."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.console = _console(stderr=as_json)
        self.errors = _console(stderr=True)

    def json(self, value: Any) -> None:
        """Print one line of JSON; only with `--json`."""
        if self.as_json:
            # ASCII only, so that it is safe with any locale and on any terminal.
            print(json.dumps(value), flush=True)

    def line(self, *parts: object, style: str = "") -> None:
        """Print a line of text; only without `--json`."""
        if not self.as_json:
            self.console.print(Text(" ").join(part if isinstance(part, Text) else safe(part, style) for part in parts))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table; only without `--json`."""
        if self.as_json:
            return
        table = Table(*(Column(safe(column)) for column in columns), box=None, pad_edge=False, header_style="bold")
        for row in rows:
            table.add_row(*(safe("-" if value is None else value) for value in row))
        self.console.print(table)

    def failure(self, what: str, failure: Failure | None) -> None:
        """Print why a resource failed to stderr."""
        self.errors.print(safe(what, "bold red"))
        if failure is None:
            return
        self.errors.print(safe(f"{failure['class']} / {failure['code']}: {failure['detail']}"))
        if tail := failure.get("log_tail"):
            self.errors.print(safe("last lines of the log:", "dim"))
            for line in tail:
                self.errors.print(safe(f"  {line.rstrip()}", "dim"))

    @contextmanager
    def transfer(self, what: str) -> Iterator[OnProgress | None]:
        """Show the progress of an upload or download on stderr, if it is a terminal."""
        if not self.errors.is_terminal:
            yield None
            return
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
        with Progress(
            *columns, TransferSpeedColumn(), TimeRemainingColumn(), console=self.errors, transient=True
        ) as progress:
            task = progress.add_task(safe(what).plain, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)


def show_error(context: typer.Context, error: ClientError | OSError) -> None:
    """Print an error to stderr, and with `--json` also to stdout as JSON."""
    out = Output(wants_json(context))
    out.errors.print(Text("error: ", "bold red") + safe(error))
    for note in getattr(error, "__notes__", []):
        out.errors.print(safe(note))
    if isinstance(error, ApiError):
        out.json({"error": error.as_dict()})
    else:
        out.json({"error": {"code": type(error).__name__, "detail": str(error)}})


def seconds(value: float | None) -> str:
    """Format a duration: `45s`, `3m 20s`, `2h 05m`; `-` for None."""
    if value is None:
        return "-"
    whole = round(value)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def queued(queue: Queue) -> str:
    """Format a queued job's position: `2 ahead, waits for a free worker, begins in 3m 20s (2m 10s to 5m)`."""
    parts = [
        f"{queue['jobs_ahead']}{' or more' if queue['position'] is None else ''} ahead",
        f"waits for {queue['waiting_for']}",
    ]
    if queue["eta_s"] is not None:
        spread = f"{seconds(queue['eta_low_s'])} to {seconds(queue['eta_high_s'])}"
        parts.append(f"begins in {seconds(queue['eta_s'])} ({spread})")
    return ", ".join(parts)


def size(value: int | None) -> str:
    """Format a number of bytes, in powers of 1024: `31.0 MiB`; `-` for None."""
    if value is None:
        return "-"
    amount, unit = float(value), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):  # noqa: B007
        if amount < 1024:
            break
        amount /= 1024
    else:
        unit = "TiB"
    return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"


def percent(value: float | None) -> str:
    """Format a fraction (0 to 1): `12.5%`, `50%`; `-` for None."""
    return "-" if value is None else f"{100 * value:.3g}%"


def ap(value: float | None) -> str:
    """Format an average precision (0 to 1): `0.412`; `-` for None."""
    return "-" if value is None else f"{value:.3f}"
