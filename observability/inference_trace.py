# SPDX-License-Identifier: Apache-2.0
"""One request from its arrival to its end: what logs and spans are made of."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from adaptive_k_moe.observability.recorder import outcome_of
from adaptive_k_moe.observability.trace_context import TraceContext, read_trace_context
from adaptive_k_moe.runtime.outputs import RequestOutput, rows_of_passes
from adaptive_k_moe.runtime.telemetry import Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceTrace:
    """What happened to a request. Times are seconds since the epoch; None did not come to pass.

    Attributes:
        request_id: the caller's id for it, else the runtime's.
        batch_index: which one it is of several prompts that came together.
        policy: name of its policy; of a refused request, the one it named.
        followed: tokens computed under each policy, of a request whose own is of the kind `by_load`.
        variant: its arm of an A/B test.
        num_input_tokens: tokens of the prompt; None if it was refused.
        num_output_tokens: tokens generated, of all its sequences.
        avg_k: mean experts over all tokens and layers; None before any.
        compute_saved_ratio: share of expert runs left out against the trained top-k.
        avg_reads: mean experts that its steps read in a MoE layer; None where that is not known.
        reads_per_token: experts read for a token of it, each step's shared out evenly among the step's tokens.
        k_histogram: k to the number of tokens and layers that ran so many experts.
        finish_reason: "stop", "length", "cancelled", "error" or "refused".
        error, error_kind: why it failed or was refused.
        arrival: it was accepted, or refused.
        scheduled: its first token entered a step.
        first_token, last_token: its first and last tokens were generated.
        finished: it ended.
        num_preemptions: times that it lost its KV blocks.
        prompt: the prompt's text, if it came as text.
        texts: the answers' texts.
        context: the W3C trace context that it came with.
    """

    request_id: str
    batch_index: int = 0
    policy: str | None = None
    followed: Mapping[str, int] | None = None
    variant: str | None = None
    num_input_tokens: int | None = None
    num_output_tokens: int = 0
    avg_k: float | None = None
    compute_saved_ratio: float | None = None
    avg_reads: float | None = None
    reads_per_token: float | None = None
    k_histogram: dict[int, int]
    finish_reason: str
    error: str | None = None
    error_kind: str | None = None
    arrival: float
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finished: float
    num_preemptions: int = 0
    prompt: str | None = None
    texts: tuple[str, ...] = ()
    context: TraceContext | None = None

    @classmethod
    def of(cls, event: RequestOutput | Refusal) -> InferenceTrace:
        """The trace of a request that has ended, from its last output, or of one that was refused."""
        if isinstance(event, Refusal):
            return _of_refusal(event)
        to_date = _clock_offset()
        metrics = event.metrics

        def date(seconds: float | None) -> float | None:
            return None if seconds is None else seconds + to_date

        counts = np.bincount(rows_of_passes(event.prompt_k, *(each.k for each in event.outputs)).ravel())
        ran = event.expert_runs.choices > 0
        return cls(
            request_id=event.context.client_id or event.request_id,
            batch_index=event.context.batch_index,
            policy=event.policy,
            followed=event.followed_by_load,
            variant=event.variant,
            num_input_tokens=len(event.prompt_token_ids),
            num_output_tokens=sum(len(completion.k) for completion in event.outputs),
            avg_k=event.avg_k if ran else None,
            compute_saved_ratio=event.compute_saved_ratio if ran else None,
            avg_reads=event.avg_reads,
            reads_per_token=event.reads_per_token,
            k_histogram={k: int(count) for k, count in enumerate(counts.tolist()) if count},
            finish_reason=outcome_of(event),
            error=event.error,
            error_kind=event.error_kind,
            arrival=metrics.arrival_time + to_date,
            scheduled=date(metrics.first_scheduled_time),
            first_token=date(metrics.first_token_time),
            last_token=date(metrics.last_token_time),
            finished=date(metrics.finished_time) or time.time(),
            num_preemptions=metrics.num_preemptions,
            prompt=event.prompt,
            texts=tuple(completion.text for completion in event.outputs),
            context=read_trace_context(event.context.trace_headers),
        )

    @property
    def latency_seconds(self) -> float:
        """From arrival to end."""
        return self.finished - self.arrival

    @property
    def ttft_seconds(self) -> float | None:
        """From arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival


def _clock_offset() -> float:
    """What a time of the runtime's clock lacks to a date, in seconds; it may drift, but not within a request."""
    return time.time() - time.monotonic()


def _of_refusal(refusal: Refusal) -> InferenceTrace:
    refused = refusal.time + _clock_offset()
    return InferenceTrace(
        request_id=refusal.context.client_id or refusal.request_id,
        batch_index=refusal.context.batch_index,
        policy=refusal.policy,
        variant=None if refusal.enrollment is None else refusal.enrollment.variant,
        k_histogram={},
        finish_reason="refused",
        error=refusal.error,
        error_kind=refusal.error_kind,
        arrival=refused,
        finished=refused,
        context=read_trace_context(refusal.context.trace_headers),
    )
