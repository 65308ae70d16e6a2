# SPDX-License-Identifier: Apache-2.0
"""The quality of an answer: its tokens once more, given to the model under `full` and under its own policy."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from adaptive_k_moe.errors import AdaptiveKError
from adaptive_k_moe.observability.ab_test.records import ScoreRecord

if TYPE_CHECKING:
    from adaptive_k_moe.runtime import LLM, RequestOutput

MAX_WAITING = 32
"""Answers that wait to be scored; while so many do, no further one is taken."""


class Scorer:
    """Scores answers in the engine's idle time.

    Nothing is generated: prompt and answer are a prompt whose log-probabilities are asked for (teacher
    forcing), as a background request, so that a real request waits for one small step of it at most.

    Args:
        llm: the engine.
        on_score: called with each score on the engine's thread; must be quick.
    """

    def __init__(self, llm: LLM, on_score: Callable[[ScoreRecord], None]) -> None:
        self._llm = llm
        self._on_score = on_score
        self._lock = threading.Lock()
        self._waiting = 0

    def score(self, output: RequestOutput) -> bool:
        """Begin to score a finished request's first sequence; False if it has no answer or too many wait."""
        from adaptive_k_moe.policy import FULL

        num_generated = len(output.outputs[0].k)
        if output.error is not None or num_generated == 0:
            return False
        answer = output.outputs[0].token_ids[-num_generated:]
        tokens = [*output.prompt_token_ids, *answer][: self._llm.config.build_config.max_seq_len - 1]
        first = len(output.prompt_token_ids)
        if len(tokens) <= first:
            return False
        with self._lock:
            if self._waiting >= MAX_WAITING:
                return False
            self._waiting += 1
        # Of a request that followed several policies by the load, the one that computed most of it.
        own = max(output.followed, key=lambda policy: output.followed[policy], default=output.policy)
        answers = _Answers(output.request_id, first, tokens, [FULL, own], self._ended)
        for policy in answers.policies:
            self._submit(answers, policy)
        return True

    def _submit(self, answers: _Answers, policy: str) -> None:
        from adaptive_k_moe.runtime import SamplingParams

        params = SamplingParams(max_tokens=1, end_id=-1, prompt_logprobs=1, adaptive_k_policy=policy)
        try:
            self._llm.generate_async(
                answers.tokens,
                params,
                on_output=lambda output: answers.take(policy, output.prompt_logprobs if not output.error else None),
                background=True,
            )
        except AdaptiveKError:  # the policy was removed, or the engine is shut down
            answers.take(policy, None)

    def _ended(self, score: ScoreRecord | None) -> None:
        with self._lock:
            self._waiting -= 1
        if score is not None:
            self._on_score(score)


class _Answers:
    """What the policies say of one answer, as it comes."""

    def __init__(
        self,
        request_id: str,
        first: int,
        tokens: list[int],
        policies: list[str],
        on_end: Callable[[ScoreRecord | None], None],
    ) -> None:
        self.tokens = tokens
        self.policies = list(dict.fromkeys(policies))
        self._request_id = request_id
        self._first = first
        self._own_policy = policies[1]
        self._on_end = on_end
        self._lock = threading.Lock()
        self._taken: dict[str, list[dict[int, float]] | None] = {}

    def take(self, policy: str, logprobs: list[dict[int, float]] | None) -> None:
        with self._lock:
            self._taken[policy] = logprobs
            if len(self._taken) < len(self.policies):
                return
        self._on_end(self._score())

    def _score(self) -> ScoreRecord | None:
        full, own = self._taken[self.policies[0]], self._taken[self._own_policy]
        answer = self.tokens[self._first :]
        # The entry before a token is of the token itself; a request that was cut off has fewer.
        if full is None or own is None or len(full) < len(self.tokens) - 1 or len(own) < len(self.tokens) - 1:
            return None
        full, own = full[self._first - 1 :], own[self._first - 1 :]
        best = [next(iter(entry)) for entry in full]
        agreed = sum(token == next(iter(entry)) for token, entry in zip(best, own, strict=True))
        score = ScoreRecord(
            self._request_id,
            answer_logprob=_mean(full, answer),
            best_logprob=_mean(full, best),
            own_logprob=_mean(own, answer),
            agreement=agreed / len(answer),
        )
        return score if all(map(math.isfinite, score.observations().values())) else None


def _mean(logprobs: list[dict[int, float]], tokens: list[int]) -> float:
    """Mean log-probability of the tokens."""
    return sum(entry[token] for entry, token in zip(logprobs, tokens, strict=True)) / len(tokens)
