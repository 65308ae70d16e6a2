# SPDX-License-Identifier: Apache-2.0
"""The ONNX graph with its function body, run by a plain ONNX Runtime, against `transformers`."""

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
from adaptive_k_moe.engine_config import EngineConfig, read_engine_config
from adaptive_k_moe.policy import PolicySet

from checkpoints import SHAPES, Shape, make_mixtral


def run_graph(
    engine_dir: Path, config: EngineConfig, ids: np.ndarray, policy: str = "full", split: int | None = None
) -> dict[str, np.ndarray]:
    """Logits, k and entropies of all tokens; with `split` the first tokens go ahead into the cache."""
    session = ort.InferenceSession(engine_dir / "model.onnx", providers=["CPUExecutionProvider"])
    tables, model = config.policy_tables(), config.pretrained_config
    batch, length = ids.shape
    names = [output.name for output in session.get_outputs()]
    past: dict[str, Any] = {
        f"past_key_values.{layer}.{kind}": np.zeros((batch, model.num_key_value_heads, 0, model.head_dim), np.float32)
        for layer in range(model.num_hidden_layers)
        for kind in ("key", "value")
    }
    parts = []
    for begin, end in [(0, length)] if split is None else [(0, split), (split, length)]:
        tokens = batch * (end - begin)
        outputs = dict(
            zip(
                names,
                session.run(
                    None,
                    {
                        "input_ids": ids[:, begin:end],
                        "position_ids": np.tile(np.arange(begin, end), (batch, 1)),
                        "logits_indices": np.arange(tokens),
                        "policy_index": np.full(tokens, tables.index(policy), np.int32),
                        "policy_kind": tables.policy_kind,
                        "thresholds": tables.thresholds,
                        "k_values": tables.k_values,
                        **past,
                    },
                ),
                strict=True,
            )
        )
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        parts.append({n: outputs[n].reshape(batch, end - begin, -1) for n in ("logits", "k", "entropy")})
    return {name: np.concatenate([part[name] for part in parts], 1) for name in parts[0]}


def reference_logits(checkpoint: Path, ids: np.ndarray, **changes: Any) -> np.ndarray:
    model = transformers.MixtralForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, **changes)
    with torch.no_grad():
        return model.eval()(torch.tensor(ids)).logits.numpy()


def assert_close(logits: np.ndarray, reference: np.ndarray) -> None:
    assert np.abs(logits - reference).max() <= 1e-4 * np.abs(reference).max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_equal_transformers(shape: Shape, tmp_path: Path) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint", **shape.changes)
    config = build(checkpoint, tmp_path / "engine", target="onnx")
    onnx.checker.check_model(tmp_path / "engine" / "model.onnx", full_check=False)
    ids = np.random.default_rng(0).integers(0, config.pretrained_config.vocab_size, (2, 70))
    reference = reference_logits(checkpoint, ids)
    assert_close(run_graph(tmp_path / "engine", config, ids)["logits"], reference)
    assert_close(run_graph(tmp_path / "engine", config, ids, split=41)["logits"], reference)


@pytest.mark.parametrize("k", [1, 2])
def test_a_lower_fixed_k_equals_transformers_with_a_lower_top_k(k: int, tmp_path: Path) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint")
    policy = PolicySet.model_validate({"policies": {"lower": {"kind": "fixed", "k": k}}})
    config = build(checkpoint, tmp_path / "engine", target="onnx", policy=policy)
    ids = np.random.default_rng(1).integers(0, 101, (2, 20))
    outputs = run_graph(tmp_path / "engine", config, ids, "lower")
    assert_close(outputs["logits"], reference_logits(checkpoint, ids, num_experts_per_tok=k))
    assert (outputs["k"] == k).all()


def test_a_sliding_window_masks_as_transformers_does(tmp_path: Path) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint", sliding_window=9)
    config = build(checkpoint, tmp_path / "engine", target="onnx")
    ids = np.random.default_rng(2).integers(0, 101, (2, 40))
    outputs = run_graph(tmp_path / "engine", config, ids, split=17)
    assert_close(outputs["logits"], reference_logits(checkpoint, ids))


def test_bfloat16_weights_are_the_checkpoints_bits(tmp_path: Path) -> None:
    checkpoint = make_mixtral(tmp_path / "float32")
    model = transformers.MixtralForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bfloat16")
    config = build(tmp_path / "bfloat16", tmp_path / "engine", target="onnx")
    assert config.pretrained_config.dtype == "bfloat16"
    ids = np.random.default_rng(3).integers(0, 101, (1, 20))
    # The same 16-bit weights computed in float32 by both.
    outputs = run_graph(tmp_path / "engine", config, ids)
    assert_close(outputs["logits"], reference_logits(tmp_path / "bfloat16", ids))


def test_an_engine_for_onnx_runtime_opens_and_lists_its_files(tmp_path: Path) -> None:
    build(make_mixtral(tmp_path / "checkpoint"), tmp_path / "engine", target="onnx")
    config = read_engine_config(tmp_path / "engine")
    assert {"model.onnx", "model.onnx.data"} <= set(config.files)
