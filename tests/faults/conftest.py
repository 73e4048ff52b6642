"""One cluster for all tests after which it still works; prints the findings as one JSON object at the end."""

import json
import random
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.faults.cluster import Cluster, cluster
from tests.faults.work import Report, Work
from tests.support.postgres import NoPostgres

_FOUND = pytest.StashKey["Found"]()


@dataclass
class Found:
    """The findings of all tests."""

    values: dict[str, Any] = field(default_factory=dict)

    def add(self, **numbers: Any) -> None:
        """Add numbers to those of the same name; set other values."""
        for name, value in numbers.items():
            counts = isinstance(value, int | float) and not isinstance(value, bool)
            self.values[name] = self.values.get(name, 0) + value if counts else value

    def judge(self, report: Report) -> None:
        """Add a report, and fail if a job's results differ from those without faults."""
        self.add(
            jobs=report.jobs,
            lost=report.lost,
            doubled=report.doubled,
            resumed_identical=report.resumed_identical,
            attempts=report.attempts,
        )
        assert report.wrong == []


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the tests run in the long form."""
    return bool(request.config.getoption("--faults-long"))


@pytest.fixture(scope="session")
def found(request: pytest.FixtureRequest) -> Found:
    """Where a test adds its findings."""
    return request.config.stash.setdefault(_FOUND, Found())


@pytest.fixture(scope="session")
def dice(request: pytest.FixtureRequest, found: Found) -> random.Random:
    """Random numbers, by a seed that is printed; `--faults-seed` repeats it."""
    seed = request.config.getoption("--faults-seed") or secrets.randbelow(2**31)
    print(f"\nfaults: --faults-seed {seed}")
    found.values["seed"] = seed
    return random.Random(seed)


@pytest.fixture(scope="session")
def _started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Work]]:
    folder = tmp_path_factory.mktemp("cluster")
    try:
        with cluster(folder) as made:
            try:
                client = made.start()
                for name in ("one", "two"):
                    made.worker(name)
                yield made, Work(made, client, folder)
            except BaseException:
                print(made.logs())
                raise
    except NoPostgres as error:
        pytest.skip(str(error))


@pytest.fixture
def service(_started: tuple[Cluster, Work]) -> Iterator[Cluster]:
    """The cluster, with two workers that are idle."""
    made = _started[0]
    yield made
    made.gate.unlink(missing_ok=True)
    assert made.runs() == [], "a test left a run behind"


@pytest.fixture
def work(_started: tuple[Cluster, Work]) -> Work:
    """Jobs for the cluster."""
    return _started[1]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add the logs to the report of a test that failed."""
    outcome: Any = yield
    report = outcome.get_result()
    made = getattr(item, "funcargs", {}).get("service")
    if report.when == "call" and report.failed and made is not None:
        report.sections.append(("the cluster's logs", made.logs()))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Record whether the tests passed."""
    if _FOUND in session.config.stash:
        session.config.stash[_FOUND].values["faults"] = "ok" if exitstatus == 0 else "failed"


def pytest_unconfigure(config: pytest.Config) -> None:
    """Print the findings on the last line."""
    if config.getoption("--faults-long", default=False) and _FOUND in config.stash:
        values = config.stash[_FOUND].values
        print(json.dumps({"faults": values.pop("faults", "failed"), **values}))
