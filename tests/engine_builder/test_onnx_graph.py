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
from onnx import numpy_helper

from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_config import EngineConfig, read_engine_config
from adaptive_k_moe.errors import BuildError
from adaptive_k_moe.policy import PolicySet

from checkpoints import PLAIN, SHAPES, Shape, make_checkpoint, make_mixtral


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
                        "expert_norms": tables.expert_norms,
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
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, **changes)
    with torch.no_grad():
        return model.eval()(torch.tensor(ids)).logits.numpy()


def assert_close(logits: np.ndarray, reference: np.ndarray) -> None:
    assert np.abs(logits - reference).max() <= 1e-4 * np.abs(reference).max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_equal_transformers(shape: Shape, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", shape)
    config = build(checkpoint, tmp_path / "engine", target="onnx")
    onnx.checker.check_model(tmp_path / "engine" / "model.onnx", full_check=False)
    ids = np.random.default_rng(0).integers(0, config.pretrained_config.vocab_size, (2, 70))
    reference = reference_logits(checkpoint, ids)
    assert_close(run_graph(tmp_path / "engine", config, ids)["logits"], reference)
    assert_close(run_graph(tmp_path / "engine", config, ids, split=41)["logits"], reference)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("shape", PLAIN, ids=str)
def test_a_lower_fixed_k_equals_transformers_with_a_lower_top_k(shape: Shape, k: int, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", shape)
    policy = PolicySet.model_validate({"policies": {"lower": {"kind": "fixed", "k": k}}})
    config = build(checkpoint, tmp_path / "engine", target="onnx", policy=policy)
    ids = np.random.default_rng(1).integers(0, 101, (2, 20))
    outputs = run_graph(tmp_path / "engine", config, ids, "lower")
    assert_close(outputs["logits"], reference_logits(checkpoint, ids, num_experts_per_tok=k))
    assert (outputs["k"] == k).all()


@pytest.mark.parametrize(
    "shape",
    [
        Shape("window", {"sliding_window": 9}),
        Shape("window", {"sliding_window": 9, "use_sliding_window": True}, "qwen3_moe"),
    ],
    ids=str,
)
def test_a_sliding_window_masks_as_transformers_does(shape: Shape, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", shape)
    config = build(checkpoint, tmp_path / "engine", target="onnx")
    assert config.pretrained_config.sliding_window == 9
    ids = np.random.default_rng(2).integers(0, 101, (2, 40))
    outputs = run_graph(tmp_path / "engine", config, ids, split=17)
    assert_close(outputs["logits"], reference_logits(checkpoint, ids))


def test_a_window_of_some_layers_is_ignored_up_to_its_length(tmp_path: Path) -> None:
    changes = {"sliding_window": 9, "use_sliding_window": True, "num_hidden_layers": 3}
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Shape("window", changes, "qwen2_moe"))
    with pytest.raises(BuildError, match=r"use_sliding_window.*--max_seq_len 9 or less\."):
        build(checkpoint, tmp_path / "engine", target="onnx")
    config = build(checkpoint, tmp_path / "engine", target="onnx", max_seq_len=9)
    ids = np.random.default_rng(2).integers(0, 101, (2, 9))
    assert_close(run_graph(tmp_path / "engine", config, ids)["logits"], reference_logits(checkpoint, ids))


@pytest.mark.parametrize("shape", PLAIN, ids=str)
def test_both_layouts_give_the_same_weights(shape: Shape, tmp_path: Path) -> None:
    found = []
    for fused in (False, True):
        checkpoint = make_checkpoint(tmp_path / f"checkpoint-{fused}", shape, fused=fused)
        build(checkpoint, tmp_path / f"engine-{fused}", target="onnx")
        graph = onnx.load(tmp_path / f"engine-{fused}" / "model.onnx").graph
        # Only Mixtral's router has another name in the two.
        found.append({t.name.replace("block_sparse_moe", "mlp"): numpy_helper.to_array(t) for t in graph.initializer})
    assert set(found[0]) == set(found[1])
    for name, array in found[0].items():
        np.testing.assert_array_equal(array, found[1][name])


@pytest.mark.parametrize("shape", PLAIN, ids=str)
def test_a_k_above_the_trained_top_k_on_request(shape: Shape, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", shape)
    content = {"allow_above_top_k": True, "policies": {"more": {"kind": "fixed", "k": 5}}}
    config = build(checkpoint, tmp_path / "engine", target="onnx", policy=PolicySet.model_validate(content))
    ids = np.random.default_rng(4).integers(0, 101, (2, 20))
    outputs = run_graph(tmp_path / "engine", config, ids, "more")
    assert_close(outputs["logits"], reference_logits(checkpoint, ids, num_experts_per_tok=5))
    assert (outputs["k"] == 5).all()


def test_rules_of_single_layers_count_the_layers_with_experts(tmp_path: Path) -> None:
    changes = {"decoder_sparse_step": 2, "num_hidden_layers": 4}
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Shape("sparse", changes, "qwen2_moe"))
    layers = {"1": {"thresholds": [], "k": [1]}}
    policy = PolicySet.model_validate({"policies": {"second": {"kind": "entropy", "layers": layers}}})
    config = build(checkpoint, tmp_path / "engine", target="onnx", policy=policy)
    assert config.pretrained_config.moe.layers == [1, 3]
    ids = np.random.default_rng(5).integers(0, 101, (2, 20))
    outputs = run_graph(tmp_path / "engine", config, ids, "second")
    assert outputs["k"].shape == outputs["entropy"].shape == (2, 20, 2)
    assert (outputs["k"] == [3, 1]).all()

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.model.layers[3].mlp.gate.top_k = 1
    with torch.no_grad():
        reference = model(torch.tensor(ids), output_router_logits=True)
    assert_close(outputs["logits"], reference.logits.numpy())
    for column, router_logits in enumerate(reference.router_logits):
        entropy = torch.distributions.Categorical(logits=router_logits).entropy().numpy()
        np.testing.assert_allclose(outputs["entropy"][..., column].ravel(), entropy, atol=1e-5)


@pytest.mark.parametrize("shape", PLAIN, ids=str)
def test_bfloat16_weights_are_the_checkpoints_bits(shape: Shape, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "float32", shape)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
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
