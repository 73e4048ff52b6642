"""The old spellings of commands: each warns on stderr and runs the new one. They are removed in 0.3."""

import runpy
import sys


def run(old: str, new: str, module: str, *arguments: str) -> None:
    """Warn that `python -m <old>` became `new`, then run `module` in this process, `arguments` before the given ones.

    By its name, so that no import leads from the old spelling's package to the new one's.
    """
    print(f"warning: `python -m {old}` is deprecated and will be removed in 0.3; use `{new}`", file=sys.stderr)
    sys.argv[1:1] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
