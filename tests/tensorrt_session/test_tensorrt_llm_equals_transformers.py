# SPDX-License-Identifier: Apache-2.0
"""`LLM` over the session on a GPU, from the engine directory to the tokens, against `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from fake_gpu import Gpu
from gpu_engines import make_engine

from adaptive_k_moe.runtime import LLM, SamplingParams

from checkpoints import Shape, make_checkpoint

NUM_TOKENS = 64
SIZES: dict[str, Any] = {"max_batch_size": 3, "max_seq_len": 160, "max_num_tokens": 24}
SHAPES = [
    Shape("plain"),
    Shape("shared expert, dense layer", {"mlp_only_layers": [0]}, "qwen2_moe"),
    Shape("norms of heads", {}, "qwen3_moe"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_greedy_tokens_of_a_ragged_batch(shape: Shape, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", shape)
    config = make_engine(checkpoint, tmp_path / "engine", **SIZES)
    rng = np.random.default_rng(0)
    # More than fit at a time; the long ones go through in chunks beside the others' decode.
    prompts = [rng.integers(3, config.pretrained_config.vocab_size, n).tolist() for n in (1, 33, 7, 64, 2)]
    sampling = SamplingParams(max_tokens=NUM_TOKENS, end_id=-1, return_context_logits=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with Gpu().installed() as gpu, LLM(tmp_path / "engine", skip_tokenizer_init=True) as llm:
        outputs = llm.generate(prompts, sampling)
        assert llm.stats().preemptions_total == 0
    assert gpu.counts["cudaGraphLaunch"] > 20
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.error is None
        with torch.no_grad():
            logits = model(torch.tensor([prompt + output.outputs[0].token_ids])).logits[0].numpy()
        expected = logits[: len(prompt)]
        assert np.abs(output.context_logits - expected).max() <= 1e-4 * np.abs(expected).max()
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == output.outputs[0].token_ids
        assert (output.outputs[0].k == config.pretrained_config.num_experts_per_tok).all()
