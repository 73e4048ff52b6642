"""`defeat up`: the whole service on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from defeat.cli.console import JsonFlag
from defeat.cli.server import SERVICE_AND_WORKER, replace_process


def up(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8765,
    new_key: Annotated[bool, typer.Option("--new-key", help="Create another API key and print it.")] = False,
    home: Annotated[
        Path | None, typer.Option(help="Directory of database, broker and objects; default: DEFEAT_HOME, else .defeat.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Run the service, its broker and its workers on this machine, until Ctrl-C."""
    arguments = ["--host", host, "--port", str(port), *(["--json"] * as_json), *(["--new-key"] * new_key)]
    environment = {} if home is None else {"DEFEAT_HOME": str(home)}
    replace_process("app.stack", arguments, needs=SERVICE_AND_WORKER, environment=environment)
