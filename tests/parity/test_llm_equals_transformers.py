# SPDX-License-Identifier: Apache-2.0
"""The whole path (checkpoint, engine, paged attention, scheduler, sampler) against `transformers`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_config import Target
from adaptive_k_moe.policy import PolicySet
from adaptive_k_moe.runtime import LLM, KvCacheConfig, SamplingParams

from checkpoints import PLAIN, SHAPES, Shape, make_checkpoint
from reference import (
    NUM_TOKENS,
    assert_is_the_references,
    assert_is_the_references_with_bfloat16_weights,
    reference_model,
)

TARGETS: tuple[Target, ...] = ("openvino", "torch")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_greedy_tokens_of_a_ragged_batch(shape: Shape, target: Target, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", shape)
    # A step of 24 tokens: longer prompts go through in chunks beside the others' decode.
    config = build(checkpoint, tmp_path / "engine", target=target, max_num_tokens=24, max_batch_size=3)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, config.pretrained_config.vocab_size, n).tolist() for n in (1, 33, 7, 64)]
    sampling = SamplingParams(max_tokens=NUM_TOKENS, end_id=-1, return_context_logits=True)
    model = reference_model(checkpoint)
    with LLM(tmp_path / "engine", skip_tokenizer_init=True) as llm:
        outputs = llm.generate(prompts, sampling)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_is_the_references(model, prompt, output)
        assert (output.outputs[0].k == config.pretrained_config.num_experts_per_tok).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("shape", PLAIN, ids=str)
def test_a_fixed_row_below_the_trained_top_k(shape: Shape, k: int, target: Target, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", shape)
    policy = PolicySet.model_validate({"policies": {"lower": {"kind": "fixed", "k": k}}})
    build(checkpoint, tmp_path / "engine", target=target, policy=policy)
    prompt = np.random.default_rng(1).integers(3, 101, 11).tolist()
    sampling = SamplingParams(max_tokens=NUM_TOKENS, end_id=-1, return_context_logits=True, adaptive_k_policy="lower")
    model = reference_model(checkpoint, num_experts_per_tok=k)
    with LLM(tmp_path / "engine", skip_tokenizer_init=True) as llm:
        output = llm.generate(prompt, sampling)
    assert_is_the_references(model, prompt, output)
    assert (output.outputs[0].k == k).all()
    assert output.avg_k == k


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", PLAIN, ids=str)
def test_bfloat16_weights(shape: Shape, target: Target, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "float32", shape)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "bfloat16")
    config = build(tmp_path / "bfloat16", tmp_path / "engine", target=target)
    assert config.pretrained_config.dtype == "bfloat16"
    prompt = np.random.default_rng(2).integers(3, 101, 19).tolist()
    sampling = SamplingParams(max_tokens=NUM_TOKENS, end_id=-1, return_context_logits=True)
    with LLM(tmp_path / "engine", skip_tokenizer_init=True) as llm:
        output = llm.generate(prompt, sampling)
    assert_is_the_references_with_bfloat16_weights(tmp_path / "bfloat16", prompt, output)


@pytest.mark.parametrize("target", TARGETS)
def test_a_mixed_batch_gives_each_request_what_it_gets_alone(target: Target, request: pytest.FixtureRequest) -> None:
    engine_dir = request.getfixturevalue("engine_dir" if target == "openvino" else "torch_engine_dir")
    rng = np.random.default_rng(3)
    prompts = [rng.integers(4, 2000, int(n)).tolist() for n in rng.integers(1, 120, 12)]
    names = ["full", "balanced", "top1", "mass", "relative", None]
    sampling = [
        SamplingParams(
            max_tokens=int(rng.integers(1, 40)),
            end_id=-1,
            adaptive_k_policy=names[index % len(names)],
            temperature=0.8 * (index % 2),
            seed=index,
        )
        for index in range(len(prompts))
    ]
    with LLM(engine_dir) as llm:
        alone = [llm.generate(prompt, s) for prompt, s in zip(prompts, sampling, strict=True)]
    # Few tokens in a step and few KV blocks, so that chunks, waiting and preemption happen.
    with LLM(engine_dir, max_num_tokens=40, kv_cache_config=KvCacheConfig(max_tokens=512)) as llm:
        together = llm.generate(prompts, sampling)
        assert llm.stats().preemptions_total > 0
    for one, other in zip(alone, together, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        np.testing.assert_array_equal(one.outputs[0].k, other.outputs[0].k)
        np.testing.assert_array_equal(one.prompt_k, other.prompt_k)
        np.testing.assert_allclose(one.outputs[0].entropy, other.outputs[0].entropy, atol=1e-4)
