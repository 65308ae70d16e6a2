# SPDX-License-Identifier: Apache-2.0
"""This project's engine, at the model's own top-k."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import numpy as np

from adaptive_k_moe.runtime import LLM, Observer, SamplingParams, StepRecord

from worker import full_batch_rate, serve


class FullBatches(Observer):
    """When the steps ended in which `batch` sequences decoded and nothing else was computed."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.times: list[float] = []

    def on_step(self, record: StepRecord) -> None:
        if record.num_prefill_tokens == 0 and record.num_decode_tokens == self.batch:
            self.times.append(time.perf_counter())


class AdaptiveK:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.vocab_size = settings["vocab_size"]
        self.llm = LLM(settings["model"], skip_tokenizer_init=True, num_threads=settings["threads"])
        self.rng = np.random.default_rng(0)

    def prompts(self, count: int, tokens: int) -> list[list[int]]:
        return [self.rng.integers(3, self.vocab_size, tokens).tolist() for _ in range(count)]

    def prefill(self, tokens: int) -> float:
        start = time.perf_counter()
        self.llm.generate(self.prompts(1, tokens), SamplingParams(max_tokens=1, end_id=-1))
        return tokens / (time.perf_counter() - start)

    def decode(self, batch: int, prompt: int, tokens: int) -> float:
        steps = FullBatches(batch)
        self.llm.add_observer(steps)
        # The first sequences decode while the last are prefilled: with `batch` tokens more, all decode together long
        # enough.
        params = SamplingParams(max_tokens=tokens + batch, end_id=-1, temperature=1.0)
        self.llm.generate(self.prompts(batch, prompt), params)
        self.llm.remove_observer(steps)
        return full_batch_rate(steps.times[: tokens + 1], batch)


serve(lambda settings: (AdaptiveK(settings), {"adaptive-k-moe": version("adaptive-k-moe")}))
