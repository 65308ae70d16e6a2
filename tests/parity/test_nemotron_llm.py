# SPDX-License-Identifier: Apache-2.0
"""Nemotron-H's whole path (checkpoint, engine, paged attention, states in slots, scheduler) against `transformers`."""

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

from nemotron_models import NEMOTRONS, Nemotron, make_nemotron
from reference import (
    NUM_TOKENS,
    assert_is_the_references,
    assert_is_the_references_with_bfloat16_weights,
    reference_model,
)


@pytest.fixture(params=["openvino", "torch"])
def target(request: pytest.FixtureRequest) -> Target:
    found: Target = request.param
    return found


GREEDY = SamplingParams(max_tokens=NUM_TOKENS, end_id=-1, return_context_logits=True)


def random_prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 101, length).tolist() for length in lengths]


@pytest.mark.parametrize("shape", NEMOTRONS, ids=str)
def test_logits_and_greedy_tokens_of_a_ragged_batch(shape: Nemotron, target: Target, tmp_path: Path) -> None:
    checkpoint = make_nemotron(tmp_path / "checkpoint", shape)
    # A step of 24 tokens: longer prompts go through in chunks beside the others' decode.
    config = build(checkpoint, tmp_path / "engine", target=target, max_num_tokens=24, max_batch_size=3)
    prompts = random_prompts(1, 33, 2, 64)
    with LLM(tmp_path / "engine", skip_tokenizer_init=True) as llm:
        outputs = llm.generate(prompts, GREEDY)
    model = reference_model(checkpoint)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_is_the_references(model, prompt, output)
        assert (output.outputs[0].k == config.pretrained_config.num_experts_per_tok).all()


@pytest.mark.parametrize("pattern", ["ME*-ME", "MEM-E"])
def test_preempted_sequences_compute_their_states_again(pattern: str, target: Target, tmp_path: Path) -> None:
    checkpoint = make_nemotron(tmp_path / "checkpoint", Nemotron("preempted", pattern))
    build(checkpoint, tmp_path / "engine", target=target, max_num_tokens=40, max_batch_size=4)
    prompts = random_prompts(20, 45, 3, 31, 60, 17)
    # Room for the longest, and for little more.
    with LLM(tmp_path / "engine", skip_tokenizer_init=True, kv_cache_config=KvCacheConfig(max_tokens=160)) as llm:
        outputs = llm.generate(prompts, GREEDY)
        assert llm.stats().preemptions_total > 0
    model = reference_model(checkpoint)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_is_the_references(model, prompt, output)


def test_generate_with_the_references_own_states(target: Target, tmp_path: Path) -> None:
    """Its cached decode has no limit of the step sizes, so the limit is put where no step reaches it."""
    checkpoint = make_nemotron(tmp_path / "checkpoint", Nemotron("unlimited", "ME*-ME", {"time_step_min": 1e-7}))
    build(checkpoint, tmp_path / "engine", target=target, max_num_tokens=16)
    prompt = random_prompts(37)[0]
    with LLM(tmp_path / "engine", skip_tokenizer_init=True) as llm:
        output = llm.generate(prompt, GREEDY)
    generated = reference_model(checkpoint).generate(
        torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert output.outputs[0].token_ids == generated[0, len(prompt) :].tolist()


@pytest.mark.parametrize("k", [1, 2])
def test_a_fixed_row_below_the_trained_top_k(k: int, target: Target, tmp_path: Path) -> None:
    checkpoint = make_nemotron(tmp_path / "checkpoint")
    policy = PolicySet.model_validate({"default": "lower", "policies": {"lower": {"kind": "fixed", "k": k}}})
    build(checkpoint, tmp_path / "engine", target=target, policy=policy)
    prompts = random_prompts(11, 5)
    with LLM(tmp_path / "engine", skip_tokenizer_init=True) as llm:
        outputs = llm.generate(prompts, GREEDY)
    model = reference_model(checkpoint, num_experts_per_tok=k)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_is_the_references(model, prompt, output)
        assert (output.outputs[0].k == k).all()


def test_bfloat16_weights(target: Target, tmp_path: Path) -> None:
    checkpoint = make_nemotron(tmp_path / "float32")
    transformers.NemotronHForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "bfloat16"
    )
    config = build(tmp_path / "bfloat16", tmp_path / "engine", target=target)
    assert config.pretrained_config.dtype == "bfloat16"
    prompts = random_prompts(9, 40)
    with LLM(tmp_path / "engine", skip_tokenizer_init=True) as llm:
        outputs = llm.generate(prompts, GREEDY)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_is_the_references_with_bfloat16_weights(tmp_path / "bfloat16", prompt, output)


def test_a_mixed_batch_gives_each_request_what_it_gets_alone(target: Target, tmp_path: Path) -> None:
    policies = {
        "balanced": {"kind": "entropy", "thresholds": [2.0], "k": [1, 3]},
        "top1": {"kind": "fixed", "k": 1},
        "relative": {"kind": "ratio", "ratio": 0.9},
    }
    checkpoint = make_nemotron(tmp_path / "checkpoint")
    build(checkpoint, tmp_path / "engine", target=target, policy=PolicySet.model_validate({"policies": policies}))
    rng = np.random.default_rng(3)
    prompts = random_prompts(*rng.integers(1, 90, 9).tolist())
    sampling = [
        SamplingParams(
            max_tokens=int(rng.integers(1, 40)),
            end_id=-1,
            adaptive_k_policy=["full", *policies][index % 4],
            temperature=0.8 * (index % 2),
            seed=index,
        )
        for index in range(len(prompts))
    ]
    with LLM(tmp_path / "engine", skip_tokenizer_init=True) as llm:
        alone = [llm.generate(prompt, s) for prompt, s in zip(prompts, sampling, strict=True)]
        # A slot that another request left, and one that is in use beside it.
        again = llm.generate(prompts, sampling)
    cache = KvCacheConfig(max_tokens=192)
    with LLM(tmp_path / "engine", skip_tokenizer_init=True, max_num_tokens=20, kv_cache_config=cache) as llm:
        together = llm.generate(prompts, sampling)
    for others in (again, together):
        for one, other in zip(alone, others, strict=True):
            assert one.outputs[0].token_ids == other.outputs[0].token_ids
            np.testing.assert_array_equal(one.outputs[0].k, other.outputs[0].k)
            np.testing.assert_array_equal(one.prompt_k, other.prompt_k)
            np.testing.assert_allclose(one.outputs[0].entropy, other.outputs[0].entropy, atol=1e-4)
