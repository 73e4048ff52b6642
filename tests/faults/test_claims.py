"""Two workers, in processes of their own, race for a thousand rows."""

import subprocess
import sys

from app.db import Database
from app.models import Job, Tenant
from tests.faults.conftest import Found
from tests.support import rows as seed

CLAIMS = 1000


def test_of_a_thousand_rows_each_is_claimed_once(database: Database, database_url: str, found: Found) -> None:
    for name in ("a", "b"):
        seed.add(database, Tenant(id=f"ten_{name}", name=name))
    dataset = seed.dataset(database, "ten_a")
    common = {"name": "", "status": "queued", "spec": {}, "labels": {}, "dataset_id": dataset.id}
    with database.write() as session:
        session.add_all(Job(id=f"job_{n}", tenant_id=f"ten_{'ab'[n % 2]}", **common) for n in range(CLAIMS))
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.faults.claimer", name, database_url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    claimed = [worker.communicate(timeout=300)[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert min(len(ids) for ids in claimed) > 0, "there was no race"
    every = [row_id for ids in claimed for row_id in ids]
    found.add(claims_raced=len(every))
    assert len(every) == len(set(every)) == CLAIMS
