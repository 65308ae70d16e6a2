# SPDX-License-Identifier: Apache-2.0
"""The engine's metrics on Triton's own metrics port. Imported inside Triton only.

Labels are bounded: `model` is the served model's name, `policy` one of the engine's policies (`-` where a
request was refused before it had one), `outcome` one of five words.
"""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils  # exists inside Triton only

from adaptive_k_moe.errors import DependencyError
from adaptive_k_moe.model_repository.calls import Ended

LATENCY_BUCKETS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0]
"""Upper limits of `adaptive_k_latency_seconds`, in seconds."""

NO_POLICY = "-"

# Counters of the runtime's `EngineStats` that are passed on as they are.
_ENGINE_COUNTERS = {
    "prompt_tokens_total": "prompt tokens computed",
    "generation_tokens_total": "tokens generated",
    "preemptions_total": "times that a running request lost its KV blocks to others",
    "cancellations_total": "requests ended before their last token because nobody waits for them",
}
_ENGINE_GAUGES = {
    "kv_blocks_total": "KV cache blocks of the engine",
    "kv_blocks_used": "KV cache blocks that hold tokens of requests",
}


class Metrics:
    """All metric families of one served model; not thread-safe, one thread reports."""

    def __init__(self, model: str) -> None:
        kinds = pb_utils.MetricFamily
        if not hasattr(kinds, "HISTOGRAM"):
            raise DependencyError("this Triton has no histogram metrics: use release 24.10 or a newer one.")
        self._model = model
        # A metric lives as long as its family, so both are kept.
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, ...], Any] = {}
        self._values: dict[tuple[str, ...], float] = {}
        self._k_sums: dict[str, tuple[float, float, int]] = {}  # policy: k, saved (both x weight), weight
        self._family("adaptive_k_latency_seconds", "from a request's arrival to its last token", kinds.HISTOGRAM)
        self._family("adaptive_k_avg_k", "mean experts run a token and layer, over finished requests", kinds.GAUGE)
        self._family(
            "adaptive_k_compute_saved_ratio",
            "share of expert runs left out against the trained top-k, over finished requests (a count, not a time)",
            kinds.GAUGE,
        )
        self._family("adaptive_k_requests_total", "prompts ended, by outcome", kinds.COUNTER)
        self._family("adaptive_k_queue_depth", "prompts in the engine, by state", kinds.GAUGE)
        for name, description in _ENGINE_COUNTERS.items():
            self._family(f"adaptive_k_{name}", description, kinds.COUNTER)
        for name, description in _ENGINE_GAUGES.items():
            self._family(f"adaptive_k_{name}", description, kinds.GAUGE)

    def ended(self, ended: Ended) -> None:
        """A prompt ended."""
        policy = ended.policy or NO_POLICY
        self._metric("adaptive_k_requests_total", policy=policy, outcome=ended.outcome).increment(1)
        if ended.seconds is not None:
            latency = self._metric("adaptive_k_latency_seconds", policy=policy)
            latency.observe(ended.seconds)
        if ended.builder is not None and (weight := ended.builder.expert_choices):
            k, saved, weights = self._k_sums.get(policy, (0.0, 0.0, 0))
            weights += weight
            k += ended.builder.avg_k * weight
            saved += ended.builder.compute_saved_ratio * weight
            self._k_sums[policy] = (k, saved, weights)
            self._set("adaptive_k_avg_k", k / weights, policy=policy)
            self._set("adaptive_k_compute_saved_ratio", saved / weights, policy=policy)

    def engine(self, stats: Any) -> None:
        """Take over the runtime's `EngineStats`; a value that did not change costs nothing."""
        self._set("adaptive_k_queue_depth", stats.num_running, state="running")
        self._set("adaptive_k_queue_depth", stats.num_waiting, state="waiting")
        for name in _ENGINE_GAUGES:
            self._set(f"adaptive_k_{name}", getattr(stats, name))
        for name in _ENGINE_COUNTERS:
            total = getattr(stats, name)
            metric = self._metric(f"adaptive_k_{name}")
            grown = total - self._values.get((name,), 0)
            if grown > 0:
                metric.increment(grown)
                self._values[name,] = total

    def _family(self, name: str, description: str, kind: Any) -> None:
        self._families[name] = pb_utils.MetricFamily(name=name, description=description, kind=kind)

    def _set(self, name: str, value: float, **labels: str) -> None:
        key = (name, *labels.values())
        if self._values.get(key) != value:
            self._metric(name, **labels).set(value)
            self._values[key] = value

    def _metric(self, name: str, **labels: str) -> Any:
        key = (name, *labels.values())
        if key not in self._metrics:
            options = {"buckets": LATENCY_BUCKETS} if name == "adaptive_k_latency_seconds" else {}
            self._metrics[key] = self._families[name].Metric(labels={"model": self._model, **labels}, **options)
        return self._metrics[key]
