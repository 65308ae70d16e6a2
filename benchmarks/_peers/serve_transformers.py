# SPDX-License-Identifier: Apache-2.0
"""`transformers` with one of its implementations of experts."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers

from worker import serve


class Transformers:
    def __init__(self, settings: dict[str, Any]) -> None:
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(settings["threads"])
        self.vocab_size = settings["vocab_size"]
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            settings["model"],
            dtype=getattr(torch, settings["dtype"]),
            experts_implementation=settings["experts"],
        ).eval()

    def tokens(self, batch: int, count: int) -> torch.Tensor:
        return torch.randint(3, self.vocab_size, (batch, count))

    @torch.no_grad()
    def prefill(self, tokens: int) -> float:
        ids = self.tokens(1, tokens)
        start = time.perf_counter()
        self.model(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        return tokens / (time.perf_counter() - start)

    @torch.no_grad()
    def decode(self, batch: int, prompt: int, tokens: int) -> float:
        output = self.model(self.tokens(batch, prompt), use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(tokens):
            output.logits.argmax(-1)
            # Random tokens: those that a random model likes are few, and so are the experts that they choose.
            output = self.model(self.tokens(batch, 1), past_key_values=output.past_key_values, use_cache=True)
        return batch * tokens / (time.perf_counter() - start)


serve(
    lambda settings: (
        Transformers(settings),
        {"transformers": transformers.__version__, "torch": torch.__version__},
    )
)
