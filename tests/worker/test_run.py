"""How a run begins: what is imported, and what is not."""

import subprocess
import sys

LOADED = """
import gc, sys
from worker.run import _entry
_entry("distill")
assert gc.isenabled() and gc.get_freeze_count() > 100_000, gc.get_freeze_count()
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def test_a_run_imports_only_what_it_may_need() -> None:
    ended = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True, timeout=120)
    loaded = set(ended.stdout.split())
    assert {"torch", "torchvision"} <= loaded
    assert not loaded & {"timm", "huggingface_hub", "sklearn", "scipy", "pandas", "pycocotools", "celery", "sqlalchemy"}
