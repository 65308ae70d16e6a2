# SPDX-License-Identifier: Apache-2.0
"""`LLM` over the session on a GPU, from the engine directory to the tokens, against `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_checks import assert_answers_equal_transformers, assert_policies_are_followed
from fake_gpu import Gpu
from gpu_engines import make_engine

from checkpoints import Shape, make_checkpoint
from nemotron_models import Nemotron, make_nemotron

SIZES: dict[str, Any] = {"max_batch_size": 3, "max_seq_len": 160, "max_num_tokens": 24}
STATES = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2}
SHAPES = [
    Shape("plain"),
    Shape("shared expert, dense layer", {"mlp_only_layers": [0]}, "qwen2_moe"),
    Shape("norms of heads, window", {"sliding_window": 9, "use_sliding_window": True}, "qwen3_moe"),
    Shape("clipped", {"clip_qkv": 0.7}, "olmoe"),
    Nemotron("every kind of layer", "ME*-ME", STATES),
    Nemotron("no attention, states of no round size", "MEM-E"),
    Nemotron("experts alone", "E"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_greedy_tokens_of_a_ragged_batch(shape: Shape | Nemotron, tmp_path: Path) -> None:
    make = make_nemotron if isinstance(shape, Nemotron) else make_checkpoint
    checkpoint = make(tmp_path / "checkpoint", shape)
    make_engine(checkpoint, tmp_path / "engine", **SIZES)
    with Gpu().installed() as gpu:
        assert_answers_equal_transformers(tmp_path / "engine", checkpoint, tolerance=1e-4)
        assert gpu.counts["cudaGraphLaunch"] > 20


def test_policies_of_requests_in_one_batch(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Shape("plain"))
    make_engine(checkpoint, tmp_path / "engine", **SIZES)
    with Gpu().installed():
        assert_policies_are_followed(tmp_path / "engine")


def test_float16(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Shape("heads of 16", {"head_dim": 16}))
    make_engine(checkpoint, tmp_path / "engine", dtype="float16", **SIZES)
    with Gpu().installed():
        assert_answers_equal_transformers(tmp_path / "engine", checkpoint, tolerance=1e-2)
