# SPDX-License-Identifier: Apache-2.0
"""What an engine of the target "tensorrt" must do, on a GPU (tests/gpu) and on the fake one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from adaptive_k_moe.runtime import LLM, SamplingParams

NUM_TOKENS = 64
LENGTHS = (1, 33, 7, 64, 2)
"""Prompts: more than there are slots, and longer ones that go through in chunks beside the others' decode."""


def assert_answers_equal_transformers(engine_dir: Path, checkpoint: Path, *, tolerance: float) -> None:
    """Logits of every prompt token, and 64 greedy tokens, against `transformers` in float32.

    Args:
        engine_dir: the engine.
        checkpoint: what it was built from.
        tolerance: of logits, as a share of the largest. A greedy token may be another than the reference's only
            where both are that near each other.
    """
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    sampling = SamplingParams(max_tokens=NUM_TOKENS, end_id=-1, return_context_logits=True)
    with LLM(engine_dir, skip_tokenizer_init=True) as llm:
        pretrained = llm.config.pretrained_config
        prompts = [rng.integers(3, pretrained.vocab_size, length).tolist() for length in LENGTHS]
        outputs = llm.generate(prompts, sampling)
        assert llm.stats().preemptions_total == 0
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.error is None
        answer = output.outputs[0]
        assert len(answer.token_ids) == NUM_TOKENS
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer.token_ids]), use_cache=False).logits[0].numpy()
        allowed = tolerance * np.abs(logits).max()
        assert np.abs(output.context_logits - logits[: len(prompt)]).max() <= allowed
        rows = logits[len(prompt) - 1 : -1]
        chosen = np.take_along_axis(rows, np.array(answer.token_ids)[:, None], -1)[:, 0]
        assert (rows.max(-1) - chosen).max() <= 2 * allowed
        assert (answer.k == pretrained.num_experts_per_tok).all()
        assert (output.prompt_k == pretrained.num_experts_per_tok).all()


def assert_policies_are_followed(engine_dir: Path) -> None:
    """Requests under all of `gpu_engines.POLICIES` at once: each k follows from its entropy by the request's rule."""
    prompt = np.random.default_rng(1).integers(3, 101, 20).tolist()
    names = ["one", "two", "mixed", "full", "mixed", "one"]
    with LLM(engine_dir, skip_tokenizer_init=True) as llm:
        full = llm.config.pretrained_config.num_experts_per_tok
        outputs = llm.generate(
            [prompt] * len(names), [SamplingParams(max_tokens=16, end_id=-1, adaptive_k_policy=name) for name in names]
        )
    seen = set()
    for name, output in zip(names, outputs, strict=True):
        assert output.error is None
        k = np.concatenate([output.prompt_k, output.outputs[0].k[1:]])
        entropy = np.concatenate([output.prompt_entropy, output.outputs[0].entropy[1:]])
        if name == "mixed":
            np.testing.assert_array_equal(k, 1 + np.searchsorted([1.0, 1.4], entropy, side="right"))
            seen.update(k.ravel().tolist())
        else:
            assert (k == {"one": 1, "two": 2, "full": full}[name]).all()
    assert seen == {1, 2, 3}
