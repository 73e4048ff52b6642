"""`defeat up`: the whole service on this machine."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from defeat.cli.console import JsonFlag
from defeat.client.errors import InvalidInput

# One module of each extra that the stack needs, by name: this package imports neither the service nor the engine.
_NEEDED = ("app", "fastapi", "celery", "torch")


def up(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8765,
    new_key: Annotated[bool, typer.Option("--new-key", help="Make another API key and print it.")] = False,
    home: Annotated[
        Path | None, typer.Option(help="Directory of database, broker and objects; default: DEFEAT_HOME, else .defeat.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Start the service, its broker and its workers here, until Ctrl-C."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidInput(
            f"the server is not installed here ({', '.join(missing)} missing): "
            'pip install "defeat-service[app,worker]", or set DEFEAT_URL to a server elsewhere'
        )
    # -P: the directory that somebody happens to stand in is no place to import the service from.
    command = [sys.executable, "-P", "-m", "app.stack", "--host", host, "--port", str(port)]
    command += ["--json"] * as_json + ["--new-key"] * new_key
    environment = dict(os.environ)
    if home is not None:
        environment["DEFEAT_HOME"] = str(home)
    # The stack takes this process's place, so that signals and its end reach it and the caller directly.
    os.execve(command[0], command, environment)  # noqa: S606 - a list, and every part of it is ours
