# SPDX-License-Identifier: Apache-2.0
"""Engines with int8 and int4 weights on a CPU, against `transformers` with the same weights rounded by other code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_config import Target
from adaptive_k_moe.model_config import Dtype, QuantAlgo
from adaptive_k_moe.runtime import LLM, SamplingParams

from checkpoints import Shape, make_checkpoint
from nemotron_models import Nemotron, make_nemotron
from reference import NUM_TOKENS, assert_is_the_references, reference_model
from rounded_models import NEMOTRON, PRECISIONS, SHAPES, quantise_reference

GREEDY = SamplingParams(max_tokens=NUM_TOKENS, end_id=-1, return_context_logits=True)


def assert_engine_equals_transformers(
    checkpoint: Path, precision: tuple[str, int, int | None], dtype: Dtype, target: Target = "openvino"
) -> None:
    _, bits, group = precision
    engine = checkpoint.with_name("engine")
    # A step of 24 tokens: longer prompts go through in chunks beside the others' decode.
    # A16: the activations are the reference's.
    algorithm: QuantAlgo = "W8A16" if bits == 8 else "W4A16"
    sizes = {"group_size": group, "max_num_tokens": 24, "max_batch_size": 3}
    config = build(checkpoint, engine, target=target, quant_algo=algorithm, **sizes)
    assert config.pretrained_config.dtype == dtype
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, config.pretrained_config.vocab_size, n).tolist() for n in (1, 33, 7, 64)]
    model = reference_model(checkpoint)
    quantise_reference(bits, group, getattr(torch, dtype), model, vocabulary=target == "openvino")
    with LLM(engine, skip_tokenizer_init=True) as llm:
        outputs = llm.generate(prompts, GREEDY)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_is_the_references(model, prompt, output)


def make(directory: Path, shape: Shape | Nemotron) -> Path:
    return make_nemotron(directory, shape) if isinstance(shape, Nemotron) else make_checkpoint(directory, shape)


@pytest.mark.parametrize("target", ["openvino", "torch"])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, NEMOTRON], ids=str)
def test_logits_and_greedy_tokens_of_a_ragged_batch(
    shape: Shape | Nemotron, precision: tuple[str, int, int | None], target: Target, tmp_path: Path
) -> None:
    assert_engine_equals_transformers(make(tmp_path / "checkpoint", shape), precision, "float32", target)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[2], NEMOTRON], ids=str)
def test_so_do_those_with_bfloat16_scales(
    shape: Shape | Nemotron, precision: tuple[str, int, int | None], tmp_path: Path
) -> None:
    whole = make(tmp_path / "float32", shape)
    half = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "bfloat16")
    assert_engine_equals_transformers(tmp_path / "bfloat16", precision, "bfloat16")
