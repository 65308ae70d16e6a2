# SPDX-License-Identifier: Apache-2.0
"""Routers' entropies by hooks on `transformers` and from the engine, for every family, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from adaptive_k_moe.calibration.entropy import BITS
from adaptive_k_moe.calibration.evaluator import Evaluator
from adaptive_k_moe.calibration.hooks import HookedModel
from adaptive_k_moe.calibration.validation import check_agreement, engine_entropies, hook_entropies
from adaptive_k_moe.calibration.windows import Windows
from adaptive_k_moe.cli import main
from adaptive_k_moe.engine_builder import build

from checkpoints import PLAIN, Shape, make_checkpoint


def both_ways(checkpoint: Path, engine_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Entropies of random tokens by hooks and from an engine."""
    build(checkpoint, engine_dir, dtype="float32", max_seq_len=64)
    (engine_dir / "tokenizer.json").write_text(_TOKENIZER)
    # More windows than the engine takes in a step.
    tokens = np.random.default_rng(0).integers(3, 60, size=(20, 24))
    windows = Windows(tokens, 1, np.zeros(len(tokens), np.int64), ["random"])
    hooks = hook_entropies(HookedModel(checkpoint), windows)
    with Evaluator(engine_dir) as evaluator:
        return hooks, engine_entropies(evaluator, windows)


@pytest.mark.parametrize("shape", PLAIN, ids=str)
def test_hooks_and_engine_agree_for_every_family(shape: Shape, tmp_path: Path) -> None:
    hooks, engine = both_ways(make_checkpoint(tmp_path / "checkpoint", shape), tmp_path / "engine")
    assert check_agreement(hooks, engine) < 1e-4
    assert hooks.std() > 0.01  # agreeing on a constant would say nothing


def test_hooks_and_engine_agree_for_nemotron(tmp_path: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.NemotronHConfig(
        vocab_size=67,
        hidden_size=32,
        hybrid_override_pattern="ME*E",
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        n_routed_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        mamba_num_heads=2,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
        intermediate_size=24,
        initializer_range=0.2,
    )
    transformers.NemotronHForCausalLM(config).save_pretrained(tmp_path / "checkpoint")
    hooks, engine = both_ways(tmp_path / "checkpoint", tmp_path / "engine")
    assert hooks.shape[-1] == 2
    assert check_agreement(hooks, engine) < 1e-4


def test_the_command_on_the_bundled_model(
    checkpoint_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = tmp_path / "own.txt", tmp_path / "validation.json"
    text.write_text((checkpoint_dir / "heldout.txt").read_text(encoding="utf-8")[:2000], encoding="utf-8")
    command = f"validate --checkpoint_dir {checkpoint_dir} --text own={text} --window 32 --output {output}"
    assert main([*command.split(), "--thresholds", "1.5", "--k", "1", "2"]) == 0
    printed = capsys.readouterr().out
    assert "reported by others" in printed and "differ by at most" in printed
    content = json.loads(output.read_text())
    assert content["hooks_and_engine_differ_bits"] < 1e-3
    (row,) = content["sets"]
    assert row["set"] == "own" and len(row["layers"]) == 6
    assert 0 < row["entropy_bits"]["low"] < row["entropy_bits"]["high"] < np.log(8) * BITS
    assert 1 <= row["effective_k"]["value"] <= 2
    assert row["savings"]["value"] == pytest.approx(1 - row["effective_k"]["value"] / 2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--text", "nothing"], "--text takes NAME=FILE"),
        (["--thresholds", "1.5"], "--thresholds and --k belong together"),
        (["--thresholds", "3.5", "--k", "1", "2", "--no_engine"], "no entropy of 8 experts reaches"),
        (["--thresholds", "1.5", "--k", "1", "2", "--unit", "bytes", "--no_engine"], "the unit 'bytes'"),
        (["--window", "100000"], "fewer than the"),
    ],
)
def test_refusals_are_one_line(
    checkpoint_dir: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    assert main(["validate", "--checkpoint_dir", str(checkpoint_dir), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("adaptive-k: error: ") and sentence in error and error.count("\n") == 1


_TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
    }
)
