"""`defeat doctor`: checks what the service on this machine needs."""

from defeat.cli.console import JsonFlag
from defeat.cli.server import replace_process


def doctor(as_json: JsonFlag = False) -> None:
    """Check database, migrations, broker, object store, disk, workers and clock, with this shell's settings.

    Exits with 1 if a check fails. Run it where an API or a worker runs.
    """
    replace_process("app.ops.doctor", ["--json"] * as_json)
