"""The `defeat` command.

Exit codes: 0 success (with --wait: of the job); 1 the job or the request failed, or the job was cancelled; 2 invalid
arguments or spec; 3 the server does not respond; 130 interrupted.
"""

from typing import Any

import typer
from typer.core import TyperGroup

from defeat.cli import admin, catalog, checkpoints, datasets, doctor, jobs, up, workers
from defeat.cli.console import FAILED, UNREACHABLE, USAGE, show_error
from defeat.client.errors import ApiError, ClientError, ConnectionFailed, InvalidInput


class _Commands(TyperGroup):
    """Converts the client's exceptions to messages and exit codes, for every command."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # typer exits quietly when the reader of a pipe is gone
        except (ClientError, OSError) as error:
            show_error(ctx, error)
            raise typer.Exit(_exit_code(error)) from error


def _exit_code(error: Exception) -> int:
    if isinstance(error, ConnectionFailed):
        return UNREACHABLE
    if isinstance(error, InvalidInput) or (isinstance(error, ApiError) and error.status == 422):
        return USAGE
    return FAILED


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distillation as a service for object detectors. "
    "Set the server's address in DEFEAT_URL and the API key in DEFEAT_API_KEY.",
)
app.command(name="up")(up.up)
app.command(name="doctor")(doctor.doctor)
app.command(
    name="admin",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(admin.admin)
app.command(name="catalog")(catalog.catalog)
app.command(name="workers")(workers.workers)
app.add_typer(datasets.app, name="datasets")
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(jobs.app, name="jobs")


def main() -> None:
    """Run the command."""
    app(prog_name="defeat")
