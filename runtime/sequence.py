# SPDX-License-Identifier: Apache-2.0
"""A request and its sequences: what was asked, and how far each answer has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.runtime.detokenizer import AnswerText
from adaptive_k_moe.runtime.expert_runs import ExpertReads, ExpertRuns
from adaptive_k_moe.runtime.outputs import (
    NO_CONTEXT,
    CompletionOutput,
    Enrollment,
    ErrorKind,
    FinishReason,
    RequestContext,
    RequestMetrics,
    RequestOutput,
)
from adaptive_k_moe.runtime.sampler import SamplingState, log_probabilities
from adaptive_k_moe.runtime.sampling_params import SamplingParams


class RowBuffer:
    """Rows that are only ever added, so a view handed out stays true while more are added.

    Args:
        width: columns of a row.
        dtype: of the values.
        capacity: rows to make room for at first.
    """

    def __init__(self, width: int, dtype: npt.DTypeLike, capacity: int = 64) -> None:
        self._rows = np.empty((max(capacity, 1), width), dtype)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Add rows [t, width]."""
        end = self._length + len(rows)
        if end > len(self._rows):
            grown = np.empty((max(end, 2 * len(self._rows)), self._rows.shape[1]), self._rows.dtype)
            grown[: self._length] = self._rows[: self._length]
            self._rows = grown
        self._rows[self._length : end] = rows
        self._length = end

    def view(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows start to stop of those added so far, read-only."""
        rows = self._rows[min(start, self._length) : self._length if stop is None else min(stop, self._length)]
        rows.flags.writeable = False
        return rows


class PromptLogprobs:
    """The log-probabilities of a prompt's tokens, as the logits for them come.

    Args:
        token_ids: the prompt, n tokens.
        num_top: likeliest tokens to keep in each place.

    Attributes:
        entries: for each token after the first, as far as computed: token id to log-probability.
    """

    def __init__(self, token_ids: list[int], num_top: int) -> None:
        self.entries: list[dict[int, float]] = []
        self._token_ids = token_ids
        self._num_top = num_top

    def __len__(self) -> int:
        return len(self.entries)

    def append(self, rows: npt.NDArray[np.float32]) -> None:
        """Take the logits [t, V] that follow the next t tokens; those that follow the last are no use here."""
        followed = self._token_ids[len(self.entries) + 1 :]
        self.entries += [
            log_probabilities(row, token_id, self._num_top) for row, token_id in zip(rows, followed, strict=False)
        ]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a request is run, and what its records say of it. How its tokens are chosen is `SamplingParams`.

    Attributes:
        request_id: unique among the running.
        streaming: each step that brings a token brings an output, not only the last.
        enrollment: its place in an A/B test.
        context: what the caller said of it.
        background: others go first, and it is counted nowhere.
        chat_template_kwargs: given to the model's chat template; with any, the prompt has to be a conversation.
    """

    request_id: str
    streaming: bool = False
    enrollment: Enrollment | None = None
    context: RequestContext = NO_CONTEXT
    background: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Request:
    """A checked request.

    Attributes:
        options: how it is run.
        prompt: the prompt's text; None if it came as token ids.
        prompt_token_ids: its tokens, at least one.
        params: how tokens are chosen.
        policy: name of the policy; `policy_index` is its row in the engine's present tables.
        end_ids: tokens that end an answer.
        prompt_text: what the answer's text begins with (the prompt, if asked for).
        sequences: `params.n` sequences.
        metrics: when things happened.
        full_k: the trained top-k.
        error, error_kind: why it ended in an error.
        delayed: whether it has waited for a step of the background.
        followed, expert_reads: as in `RequestOutput`.
    """

    options: RunOptions
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    policy: str
    policy_index: int
    end_ids: frozenset[int]
    metrics: RequestMetrics
    full_k: int
    prompt_text: str = ""
    sequences: list[Sequence] = field(default_factory=list)
    error: str | None = None
    error_kind: ErrorKind | None = None
    delayed: bool = False
    followed: dict[str, int] = field(default_factory=dict)
    expert_reads: ExpertReads | None = None

    @property
    def request_id(self) -> str:
        """Unique among the running."""
        return self.options.request_id

    @property
    def background(self) -> bool:
        """Whether others go first, and it is counted nowhere."""
        return self.options.background

    @property
    def finished(self) -> bool:
        """Whether all sequences have ended."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    def output(self) -> RequestOutput:
        """The state now; what it says was gained counts from the previous call."""
        first = self.sequences[0]
        num_prompt_tokens = len(self.prompt_token_ids)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[sequence.output() for sequence in self.sequences],
            finished=self.finished,
            policy=self.policy,
            prompt_k=first.k.view(0, num_prompt_tokens),
            prompt_entropy=first.entropy.view(0, num_prompt_tokens),
            expert_runs=sum((sequence.expert_runs() for sequence in self.sequences), ExpertRuns(self.full_k)),
            metrics=self.metrics,
            context_logits=None if first.context_logits is None else first.context_logits.view(),
            error=self.error,
            error_kind=self.error_kind,
            context=self.options.context,
            enrollment=self.options.enrollment,
            followed=dict(self.followed),
            expert_reads=None if self.expert_reads is None else replace(self.expert_reads),
            prompt_logprobs=None if first.prompt_logprobs is None else list(first.prompt_logprobs.entries),
        )


class Sequence:
    """One answer being generated: its tokens, its place in the KV cache, its records.

    Attributes:
        request: whose it is.
        index: which of the request's `n`.
        token_ids: prompt and answer; the sampler adds to this list.
        num_prompt_tokens: how many of them are the prompt.
        num_computed: tokens that are in the KV cache and the states.
        block_table: the physical blocks that hold their keys and values, in order; empty while it waits.
        state_slot: where its recurrent states lie; None while it waits, and in a model without any.
        k, entropy: [computed tokens, L], a row for each token that was ever computed; a token computed
            again after a preemption keeps its first row.
        context_logits: [prompt tokens computed, V], if asked for (of the first sequence alone).
        prompt_logprobs: likewise, of the prompt tokens after the first.
        generation_logits: [generated tokens, V], if asked for.
        sampling: the sampler's state.
        text: the answer's text.
        last_token_time: when its last token was there; None before its first.
        finish_reason, stop_reason: as in `CompletionOutput`.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        sampling: SamplingState,
        text: AnswerText,
        *,
        num_layers: int,
        vocab_size: int,
    ) -> None:
        params = request.params
        self.request = request
        self.index = index
        self.token_ids = sampling.token_ids
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_computed = 0
        self.block_table: list[int] = []
        self.state_slot: int | None = None
        capacity = self.num_prompt_tokens + min(params.max_tokens, 64)
        self.k = RowBuffer(num_layers, np.int32, capacity)
        self.entropy = RowBuffer(num_layers, np.float32, capacity)
        # The prompt's runs are those of the first sequence.
        self._expert_runs, self._rows_counted = ExpertRuns(request.full_k), self.num_prompt_tokens if index else 0
        self.context_logits = (
            RowBuffer(vocab_size, np.float32, self.num_prompt_tokens)
            if params.return_context_logits and index == 0
            else None
        )
        self.prompt_logprobs = (
            PromptLogprobs(request.prompt_token_ids, params.prompt_logprobs)
            if params.prompt_logprobs is not None and index == 0
            else None
        )
        self.generation_logits = (
            RowBuffer(vocab_size, np.float32, min(params.max_tokens, 64)) if params.return_generation_logits else None
        )
        self.sampling = sampling
        self.text = text
        self.cumulative_logprob = 0.0
        self.logprobs: list[dict[int, float]] = []
        self.last_token_time: float | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | tuple[int, ...] | None = None
        with_prompt = not params.exclude_input_from_output
        self._first_token = 0 if with_prompt else self.num_prompt_tokens
        self._first_text = request.prompt_text if with_prompt else ""
        self._tokens_reported = self._first_token
        self._text_reported = 0

    @property
    def num_uncomputed(self) -> int:
        """Tokens that are not in the KV cache and the states yet; 1 in decode."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_generated(self) -> int:
        """Tokens of the answer."""
        return len(self.token_ids) - self.num_prompt_tokens

    def prompt_rows(self, start: int, end: int) -> range:
        """Of the tokens from `start` to `end`, those of the prompt whose logits are wanted and not known yet.

        After a preemption the first rows are known already.
        """
        if self.context_logits is not None:
            return range(max(start, len(self.context_logits)), min(end, self.num_prompt_tokens))
        if self.prompt_logprobs is not None:
            return range(max(start, len(self.prompt_logprobs)), min(end, self.num_prompt_tokens - 1))
        return range(0)

    def record_prompt_rows(self, logits: npt.NDArray[np.float32]) -> None:
        """Take the logits [t, V] of the next `prompt_rows`."""
        if self.prompt_logprobs is not None:
            self.prompt_logprobs.append(logits)
        if self.context_logits is not None:
            self.context_logits.append(logits)

    def record(self, k: npt.NDArray[np.int32], entropy: npt.NDArray[np.float32]) -> None:
        """Note that the next tokens were computed: their k and entropy, [t, L] each."""
        known = len(self.k) - self.num_computed
        self.num_computed += len(k)
        self.k.append(k[known:])
        self.entropy.append(entropy[known:])

    def expert_runs(self) -> ExpertRuns:
        """The experts run so far for the answer's tokens, and in the first sequence for the prompt's."""
        self._expert_runs += ExpertRuns.of(self.request.full_k, self.k.view(self._rows_counted))
        self._rows_counted = max(self._rows_counted, len(self.k))
        return self._expert_runs

    def finish(self, reason: FinishReason, stop_reason: str | int | tuple[int, ...] | None = None) -> None:
        """End the answer; text that was held back comes out, and a stop string in it still counts."""
        matched = None
        if reason != "error":  # text may be what the error is about
            matched = self.text.finish(self.num_generated)
        if matched is not None and reason in ("length", "stop"):
            reason, stop_reason = "stop", matched
        self.finish_reason, self.stop_reason = reason, stop_reason

    def output(self) -> CompletionOutput:
        """The state now; what it says was gained counts from the previous call."""
        text = self._first_text + self.text.text if self._first_text else self.text.text
        text_diff, self._text_reported = text[self._text_reported :], len(text)
        token_ids_diff, self._tokens_reported = self.token_ids[self._tokens_reported :], len(self.token_ids)
        # A generated token's k is that of the pass that produced it: of the token before it.
        start, stop = self.num_prompt_tokens - 1, len(self.token_ids) - 1
        wants_logprobs = self.request.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=text,
            text_diff=text_diff,
            token_ids=self.token_ids[self._first_token :],
            token_ids_diff=token_ids_diff,
            k=self.k.view(start, stop),
            entropy=self.entropy.view(start, stop),
            cumulative_logprob=self.cumulative_logprob if wants_logprobs else None,
            logprobs=list(self.logprobs) if wants_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            generation_logits=None if self.generation_logits is None else self.generation_logits.view(),
        )
