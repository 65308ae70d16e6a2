# SPDX-License-Identifier: Apache-2.0
"""Names of metrics, and that dashboards, alerts and pages ask for nothing else; checked by promtool, too."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adaptive_k_moe.observability.definitions import METRICS, Metric


def series_names(metric: Metric) -> list[str]:
    """Names of the series that Prometheus stores for a metric."""
    if metric.kind == "histogram":
        return [f"{metric.name}{suffix}" for suffix in ("_bucket", "_sum", "_count")]
    return [metric.name]


SERIES = {name for metric in METRICS.values() for name in series_names(metric)}


def test_the_seeds_names_exist() -> None:
    for name in ("adaptive_k_latency_seconds", "adaptive_k_avg_k", "adaptive_k_compute_saved_ratio"):
        assert name in METRICS
    assert METRICS["adaptive_k_latency_seconds"].kind == "histogram"


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_names_follow_prometheus_conventions(metric: Any) -> None:
    assert re.fullmatch(r"adaptive_k_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.help.endswith(".")
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert not {"le", "model", "quantile"} & set(metric.labels)


def _queries(dashboard: Any) -> Iterator[str]:
    if isinstance(dashboard, dict):
        for key, value in dashboard.items():
            if key in ("expr", "query", "definition") and isinstance(value, str):
                yield value
            else:
                yield from _queries(value)
    elif isinstance(dashboard, list):
        for item in dashboard:
            yield from _queries(item)


def _asked_for(query: str) -> set[str]:
    return set(re.findall(r"(?<![\w:])adaptive_k_\w+", query))


def test_the_dashboard_asks_for_metrics_that_exist(repository: Path) -> None:
    dashboard = json.loads((repository / "observability" / "grafana" / "adaptive_k.json").read_text())
    queries = list(_queries(dashboard))
    assert len(queries) > 30
    asked = set().union(*map(_asked_for, queries))
    assert asked <= SERIES
    # Every metric is on it.
    assert {metric.name for metric in METRICS.values() if not asked & set(series_names(metric))} == set()
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(identifiers) == len(set(identifiers))


def test_labels_in_the_dashboards_queries_exist(repository: Path) -> None:
    dashboard = json.loads((repository / "observability" / "grafana" / "adaptive_k.json").read_text())
    for query in _queries(dashboard):
        for name, selector in re.findall(r"(adaptive_k_\w+)\{([^}]*)\}", query):
            metric = next(metric for metric in METRICS.values() if name in series_names(metric))
            labels = set(re.findall(r"(\w+)=", selector))
            assert labels <= {"model", "instance", *metric.labels}, query


def test_the_rules_ask_for_metrics_that_exist(repository: Path) -> None:
    rules = (repository / "observability" / "prometheus" / "rules.yml").read_text()
    expressions = re.sub(r"#.*", "", rules)
    assert _asked_for(expressions) - {"adaptive_k_records", "adaptive_k_alerts"} <= SERIES


def test_promtool_takes_the_rules_and_their_unit_tests(repository: Path, promtool: str) -> None:
    rules = repository / "observability" / "prometheus" / "rules.yml"
    subprocess.run([promtool, "check", "rules", "--lint=all", "--lint-fatal", rules], check=True, capture_output=True)
    run = subprocess.run(
        [promtool, "test", "rules", "rules_test.yml"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_promtool_takes_the_dashboards_queries(repository: Path, promtool: str, tmp_path: Path) -> None:
    dashboard = json.loads((repository / "observability" / "grafana" / "adaptive_k.json").read_text())
    queries = [
        query.replace("$__rate_interval", "1m")
        for query in _queries(dashboard)
        if not query.startswith(("label_values", "prometheus"))
    ]
    # As recording rules, which promtool parses.
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    path = tmp_path / "queries.json"  # JSON is YAML
    path.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
    run = subprocess.run([promtool, "check", "rules", path], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_page_lists_every_metric(repository: Path) -> None:
    page = (repository / "docs" / "observability.md").read_text()
    missing = [name for name in METRICS if f"`{name}`" not in page]
    assert not missing
    assert set(re.findall(r"`(adaptive_k_\w+)`", page)) <= SERIES | set(METRICS)
