# SPDX-License-Identifier: Apache-2.0
"""What is written of a request: its figures when it ends, and its quality if it was scored."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptive_k_moe.runtime.outputs import Enrollment, RequestOutput

# No clock is finer, and a logarithm needs more than 0.
_SHORTEST_SECONDS = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """A request that ended.

    Attributes:
        experiment, variant, unit, counted: its place in the test, see `Enrollment`.
        request_id: unique in the file.
        outcome: "stop", "length", "cancelled" or "error".
        finished_at: in seconds since 1970.
        latency_seconds: from its arrival to its end.
        ttft_seconds: from its arrival to its first token; None without one.
        num_prompt_tokens: tokens of the prompt.
        num_tokens: tokens generated.
        avg_k: mean experts run a token and layer; None if nothing was computed.
    """

    experiment: str
    variant: str
    unit: str
    request_id: str
    outcome: str
    latency_seconds: float
    counted: bool = True
    finished_at: float = 0.0
    ttft_seconds: float | None = None
    num_prompt_tokens: int | None = None
    num_tokens: int = 0
    avg_k: float | None = None

    def observations(self) -> dict[str, float]:
        """The quantities that it is an observation of, by name; times as logarithms."""
        cancelled = self.outcome == "cancelled"
        values = {"cancelled_rate": float(cancelled)}
        if cancelled:
            return values
        values["error_rate"] = float(self.outcome == "error")
        if self.outcome == "error":
            return values
        values["latency"] = _log_seconds(self.latency_seconds)
        if self.num_tokens:
            values["time_per_token"] = values["latency"] - math.log(self.num_tokens)
        if self.ttft_seconds is not None:
            values["ttft"] = _log_seconds(self.ttft_seconds)
        if self.avg_k is not None:
            values["avg_k"] = self.avg_k
        return {name: value for name, value in values.items() if math.isfinite(value)}


@dataclass(frozen=True, slots=True)
class ScoreRecord:
    """The quality of a request's answer; per token, in nats.

    Attributes:
        request_id: the request's.
        answer_logprob: mean log-probability of the answer's tokens under the policy `full`.
        best_logprob: likewise of the tokens that are likeliest under `full` in their places.
        own_logprob: mean log-probability of the answer's tokens under the request's own policy.
        agreement: share of the answer's tokens at which both rank the same token first.
    """

    request_id: str
    answer_logprob: float
    best_logprob: float
    own_logprob: float
    agreement: float

    def observations(self) -> dict[str, float]:
        """The quantities that it is an observation of, by name."""
        values = {
            "quality": self.best_logprob - self.answer_logprob,
            "own_loss": self.own_logprob - self.answer_logprob,
            "agreement": self.agreement,
            "answer_logprob": self.answer_logprob,
        }
        return {name: value for name, value in values.items() if math.isfinite(value)}


def record_of(output: RequestOutput, enrollment: Enrollment) -> RequestRecord:
    """The record of an enrolled request's last output."""
    from adaptive_k_moe.observability.recorder import outcome_of

    metrics = output.metrics
    ended = metrics.finished_time if metrics.finished_time is not None else time.monotonic()
    first = metrics.first_token_time
    avg_k = output.avg_k
    return RequestRecord(
        experiment=enrollment.experiment,
        variant=enrollment.variant,
        unit=enrollment.unit,
        counted=enrollment.counted,
        request_id=output.request_id,
        outcome=outcome_of(output),
        finished_at=time.time(),
        latency_seconds=ended - metrics.arrival_time,
        ttft_seconds=None if first is None else first - metrics.arrival_time,
        num_prompt_tokens=len(output.prompt_token_ids),
        num_tokens=sum(len(completion.k) for completion in output.outputs),
        avg_k=avg_k if math.isfinite(avg_k) else None,
    )


def _log_seconds(seconds: float) -> float:
    return math.log(max(seconds, _SHORTEST_SECONDS))
