"""A real worker whose runs are scripted: the same arguments as `python -m worker`."""

import functools
import os

os.environ["REMAP_SIGTERM"] = "SIGQUIT"  # before the import of Celery, as in worker/__main__.py

import worker.main
from tests.support.worker_world import SCRIPTED
from worker.__main__ import main
from worker.supervisor import Supervisor

worker.main.Supervisor = functools.partial(Supervisor, command=SCRIPTED, tick_s=0.05)

if __name__ == "__main__":
    main()
