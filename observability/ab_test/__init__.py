# SPDX-License-Identifier: Apache-2.0
"""A/B tests of policies: which requests follow which, what it saved and cost, and when to stop.

A program that serves its requests itself uses `ABTest`, or after one `configure` the functions here::

    ab_test.configure("ab.db")
    ab_test.assign_variant(request_id)
    ab_test.compute_results()
    # Latency: -32% (-35% to -29%), Quality: -0.1% (-0.4% to +0.1%)

`adaptive-k serve --ab_db FILE` does all of it by itself (`ABService`), for the experiment that `adaptive-k ab`
started in that file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptive_k_moe.observability.ab_test.abtest import ABTest, configure, default
from adaptive_k_moe.observability.ab_test.experiment import Experiment, Guardrail, Variant

if TYPE_CHECKING:
    from adaptive_k_moe.observability.ab_test.results import Results

__all__ = ["ABTest", "Experiment", "Guardrail", "Variant", "assign_variant", "compute_results", "configure"]


def assign_variant(request_id: str, user: str | None = None) -> str:
    """Name of a request's variant in the test that `configure` chose; see `ABTest.assign_variant`."""
    return default().assign_variant(request_id, user)


def compute_results() -> Results:
    """What the test that `configure` chose has shown so far; see `ABTest.compute_results`."""
    return default().compute_results()
