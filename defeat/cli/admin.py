"""`defeat admin`: keys, workers, quotas, retention and migrations, for the operator."""

import typer

from defeat.cli.server import replace_process


def admin(context: typer.Context) -> None:
    """Operate the service on this machine: keys, workers, usage, retention, migrate; --help after each of them.

    Uses this shell's settings (DATABASE_URL, STORAGE_URL, DEFEAT_*). Run it where an API or a worker runs.
    """
    replace_process("app.ops.admin", context.args)
