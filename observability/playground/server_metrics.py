# SPDX-License-Identifier: Apache-2.0
"""What the charts show, read from the server's metrics port."""

from __future__ import annotations

import asyncio
import http.client
import urllib.request
from collections import defaultdict
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from adaptive_k_moe.errors import ClientError
from adaptive_k_moe.observability import definitions

_TIMEOUT_SECONDS = 2.0


async def read_metrics(metrics_url: str) -> dict[str, Any]:
    """The numbers that the charts are drawn from, summed over the served models.

    Returns:
        `generation_tokens` and `requests`, counts since the server started; `running` and `waiting`, sequences now;
        `kv_used` and `kv_blocks`, cache blocks; `avg_k`, by policy.

    Raises:
        ClientError: nobody answers there, or with something else than metrics.
    """
    text = await asyncio.to_thread(_fetch, metrics_url)
    try:
        return chart_numbers(text)
    except ValueError:
        raise ClientError(f"what {metrics_url} answers is no page of metrics: give --metrics_url.") from None


def chart_numbers(text: str) -> dict[str, Any]:
    """The numbers of the charts out of a page of metrics in Prometheus' text format."""
    samples: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples[sample.name].append((sample.labels, sample.value))

    def total(metric: definitions.Metric, **labels: str) -> float:
        return sum(value for found, value in samples[metric.name] if labels.items() <= found.items())

    return {
        "generation_tokens": total(definitions.GENERATION_TOKENS),
        "requests": total(definitions.REQUESTS),
        "running": total(definitions.QUEUE_DEPTH, state="running"),
        "waiting": total(definitions.QUEUE_DEPTH, state="waiting"),
        "kv_used": total(definitions.KV_BLOCKS_USED),
        "kv_blocks": total(definitions.KV_BLOCKS),
        "avg_k": {labels.get("policy", ""): value for labels, value in samples[definitions.AVG_K.name]},
    }


def _fetch(metrics_url: str) -> str:
    try:
        with urllib.request.urlopen(f"http://{metrics_url}/metrics", timeout=_TIMEOUT_SECONDS) as answer:
            return str(answer.read(), "utf-8")
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError is an OSError
        reason = getattr(error, "reason", None) or error
        reason = getattr(reason, "strerror", None) or reason
        raise ClientError(f"there are no metrics at {metrics_url}: {reason}.") from None
