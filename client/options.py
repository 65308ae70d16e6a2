# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for, by the names of the served model's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from adaptive_k_moe.request_options import DEFAULT_MAX_TOKENS, OPTIONS_BY_NAME

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or a conversation for the model's chat template: ``[{"role": "user", "content": "…"}, …]``."""


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate`; one that is left out, or None, is the server's default."""

    max_tokens: int
    adaptive_k_policy: str | None
    user: str | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    bad: str | Sequence[str] | None
    logit_bias: Mapping[str, float] | None
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


_OF_THE_CALL = {
    "request_id": "names the request in the server's logs and spans; it need not be unique",
    "timeout": "seconds that the whole answer may take; None is the client's",
}
_MEANINGS = {name: option.help for name, option in OPTIONS_BY_NAME.items()} | _OF_THE_CALL
_MEANINGS["max_tokens"] += f"; {DEFAULT_MAX_TOKENS} by default"
_MEANINGS["return_k"] += "; True by default"
GenerateOptions.__doc__ = "\n".join(
    [
        f"{GenerateOptions.__doc__}\n\nAttributes:",
        *(f"    {name}: {_MEANINGS[name]}." for name in GenerateOptions.__annotations__),
    ]
)
