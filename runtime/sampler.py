# SPDX-License-Identifier: Apache-2.0
"""From logits to tokens: each sequence by its own parameters, its own history and its own generator.

Order, as in Hugging Face's `generate`: logit bias; repetition, presence and frequency penalties; bad words; no end
before `min_tokens`; temperature; top-k; top-p; min-p; draw. Log-probabilities are those of the model:
the log-softmax of the raw logits, before all of this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.runtime.sampling_params import SamplingParams
from adaptive_k_moe.runtime.telemetry import logger

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

# Below this a temperature changes nothing any more and would only overflow float32.
_MIN_TEMPERATURE = 1e-5

# Logits whose greatest is found first when few of many are wanted.
_BLOCK = 64


class Sampled(NamedTuple):
    """One chosen token.

    Attributes:
        token_id: the token; -1 if the logits allow none.
        logprob: its log-probability, if log-probabilities were asked for.
        logprobs: token id to log-probability of it and the likeliest tokens, if asked for.
        error: why there is no token.
    """

    token_id: int
    logprob: float | None = None
    logprobs: dict[int, float] | None = None
    error: str | None = None


class SamplingState:
    """What a sequence's next choice depends on besides the logits.

    Args:
        params: the request's.
        vocab_size: width of the logits.
        token_ids: the prompt; the answer's tokens are added to this very list.
        index: which of the request's `n` sequences; each has its own generator.
        end_ids: tokens that must not come before `min_tokens`.
        bad_words: token sequences that must not come.
        stop_words: token sequences that end the answer.
        logit_bias: token id to what is added to its logit.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        token_ids: list[int],
        *,
        index: int = 0,
        end_ids: Iterable[int] = (),
        bad_words: Sequence[Sequence[int]] = (),
        stop_words: Sequence[tuple[int, ...]] = (),
        logit_bias: Mapping[int, float] | None = None,
    ) -> None:
        self.params = params
        self.greedy = params.greedy
        self.token_ids = token_ids
        self.num_generated = 0
        self.end_ids = np.array(sorted(end_ids), np.int64)
        self.bad_words = [tuple(word) for word in bad_words]
        self.stop_words = stop_words
        self._biased = np.fromiter(logit_bias or (), np.int64)
        # As certain as can be, and no infinity, which would be no number next to another one.
        self._bias = np.fromiter((logit_bias or {}).values(), np.float64).clip(-1e30, 1e30).astype(np.float32)
        spawn_key = (index,) if index else ()
        self.generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(params.seed, spawn_key=spawn_key)))
        self._seen: npt.NDArray[np.bool_] | None = None
        if params.repetition_penalty != 1:
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[self.token_ids] = True
        self._counts: npt.NDArray[np.int32] | None = None
        if params.presence_penalty or params.frequency_penalty:
            self._counts = np.zeros(vocab_size, np.int32)
        self._always_plain = (
            self._seen is None and self._counts is None and not self.bad_words and not len(self._biased)
        )

    def append(self, token_id: int) -> None:
        """The answer goes on with this token."""
        self.token_ids.append(token_id)
        self.num_generated += 1
        if self._seen is not None:
            self._seen[token_id] = True
        if self._counts is not None:
            self._counts[token_id] += 1

    @property
    def stop_word(self) -> tuple[int, ...] | None:
        """The stop word that the answer ends in, once it may end; None without one."""
        if self.num_generated < self.params.min_tokens:
            return None
        answer = self.token_ids[len(self.token_ids) - self.num_generated :]
        return next((word for word in self.stop_words if tuple(answer[-len(word) :]) == word), None)

    @property
    def changes_logits(self) -> bool:
        """Whether anything but temperature, top-k, top-p and min-p acts on the next logits."""
        return not self._always_plain or self.bans_end

    @property
    def bans_end(self) -> bool:
        """Whether the answer is too short to end."""
        return self.num_generated < self.params.min_tokens and len(self.end_ids) > 0

    def processed(self, logits: FloatArray) -> FloatArray:
        """A copy of the logits [V] with bias and penalties applied and forbidden tokens at -inf."""
        params = self.params
        scores = logits.copy()
        scores[self._biased] += self._bias
        if self._seen is not None:
            seen = np.flatnonzero(self._seen)
            values = scores[seen]
            scores[seen] = np.where(values < 0, values * params.repetition_penalty, values / params.repetition_penalty)
        if self._counts is not None:
            used = np.flatnonzero(self._counts)
            scores[used] -= params.presence_penalty + params.frequency_penalty * self._counts[used]
        for word in self.bad_words:
            head = len(word) - 1
            if head == 0 or (head <= len(self.token_ids) and tuple(self.token_ids[-head:]) == word[:-1]):
                scores[word[-1]] = -np.inf
        if self.bans_end:
            scores[self.end_ids] = -np.inf
        return scores


def candidates(logits: FloatArray, params: SamplingParams) -> tuple[IntArray, FloatArray]:
    """The tokens that may be drawn, by ascending id, and their probabilities.

    Nothing here sorts the whole vocabulary unless top-p alone is asked for and the distribution is flat.

    Args:
        logits: [V]; the greatest is finite.
        params: `temperature` (above 0), `top_k`, `top_p` and `min_p` are used. Of tokens that tie for the
            last place of top-k all are kept.
    """
    vocab_size = len(logits)
    if 0 < params.top_k < vocab_size:
        token_ids = _top_k(logits, params.top_k)
        scores = logits[token_ids]
    else:
        token_ids = np.arange(vocab_size)
        scores = logits
    weights = np.exp((scores - scores.max()) / np.float32(max(params.temperature, _MIN_TEMPERATURE)))
    probabilities = weights / np.float32(weights.sum(dtype=np.float64))
    if params.top_p < 1:
        # All tokens below (1 - p) / V together weigh less than 1 - p, so none of them is needed to reach p.
        few = np.flatnonzero(probabilities >= (1 - params.top_p) / vocab_size)
        falling = np.sort(probabilities[few])[::-1]
        mass_before = np.cumsum(falling, dtype=np.float64) - falling
        count = max(1, int(np.searchsorted(mass_before, params.top_p)))
        above = few[probabilities[few] > falling[count - 1]]
        equal = few[probabilities[few] == falling[count - 1]][: count - len(above)]
        keep = np.sort(np.concatenate([above, equal]))
        token_ids, probabilities = token_ids[keep], probabilities[keep]
    if params.min_p > 0:
        keep = np.flatnonzero(probabilities >= params.min_p * probabilities.max())
        token_ids, probabilities = token_ids[keep], probabilities[keep]
    return token_ids, probabilities / probabilities.sum()


def _top_k(logits: FloatArray, top_k: int) -> IntArray:
    """The ids, ascending, of the `top_k` greatest logits and of all that equal the last of them."""
    token_ids: IntArray | None = None
    num_blocks = len(logits) // _BLOCK
    if top_k <= num_blocks // 2:
        # Each of the top_k greatest maxima of blocks is a logit, so the limit is not below the last of them.
        maxima = logits[: num_blocks * _BLOCK].reshape(num_blocks, _BLOCK).max(axis=1)
        floor = np.partition(maxima, num_blocks - top_k)[num_blocks - top_k]
        token_ids = np.flatnonzero(logits >= floor)
        logits = logits[token_ids]
    limit = np.partition(logits, len(logits) - top_k)[len(logits) - top_k]
    greatest = np.flatnonzero(logits >= limit)
    return greatest if token_ids is None else token_ids[greatest]


def draw(logits: FloatArray, state: SamplingState) -> int:
    """One token from the warped distribution, by a race of exponential clocks (the Gumbel-max trick).

    The token whose clock rings first wins: token i's rings at an exponential time of rate p_i. Each token has
    its own noise, so rounding in the logits (which depends on who else is in the batch) changes the choice
    only where two clocks ring together; inverting a cumulative sum would shift at every token's edge.
    """
    params = state.params
    times = state.generator.standard_exponential(len(logits), dtype=np.float32)
    np.maximum(times, np.finfo(np.float32).tiny, out=times)  # 0 / 0 is no number
    if params.top_p == 1 and params.min_p == 0 and not 0 < params.top_k < len(logits):
        # All tokens may come: the same race without the arrays that a choice among them takes.
        rates = logits - logits.max()
        rates *= np.float32(1 / max(params.temperature, _MIN_TEMPERATURE))
        np.exp(rates, out=rates)
        rates /= times
        return int(rates.argmax())
    token_ids, probabilities = candidates(logits, params)
    return int(token_ids[(probabilities / times[token_ids]).argmax()])


def log_probabilities(logits: FloatArray, token_id: int, num_top: int) -> dict[int, float]:
    """Log-softmax of the logits [V] for a token and the `num_top` likeliest, likeliest first."""
    greatest = float(logits.max())
    log_total = greatest + float(np.log(np.exp(logits - greatest).sum(dtype=np.float64)))
    top: list[int] = []
    if num_top > 0:
        few = np.argpartition(logits, len(logits) - num_top)[len(logits) - num_top :]
        top = few[np.lexsort((few, -logits[few]))].tolist()
    return {i: float(logits[i]) - log_total for i in dict.fromkeys([*top, token_id])}


def sample(logits: FloatArray, states: Sequence[SamplingState]) -> list[Sampled]:
    """Choose a token for each sequence and tell its state.

    Args:
        logits: [N, V] raw logits.
        states: N sequences' states.

    Returns:
        N choices; one whose logits hold NaN, or allow no token, carries an error instead of a token.
    """
    best = logits.argmax(axis=1)  # the lowest index among equals; the first NaN where there is one
    return [_sample_alone(row, state, int(token_id)) for row, state, token_id in zip(logits, states, best, strict=True)]


def _sample_alone(logits: FloatArray, state: SamplingState, best: int) -> Sampled:
    """One choice; its failure is not the batch's."""
    try:
        return _sample_one(logits, state, best)
    except Exception as error:
        logger.exception("sampling failed")
        return Sampled(-1, error=f"sampling failed: {error}.")


def _sample_one(logits: FloatArray, state: SamplingState, best: int) -> Sampled:
    if not np.isfinite(logits[best]):
        return Sampled(-1, error=f"the model's logits are not finite (token {best} has {logits[best]}).")
    scores = logits
    if state.changes_logits:
        scores = state.processed(logits)
        best = int(scores.argmax())
        if not np.isfinite(scores[best]):
            return Sampled(-1, error="bad words and min_tokens forbid every token.")
    token_id = best if state.greedy else draw(scores, state)
    state.append(token_id)
    if state.params.logprobs is None:
        return Sampled(token_id)
    logprobs = log_probabilities(logits, token_id, state.params.logprobs)
    return Sampled(token_id, logprobs[token_id], logprobs)
