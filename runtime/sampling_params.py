# SPDX-License-Identifier: Apache-2.0
"""What a request may ask of sampling; names and meanings are those of TensorRT-LLM's `SamplingParams`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adaptive_k_moe.arguments import check_fields
from adaptive_k_moe.errors import RequestError
from adaptive_k_moe.request_options import DEFAULT_MAX_TOKENS

MAX_N = 256
"""Most sequences of one prompt: each has memory of its own from the start, and one request must not take all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen.

    Attributes:
        max_tokens: most tokens to generate, at least 1.
        temperature: divides the logits; 0 (the default) is greedy.
        top_k: sample among the `top_k` likeliest tokens; 0 is all of them, 1 is greedy.
        top_p: sample among the fewest tokens whose probability reaches `top_p`, in (0, 1].
        min_p: drop tokens whose probability is below `min_p` times the likeliest one's, in [0, 1].
        repetition_penalty: > 0; divides positive and multiplies negative logits of tokens seen in the
            prompt or the answer; 1 is none.
        presence_penalty: subtracted from the logits of tokens in the answer so far.
        frequency_penalty: subtracted once for each time that a token is in the answer so far.
        min_tokens: no end token and no stop string before so many generated tokens.
        seed: of this request's own generator; without one it is drawn at random.
        n: sequences to generate from the prompt, each with its own generator; at most `MAX_N`.
        stop: strings that end the answer; the answer does not hold them unless
            `include_stop_str_in_output`. A list of token ids in the place of a string ends it after these tokens.
        stop_token_ids: tokens that end the answer, besides `end_id`.
        bad: strings that must not be generated (as token sequences), or lists of token ids.
        logit_bias: added to the logits of token ids, before anything else acts on them. A text in the place of an
            id stands for each of its tokens, as in `embedding_bias_words` of TensorRT-LLM's Triton models.
        end_id: the token that ends an answer; None is the model's own, -1 is none.
        pad_id: accepted for compatibility; nothing is padded.
        logprobs: number of likeliest tokens whose log-probabilities are returned with each token;
            0 is the chosen token's alone, None is nothing.
        prompt_logprobs: number of likeliest tokens whose log-probabilities are returned in the place of each
            prompt token after the first; 0 is the prompt's own token alone, None is nothing.
        return_context_logits: return the logits of every prompt token.
        return_generation_logits: return the logits that each generated token was chosen from.
        exclude_input_from_output: leave the prompt out of the answer's text and token ids.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string that ended the answer.
        add_special_tokens: let the tokenizer add its special tokens (such as BOS) to a text prompt.
        adaptive_k_policy: name of the engine's policy that this request's tokens follow; None is the
            engine's default.

    Raises:
        RequestError: a value is of a wrong type or outside its range.
    """

    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    seed: int | None = None
    n: int = 1
    stop: str | Sequence[str | Sequence[int]] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad: str | Sequence[str | Sequence[int]] | None = None
    logit_bias: Mapping[int | str, float] | None = None
    end_id: int | None = None
    pad_id: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_context_logits: bool = False
    return_generation_logits: bool = False
    exclude_input_from_output: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    add_special_tokens: bool = True
    adaptive_k_policy: str | None = None

    def __post_init__(self) -> None:
        # A value of a wrong type must be refused here: later it would end others' requests, too.
        check_fields(self, RequestError)
        self._check("max_tokens", self.max_tokens >= 1, "at least 1")
        self._check("temperature", self.temperature >= 0, "0 (greedy) or more")
        self._check("top_k", self.top_k >= 0, "0 (all tokens) or more")
        self._check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._check("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        self._check("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 is none)")
        self._check("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens")
        self._check("n", 1 <= self.n <= MAX_N, f"between 1 and {MAX_N}")
        self._check("logprobs", self.logprobs is None or self.logprobs >= 0, "0 or more")
        self._check("prompt_logprobs", self.prompt_logprobs is None or self.prompt_logprobs >= 0, "0 or more")
        self._check("seed", self.seed is None or 0 <= self.seed < 2**64, "between 0 and 2**64 - 1")
        for name in ("stop", "bad"):
            self._check(name, all(len(word) for word in _as_tuple(getattr(self, name))), "words that are not empty")

    def _check(self, name: str, fine: bool, expected: str) -> None:
        if not fine:
            raise RequestError(f"{name} is {getattr(self, name)!r}: it must be {expected}.")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, with no randomness."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings in `stop`."""
        return tuple(word for word in _as_tuple(self.stop) if isinstance(word, str))

    @property
    def stop_words(self) -> tuple[tuple[int, ...], ...]:
        """The lists of token ids in `stop`."""
        return _token_words(self.stop)

    @property
    def bad_strings(self) -> tuple[str, ...]:
        """The strings in `bad`."""
        return tuple(word for word in _as_tuple(self.bad) if isinstance(word, str))

    @property
    def bad_words(self) -> tuple[tuple[int, ...], ...]:
        """The lists of token ids in `bad`."""
        return _token_words(self.bad)


def _as_tuple(words: str | Sequence[str | Sequence[int]] | None) -> tuple[str | Sequence[int], ...]:
    if words is None:
        return ()
    return (words,) if isinstance(words, str) else tuple(words)


def _token_words(words: str | Sequence[str | Sequence[int]] | None) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(i) for i in word) for word in _as_tuple(words) if not isinstance(word, str))
