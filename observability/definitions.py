# SPDX-License-Identifier: Apache-2.0
"""Every metric, defined once: what the Prometheus exporters write, and what dashboards and alerts may ask for.

Names and units follow Prometheus' conventions (https://prometheus.io/docs/practices/naming/). Each metric also
has the label `model`. Labels are bounded: `policy` by the policies that an engine can have, `layer` by the model,
the others by the words listed in their metric's help.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MODEL_LABEL = "model"
"""The label that every metric has besides those of its definition."""

NO_POLICY = "-"
"""Value of the label `policy` where a request was refused before it had one."""

OTHER_POLICIES = "_other"
"""Value of the label `policy` for policies beyond the first `MAX_POLICY_LABELS` names seen."""

MAX_POLICY_LABELS = 128
"""Most policy names that get series of their own; an engine has 64 at most, but they can be replaced."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric family.

    Attributes:
        name: as it is exported; a counter's ends in `_total`.
        kind: Prometheus' type.
        help: what it counts.
        labels: names of its labels, in order, besides `model`.
        buckets: a histogram's upper limits, rising, without +Inf. Limits that a model cannot reach are left out.
        bulk: a histogram whose observations come by the thousand. It is exported to Triton bucket by bucket, as
            Triton's own histograms take one observation a call.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    bulk: bool = False


_REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_BATCH_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
_NATS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0)
_EXPERTS = tuple(float(k) for k in range(1, 33))
_READS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 192.0, 256.0, 384.0, 512.0)

LATENCY = Metric(
    "adaptive_k_latency_seconds",
    "histogram",
    "From a request's arrival to its end, for requests that entered the engine.",
    ("policy",),
    _REQUEST_SECONDS,
)
TIME_TO_FIRST_TOKEN = Metric(
    "adaptive_k_time_to_first_token_seconds",
    "histogram",
    "From a request's arrival to its first token.",
    ("policy",),
    _REQUEST_SECONDS,
)
QUEUE_TIME = Metric(
    "adaptive_k_queue_seconds",
    "histogram",
    "From a request's arrival to the step that its first token entered.",
    ("policy",),
    _REQUEST_SECONDS,
)
TIME_BETWEEN_TOKENS = Metric(
    "adaptive_k_time_between_tokens_seconds",
    "histogram",
    "Between two tokens of a sequence.",
    (),
    _TOKEN_SECONDS,
    bulk=True,
)
STEP_TIME = Metric(
    "adaptive_k_step_seconds",
    "histogram",
    "Time of a step of the engine: planning, model, sampling, text.",
    (),
    _TOKEN_SECONDS,
    bulk=True,
)
BATCH_SIZE = Metric("adaptive_k_batch_size", "histogram", "Sequences in a step.", (), _BATCH_SIZES, bulk=True)
EXPERTS_PER_TOKEN = Metric(
    "adaptive_k_experts_per_token",
    "histogram",
    "Experts that ran for a token in a MoE layer (layers are numbered over the MoE layers from 0).",
    ("layer", "policy"),
    _EXPERTS,
    bulk=True,
)
EXPERT_READS = Metric(
    "adaptive_k_expert_reads",
    "histogram",
    "Experts whose weights a step of the engine read in a MoE layer, where the session counts them.",
    ("layer",),
    _READS,
    bulk=True,
)
ROUTER_ENTROPY = Metric(
    "adaptive_k_router_entropy_nats",
    "histogram",
    "Entropy of the router's softmax for a token in a MoE layer.",
    ("layer",),
    _NATS,
    bulk=True,
)
EXPERT_TOKENS = Metric(
    "adaptive_k_expert_tokens_total",
    "counter",
    "Tokens that an expert ran for: its load.",
    ("layer", "expert"),
)
AVG_K = Metric(
    "adaptive_k_avg_k",
    "gauge",
    "Mean experts that ran for a token and layer since the engine was opened.",
    ("policy",),
)
COMPUTE_SAVED = Metric(
    "adaptive_k_compute_saved_ratio",
    "gauge",
    "Share of expert runs left out against the trained top-k since the engine was opened: a count, not a time.",
    ("policy",),
)
LOAD_STEP = Metric(
    "adaptive_k_load_step",
    "gauge",
    "The step that requests of a policy of the kind by_load take now, from 0, the one without load.",
    ("policy",),
)
REQUESTS = Metric(
    "adaptive_k_requests_total",
    "counter",
    "Prompts ended; outcome is stop, length, cancelled, error or refused.",
    ("policy", "outcome"),
)
ERRORS = Metric(
    "adaptive_k_errors_total",
    "counter",
    "Prompts refused or failed; kind is request, policy, engine, sampling, text or server.",
    ("kind",),
)
RECORDS_DROPPED = Metric(
    "adaptive_k_records_dropped_total",
    "counter",
    "Requests whose log line or spans were given up because their writer was too slow.",
)
QUEUE_DEPTH = Metric(
    "adaptive_k_queue_depth", "gauge", "Sequences in the engine; state is running or waiting.", ("state",)
)
KV_BLOCKS = Metric("adaptive_k_kv_blocks", "gauge", "KV cache blocks that exist.")
KV_BLOCKS_USED = Metric("adaptive_k_kv_blocks_used", "gauge", "KV cache blocks that hold tokens of requests.")
PROMPT_TOKENS = Metric("adaptive_k_prompt_tokens_total", "counter", "Prompt tokens of the requests accepted.")
GENERATION_TOKENS = Metric("adaptive_k_generation_tokens_total", "counter", "Tokens generated.")
PREEMPTIONS = Metric(
    "adaptive_k_preemptions_total", "counter", "Times that a running sequence lost its KV blocks to others."
)
CANCELLATIONS = Metric(
    "adaptive_k_cancellations_total", "counter", "Requests ended before their last token because nobody waits for it."
)
STEPS = Metric("adaptive_k_steps_total", "counter", "Steps of the engine.")

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        LATENCY,
        TIME_TO_FIRST_TOKEN,
        QUEUE_TIME,
        TIME_BETWEEN_TOKENS,
        STEP_TIME,
        BATCH_SIZE,
        EXPERTS_PER_TOKEN,
        EXPERT_READS,
        ROUTER_ENTROPY,
        EXPERT_TOKENS,
        AVG_K,
        COMPUTE_SAVED,
        LOAD_STEP,
        REQUESTS,
        ERRORS,
        RECORDS_DROPPED,
        QUEUE_DEPTH,
        KV_BLOCKS,
        KV_BLOCKS_USED,
        PROMPT_TOKENS,
        GENERATION_TOKENS,
        PREEMPTIONS,
        CANCELLATIONS,
        STEPS,
    )
}
"""All metrics by name."""


def format_limit(limit: float) -> str:
    """A bucket's limit as the label `le` has it."""
    return "+Inf" if limit == float("inf") else repr(float(limit))
