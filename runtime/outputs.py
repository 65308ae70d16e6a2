# SPDX-License-Identifier: Apache-2.0
"""What a request gets back; shaped as TensorRT-LLM's `RequestOutput`, with k and entropy for each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.arguments import check_fields
from adaptive_k_moe.errors import RequestError
from adaptive_k_moe.runtime.expert_runs import ExpertReads, ExpertRuns

FinishReason = Literal["stop", "length", "cancelled", "error"]

ErrorKind = Literal["request", "policy", "engine", "sampling", "text", "server"]
"""What a request failed at: its own parameters, its policy, the model's step, the choice of a token, the
answer's text, or the server around the runtime."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestContext:
    """What a caller wants the records of its request to say; nothing of it changes the answer.

    Attributes:
        client_id: the caller's own name for the request, which need not be unique; "" is none.
        batch_index: which one it is of several prompts that came together.
        trace_headers: the W3C trace context that it came with (`traceparent`, `tracestate`).

    Raises:
        RequestError: a value is of a wrong type.
    """

    client_id: str = ""
    batch_index: int = 0
    trace_headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, RequestError)


NO_CONTEXT = RequestContext()


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence, whole so far. Shapes: n tokens generated, L MoE layers, V vocabulary.

    Attributes:
        index: which of the request's `n` sequences this is.
        text: the answer's text so far; while it streams, text that may still become a stop string is
            held back.
        text_diff: what `text` gained since the request's previous output.
        token_ids: n token ids so far (the end token and a stop string's tokens among them).
        token_ids_diff: the token ids gained since the request's previous output.
        cumulative_logprob: sum of the chosen tokens' log-probabilities; None unless `logprobs` was asked.
        logprobs: n dictionaries, token id to log-probability; the chosen token is in each.
        finish_reason: None while it runs; "stop", "length", "cancelled" or "error" after.
        stop_reason: the stop string, stop token id or list of token ids that ended it, if one did.
        k: [n, L] experts that ran in the forward pass that produced each token.
        entropy: [n, L] the router's entropy in that pass, in nats.
        generation_logits: [n, V] if asked for.
    """

    index: int
    text: str
    text_diff: str
    token_ids: list[int]
    token_ids_diff: list[int]
    k: npt.NDArray[np.int32]
    entropy: npt.NDArray[np.float32]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, float]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | tuple[int, ...] | None = None
    generation_logits: npt.NDArray[np.float32] | None = None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request: seconds of `time.monotonic()`; None is not yet.

    Attributes:
        arrival_time: the request was accepted.
        first_scheduled_time: its first token entered a step.
        first_token_time: its first generated token was there.
        last_token_time: its last generated token was there.
        finished_time: it ended, for whatever reason.
        num_preemptions: times that its KV blocks were taken away.
        num_kv_blocks: KV blocks that it was given, those that it was given again after a preemption among them.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    num_kv_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Enrollment:
    """A request's place in an A/B test. The runtime only passes it on.

    Attributes:
        experiment: the test's name.
        variant: name of the variant that the request was assigned to.
        unit: what was assigned: the request's id, or its user.
        counted: whether the test counts it; not if the variant that it was assigned to was stopped.

    Raises:
        RequestError: a value is of a wrong type.
    """

    experiment: str
    variant: str
    unit: str
    counted: bool = True

    def __post_init__(self) -> None:
        check_fields(self, RequestError)


@dataclass(slots=True)
class RequestOutput:
    """A request's state after a step: with streaming one comes after each, else one at the end.

    Attributes:
        request_id: the caller's, or one made here.
        prompt: the prompt's text; None if it came as token ids.
        prompt_token_ids: the prompt's tokens.
        outputs: `n` sequences.
        finished: whether all of them have ended.
        policy: name of its policy.
        followed: tokens computed so far under each policy: `policy` alone, unless that is one of the kind `by_load`.
            Tokens computed again after a preemption count again.
        prompt_k: [len(prompt_token_ids), L] experts that ran for each prompt token; rows are there
            once the prompt has been processed.
        prompt_entropy: [len(prompt_token_ids), L] the router's entropies for them, in nats.
        context_logits: [len(prompt_token_ids), V] if asked for.
        prompt_logprobs: for each prompt token after the first, token id to log-probability of it and of the
            likeliest tokens in its place, if asked for.
        expert_runs: experts run for all tokens computed, prompt and answers, against the trained top-k.
        expert_reads: experts read by the steps that it was part of; None where the session does not know. Tokens
            computed again after a preemption count again: they are read for again.
        metrics: when things happened.
        error: the sentence, where `finish_reason` is "error".
        error_kind: what failed, where `finish_reason` is "error".
        context: what the caller said of the request.
        enrollment: its place in an A/B test; None if it is in none.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    policy: str
    prompt_k: npt.NDArray[np.int32]
    prompt_entropy: npt.NDArray[np.float32]
    expert_runs: ExpertRuns
    metrics: RequestMetrics
    context_logits: npt.NDArray[np.float32] | None = None
    error: str | None = None
    error_kind: ErrorKind | None = None
    context: RequestContext = NO_CONTEXT
    enrollment: Enrollment | None = None
    prompt_logprobs: list[dict[int, float]] | None = None
    followed: Mapping[str, int] = field(default_factory=dict)
    expert_reads: ExpertReads | None = None

    @property
    def variant(self) -> str | None:
        """The variant of an A/B test that the request belongs to; None if it is in no test."""
        return None if self.enrollment is None else self.enrollment.variant

    @property
    def avg_k(self) -> float:
        """Mean number of experts run over all tokens computed (prompt and answers) and layers; NaN before any."""
        return self.expert_runs.avg_k

    @property
    def compute_saved_ratio(self) -> float:
        """Share of expert runs that the policy left out against the trained top-k; a count, not a time."""
        return self.expert_runs.compute_saved_ratio

    @property
    def followed_by_load(self) -> Mapping[str, int] | None:
        """`followed` of a request whose policy is of the kind `by_load`; None of any other."""
        return self.followed if self.followed.keys() - {self.policy} else None

    @property
    def avg_reads(self) -> float | None:
        """Mean experts that its steps read in a MoE layer, for all that ran in them; None where that is not known."""
        return None if self.expert_reads is None or not self.expert_reads.steps else self.expert_reads.avg_reads

    @property
    def reads_per_token(self) -> float | None:
        """Experts read for a token of it in a MoE layer, each step's shared out evenly among the step's tokens."""
        return None if self.expert_reads is None or not self.expert_reads.steps else self.expert_reads.reads_per_token


def rows_of_passes(prompt: npt.NDArray[Any], *answers: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What the passes through the model recorded, each pass once: [tokens computed, L].

    A generated token's row is that of the pass that produced it, which computed the token before it. So an answer's
    first row is the last prompt token's, and is left out.

    Args:
        prompt: [n, L] rows of the prompt's tokens (`prompt_k`).
        answers: [m, L] rows of each answer's tokens (`CompletionOutput.k`).
    """
    return np.concatenate([prompt, *(rows[1:] for rows in answers)])
