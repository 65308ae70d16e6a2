# SPDX-License-Identifier: Apache-2.0
"""What the tests of this folder share: outputs made by hand, and pages read by prometheus_client's own parser."""

from __future__ import annotations

import time
import urllib.request
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from adaptive_k_moe.runtime.expert_runs import ExpertRuns
from adaptive_k_moe.runtime.outputs import (
    CompletionOutput,
    RequestContext,
    RequestMetrics,
    RequestOutput,
    rows_of_passes,
)

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read_page(page: str) -> Samples:
    """Every sample of a metrics page: (name, labels) to value."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def scrape(url: str) -> Samples:
    with urllib.request.urlopen(f"http://{url}/metrics", timeout=60) as answer:
        return read_page(answer.read().decode())


def total(samples: Samples, name: str, **labels: str) -> float:
    """Sum of the samples of a name that have the labels."""
    wanted = set(labels.items())
    return sum(value for (found, present), value in samples.items() if found == name and wanted <= present)


def make_output(**changes: Any) -> RequestOutput:
    """A request that has ended: 3 prompt tokens, 2 generated, 2 layers, every k 1 but for the prompt's first token."""
    prompt_k = np.ones((3, 2), np.int32)
    prompt_k[0] = 4
    completion = CompletionOutput(
        index=0,
        text="a<b>",
        text_diff="",
        token_ids=[7, 8],
        token_ids_diff=[],
        k=np.ones((2, 2), np.int32),
        entropy=np.full((2, 2), 0.5, np.float32),
        finish_reason="stop",
    )
    now = time.monotonic()
    fields: dict[str, Any] = {
        "request_id": "engine-1",
        "prompt": "to be",
        "prompt_token_ids": [1, 2, 3],
        "outputs": [completion],
        "finished": True,
        "policy": "balanced",
        "prompt_k": prompt_k,
        "prompt_entropy": np.full((3, 2), 0.5, np.float32),
        "metrics": RequestMetrics(
            arrival_time=now - 1.0,
            first_scheduled_time=now - 0.75,
            first_token_time=now - 0.5,
            last_token_time=now - 0.25,
            finished_time=now,
        ),
        "context": RequestContext(client_id="mine"),
    }
    fields |= changes
    rows = rows_of_passes(fields["prompt_k"], *(each.k for each in fields["outputs"]))
    return RequestOutput(**{"expert_runs": ExpertRuns.of(4, rows), **fields})
