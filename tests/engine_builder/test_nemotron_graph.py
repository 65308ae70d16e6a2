# SPDX-License-Identifier: Apache-2.0
"""Nemotron-H as an ONNX graph with its function bodies, run by a plain ONNX Runtime, against `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers

from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_config import EngineConfig
from adaptive_k_moe.policy import PolicySet

from nemotron_models import NEMOTRONS, Nemotron, make_nemotron


def run_graph(
    engine_dir: Path, config: EngineConfig, ids: np.ndarray, policy: str = "full", splits: tuple[int, ...] = ()
) -> dict[str, np.ndarray]:
    """Logits, k and entropies of all tokens [B, S]; steps end at `splits` and hand caches and states on."""
    session = ort.InferenceSession(engine_dir / "model.onnx", providers=["CPUExecutionProvider"])
    tables, model = config.policy_tables(), config.pretrained_config
    batch, length = ids.shape
    names = [output.name for output in session.get_outputs()]
    cache: dict[str, Any] = {}
    for layer in model.attention_layers:
        for kind in ("key", "value"):
            empty = np.zeros((batch, model.num_key_value_heads, 0, model.head_dim), np.float32)
            cache[f"past_key_values.{layer}.{kind}"] = empty
    # One slot more than there are sequences; what lies there at first must not matter.
    for layer in model.mamba.layers if model.mamba else ():
        cache[f"conv_state.{layer}"] = np.full((batch + 1, *model.mamba.conv_state_shape), np.nan, np.float32)
        cache[f"ssm_state.{layer}"] = np.full((batch + 1, *model.mamba.ssm_state_shape), np.nan, np.float32)
    parts = []
    for begin, end in zip((0, *splits), (*splits, length), strict=True):
        tokens = batch * (end - begin)
        feed = {
            "input_ids": ids[:, begin:end],
            "position_ids": np.tile(np.arange(begin, end), (batch, 1)),
            "logits_indices": np.arange(tokens),
            "policy_index": np.full(tokens, tables.index(policy), np.int32),
            "policy_kind": tables.policy_kind,
            "thresholds": tables.thresholds,
            "k_values": tables.k_values,
            "expert_norms": tables.expert_norms,
            "past_lens": np.full(batch, begin, np.int32),
            "subsequence_begins": np.arange(batch + 1, dtype=np.int32) * (end - begin),
            "state_slots": np.arange(batch, 0, -1, dtype=np.int32),
            **cache,
        }
        taken = {port.name for port in session.get_inputs()}
        found = session.run(None, {name: value for name, value in feed.items() if name in taken})
        outputs = dict(zip(names, found, strict=True))
        cache = {
            name: outputs[name.replace("past_key_values", "present") if "key_values" in name else f"present_{name}"]
            for name in cache
        }
        parts.append({n: outputs[n].reshape(batch, end - begin, -1) for n in ("logits", "k", "entropy")})
    return {name: np.concatenate([part[name] for part in parts], 1) for name in parts[0]}


def reference_logits(checkpoint: Path, ids: np.ndarray, **changes: Any) -> np.ndarray:
    model = transformers.NemotronHForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, **changes)
    with torch.no_grad():
        # With a cache, transformers 5.23 asks an attention layer for its length, and some models have none.
        return model.eval()(torch.tensor(ids), use_cache=False).logits.numpy()


def assert_close(logits: np.ndarray, reference: np.ndarray) -> None:
    assert np.abs(logits - reference).max() <= 1e-4 * np.abs(reference).max()


@pytest.mark.parametrize("shape", NEMOTRONS, ids=str)
def test_logits_equal_transformers(shape: Nemotron, tmp_path: Path) -> None:
    checkpoint = make_nemotron(tmp_path / "checkpoint", shape)
    config = build(checkpoint, tmp_path / "engine", target="onnx")
    onnx.checker.check_model(tmp_path / "engine" / "model.onnx", full_check=False)
    ids = np.random.default_rng(0).integers(0, 101, (2, 50))  # more than three of the reference's chunks
    reference = reference_logits(checkpoint, ids)
    assert_close(run_graph(tmp_path / "engine", config, ids)["logits"], reference)
    assert_close(run_graph(tmp_path / "engine", config, ids, splits=(2, 31, 32, 33))["logits"], reference)


@pytest.mark.parametrize("k", [1, 2])
def test_a_lower_fixed_k_equals_transformers_with_a_lower_top_k(k: int, tmp_path: Path) -> None:
    checkpoint = make_nemotron(tmp_path / "checkpoint")
    policy = PolicySet.model_validate({"policies": {"lower": {"kind": "fixed", "k": k}}})
    config = build(checkpoint, tmp_path / "engine", target="onnx", policy=policy)
    ids = np.random.default_rng(1).integers(0, 101, (2, 20))
    outputs = run_graph(tmp_path / "engine", config, ids, "lower")
    assert_close(outputs["logits"], reference_logits(checkpoint, ids, num_experts_per_tok=k))
    assert (outputs["k"] == k).all()


def test_both_layouts_give_the_same_graph_and_weights(tmp_path: Path) -> None:
    for fused in (False, True):
        checkpoint = make_nemotron(tmp_path / f"checkpoint-{fused}", fused=fused)
        build(checkpoint, tmp_path / f"engine-{fused}", target="onnx")
    files = [
        tmp_path / f"engine-{fused}" / name for name in ("model.onnx", "model.onnx.data") for fused in (False, True)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[2].read_bytes() == files[3].read_bytes()
