# SPDX-License-Identifier: Apache-2.0
"""An answer on its way to the browser: the client's chunks as server-sent events."""

from __future__ import annotations

import json
import math
import time
from collections.abc import AsyncIterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from adaptive_k_moe.client import AsyncClient, Chunk
from adaptive_k_moe.errors import ClientError


class Question(BaseModel):
    """What the page asks for.

    Attributes:
        prompt: text to go on from.
        policy: name of the policy; None leaves it to the server.
        max_tokens: most tokens.
        temperature: 0 is greedy.
        seed: of the request's random generator; what a browser's numbers hold exactly.
        chat: whether the prompt is a user's message, for the model's chat template.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field(min_length=1)
    policy: str | None = None
    max_tokens: int = Field(default=128, ge=1, le=1 << 20)
    temperature: float = Field(default=0.0, ge=0, le=100)
    seed: int = Field(default=0, ge=0, lt=1 << 53)
    chat: bool = False


async def stream_answer(client: AsyncClient, question: Question) -> AsyncIterator[str]:
    """The events of one answer: `piece` for each chunk, then `end`, or `failure` with a sentence.

    Times are seconds since the request was sent, by this process's clock.
    """
    started = time.perf_counter()
    stream = client.generate(
        [{"role": "user", "content": question.prompt}] if question.chat else question.prompt,
        stream=True,
        adaptive_k_policy=question.policy,
        max_tokens=question.max_tokens,
        temperature=question.temperature,
        seed=question.seed,
    )
    async with stream:
        try:
            async for chunk in stream:
                yield _event("piece", {**_piece(chunk), "seconds": time.perf_counter() - started})
        except ClientError as error:
            yield _event("failure", {"message": str(error)})
            return
    yield _event("end", {"seconds": time.perf_counter() - started})


def _piece(chunk: Chunk) -> dict[str, Any]:
    """A chunk as JSON: k and entropy are [n, L]; an entropy that is no number is null."""
    return {
        "text": chunk.text,
        "tokens": chunk.num_output_tokens,
        "prompt_tokens": chunk.num_input_tokens,
        "k": [] if chunk.k is None else chunk.k.tolist(),
        "entropy": [] if chunk.entropy is None else [[_number(nats) for nats in row] for row in chunk.entropy.tolist()],
        "avg_k": _number(chunk.avg_k),
        "compute_saved_ratio": _number(chunk.compute_saved_ratio),
        "avg_reads": None if chunk.avg_reads is None else _number(chunk.avg_reads),
        "reads_per_token": None if chunk.reads_per_token is None else _number(chunk.reads_per_token),
        "followed": chunk.followed,
        "variant": chunk.variant,
    }


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _event(name: str, data: dict[str, Any]) -> str:
    # JSON escapes line ends, which would end the event.
    return f"event: {name}\ndata: {json.dumps(data, allow_nan=False)}\n\n"
