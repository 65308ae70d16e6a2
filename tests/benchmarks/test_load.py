# SPDX-License-Identifier: Apache-2.0
"""The open-loop load: what it says of waits that have not ended and of queues that grow, and that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import load
import pytest


def test_a_wait_that_has_not_ended_makes_the_quantiles_that_it_may_move_bounds() -> None:
    waits = [(0.1, False), (0.2, False), (0.3, True), (0.4, False)]
    assert load.quantile(waits[:2], 0.5) == (0.2, False)
    assert load.quantile(waits, 0.25) == (0.2, False)
    assert load.quantile(waits, 0.5) == (0.3, True)  # it could be 0.4
    assert load.quantile(waits, 0.95) == (0.4, True)
    assert load.quantile([(0.01, True), *[(0.1, False)] * 9], 0.5) == (0.1, False)
    assert load.quantile([], 0.5) == (None, False)


def test_the_slope_of_a_queue_is_in_sequences_a_second() -> None:
    assert load.slope([(0.0, 1), (0.5, 2), (1.0, 3)]) == pytest.approx(2.0)


def test_it_runs_and_says_where_the_queue_grows(tmp_path: Path, repository: Path) -> None:
    output = tmp_path / "load.json"
    script = [sys.executable, "benchmarks/load.py", "--quick", "--max_batch_size", "4", "--shares", "0.2", "20"]
    script += ["--work_dir", str(tmp_path / "work")]
    run = subprocess.run(
        [*script, "--output", str(output)], cwd=repository, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr
    content = json.loads(output.read_text())
    assert content["model"] == "olmoe-small" and content["quick"]
    rows = {(row["policy"], index // 2): row for index, row in enumerate(content["rows"])}
    assert set(rows) == {("full", 0), ("full", 1), ("by_load", 0), ("by_load", 1)}
    # Twenty times what it can answer is too much for either, even on a machine that became faster meanwhile.
    assert rows["full", 1]["grows"] and rows["full", 1]["median_is_bound"] + rows["full", 1]["p95_is_bound"] > 0
    assert rows["full", 1]["queue_end"] >= 4 and rows["full", 1]["answered"] < rows["full", 1]["arrived"]
    assert set(rows["full", 1]["followed"]) == {"full"} and rows["full", 1]["avg_k"] == 8.0
    assert set(rows["by_load", 1]["followed"]) - {"full"}
    assert rows["by_load", 1]["reads"] < rows["full", 1]["reads"]
    for (policy, _), row in rows.items():  # the same arrivals
        assert row["arrived"] == rows["full", int(row["rate"] == rows["full", 1]["rate"])]["arrived"], policy
    # Each row's KL is that of what its tokens followed.
    kl = content["kl"]
    assert kl["full"] == 0 < kl["shared"] < kl["shared_more"]
    for row in rows.values():
        assert row["kl"] == pytest.approx(sum(share * kl[name] for name, share in row["followed"].items()))
    assert rows["full", 1]["kl"] == 0 < rows["by_load", 1]["kl"]
    assert "of olmoe-small in decode steps of 4" in run.stdout
