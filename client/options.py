# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for, by the names of the served model's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or a conversation for the model's chat template: ``[{"role": "user", "content": "…"}, …]``."""


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate`; one that is left out, or None, is the server's default.

    Attributes:
        max_tokens: most tokens to generate (default 32).
        adaptive_k_policy: name of the engine's policy that decides k.
        user: whose request it is: where the server runs an A/B test, all requests of a user have one variant.
        temperature: divides the logits; 0, or no sampling option at all, is greedy.
        top_k: sample among so many likeliest tokens.
        top_p: sample among the fewest tokens that reach this probability, in (0, 1].
        seed: of the request's own random generator.
        stop: strings that end the answer.
        bad: strings that must not be generated.
        end_id: token that ends the answer; -1 is none.
        min_tokens: no end before so many tokens.
        repetition_penalty: above 1 makes seen tokens less likely.
        presence_penalty: subtracted from the logits of tokens in the answer.
        frequency_penalty: subtracted once for each time that a token is in the answer.
        return_k: return k and entropy of each token and layer (default True).
        return_log_probs: return the tokens' log-probabilities.
        chat_template_kwargs: what else the model's chat template knows, such as `tools` or `enable_thinking`; for
            a conversation.
        request_id: names the request in the server's logs and spans; it need not be unique.
        timeout: seconds that the whole answer may take; None is the client's.
    """

    max_tokens: int
    adaptive_k_policy: str | None
    user: str | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    bad: str | Sequence[str] | None
    end_id: int | None
    min_tokens: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    return_k: bool
    return_log_probs: bool
    chat_template_kwargs: Mapping[str, Any] | None
    request_id: str | None
    timeout: float | None
