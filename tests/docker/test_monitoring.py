"""Prometheus' rules and Grafana's dashboard: they parse, and ask only for metrics that are served."""

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

import app.metrics
import worker.metrics
from app.db import Database
from app.metrics import ServiceCollector
from app.settings import Settings
from tests.conftest import REPOSITORY
from worker.metrics import GpuCollector, _gpu_families

MONITORING = REPOSITORY / "docker" / "monitoring"
ALERTS: list[dict[str, Any]] = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "grafana" / "dashboards" / "defeat.json").read_text())
EXPRESSIONS = [rule["expr"] for rule in ALERTS] + [
    target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]
]


@pytest.fixture
def served(sqlite_url: str, tmp_path: Any) -> set[str]:
    """The name of every sample that an API or a worker may serve."""
    families = list(_gpu_families("")) + list(GpuCollector("/nonexistent").collect())
    database = Database(sqlite_url)
    families += ServiceCollector(database, Settings(home=tmp_path)).collect()
    database.dispose()
    names = {family.name for family in families} | {"up"}
    for module in (app.metrics, worker.metrics):
        for metric in vars(module).values():
            if isinstance(metric, MetricWrapperBase):
                suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}.get(metric._type, ("",))
                names |= {metric._name + suffix for suffix in suffixes}
    return names


def selectors(node: Any) -> Iterator[str]:
    """Yield the metric names in a parsed expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name
    for name in ("expr", "lhs", "rhs", "vector_selector"):
        child = getattr(node, name, None)
        if child is not None:
            yield from selectors(child)
    for child in getattr(node, "args", None) or ():
        yield from selectors(child)


def test_every_expression_asks_for_what_is_served(served: set[str]) -> None:
    for expression in EXPRESSIONS:
        asked = set(selectors(promql_parser.parse(expression)))
        assert asked, expression
        assert asked <= served, expression


def test_every_metric_is_on_the_dashboard_or_in_a_rule(served: set[str]) -> None:
    asked = {name for expression in EXPRESSIONS for name in selectors(promql_parser.parse(expression))}
    unseen = {name for name in served - asked if not name.endswith(("_sum", "_count", "_bucket"))}
    assert unseen == set()


def test_every_alarm_is_explained() -> None:
    text = (REPOSITORY / "docs" / "operations.md").read_text()
    explained = set(re.findall(r"^\| `(Defeat\w+)` \|", text, re.MULTILINE))
    assert explained == {rule["alert"] for rule in ALERTS}
    assert all(rule["labels"]["severity"] in {"warning", "critical"} for rule in ALERTS)


def test_the_dashboard_has_no_panel_twice() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert len({panel["title"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
