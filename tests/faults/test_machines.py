"""Workers on separate machines: see `tests.faults.machines`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.conftest import Found
from tests.faults.work import Report


def _may_make_networks() -> bool:
    programs = [shutil.which(name) for name in ("ip", "unshare", "mount")]
    if os.geteuid() != 0 or not all(programs):
        return False
    return subprocess.run(["unshare", "--net", "--mount", "true"], check=False, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not _may_make_networks(), reason="network namespaces need root, iproute2 and util-linux")
def test_another_machine_goes_on_with_what_one_loses(tmp_path: Path, found: Found, long: bool) -> None:
    cut_s = 600 if long else 20
    done = subprocess.run(
        ["unshare", "--net", "--mount", sys.executable, "-m", "tests.faults.machines", str(tmp_path), str(cut_s)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-20_000:]
    found.add(machines_lost=1, network_cut_s=cut_s)
    found.judge(Report(**json.loads(done.stdout.splitlines()[-1])))
