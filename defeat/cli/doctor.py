"""`defeat doctor`: what the service here needs, and what is wrong with it."""

import importlib.util
import os
import sys

from defeat.cli.console import JsonFlag
from defeat.client.errors import InvalidInput


def doctor(as_json: JsonFlag = False) -> None:
    """Check database, migrations, broker, object store, disk, workers and clock, with the settings of this shell.

    Exit code 1 if anything is wrong. Run it where an API or a worker runs.
    """
    missing = [name for name in ("app", "fastapi", "celery") if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidInput(
            f"the server is not installed here ({', '.join(missing)} missing), and there is nothing to check: "
            "run it where an API or a worker runs"
        )
    # -P: the directory that somebody happens to stand in is no place to import the service from.
    command = [sys.executable, "-P", "-m", "app.ops.doctor", *(["--json"] * as_json)]
    os.execv(command[0], command)  # noqa: S606 - a list, and every part of it is ours
