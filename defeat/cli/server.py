"""Commands that run the server's own code, where it is installed."""

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence

from defeat.client.errors import InvalidInput

# One module of each extra, by name: this package imports neither the service nor the engine.
SERVICE = ("app", "fastapi", "celery")
SERVICE_AND_WORKER = (*SERVICE, "torch")


def replace_process(
    module: str,
    arguments: Sequence[str],
    *,
    needs: Sequence[str] = SERVICE,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run `python -m <module> <arguments>` in this process's place, so that signals and the exit code pass directly.

    `environment` is added to this process's own. Raises `InvalidInput` if a package of `needs` is not installed.
    """
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        extras = "app,worker" if "torch" in needs else "app"
        raise InvalidInput(
            f"the server is not installed here ({', '.join(missing)} missing): run this command where an API or a "
            f"worker runs, or install the server from a checkout of its source: pip install --editable '.[{extras}]'"
        )
    # -P: the current directory is no place to import the service from.
    command = [sys.executable, "-P", "-m", module, *arguments]
    os.execve(command[0], command, {**os.environ, **(environment or {})})  # noqa: S606 - a list, no shell
