# SPDX-License-Identifier: Apache-2.0
"""Nemotron-H checkpoints as they lie on disk: the published model's, both spellings of the layers, and refusals."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file
from test_published_models import Shard, no_bytes  # noqa: F401  (a fixture)

from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.errors import CheckpointError
from adaptive_k_moe.policy import read_policy_file

from checkpoints import CONFIGS, REPOSITORY, make_sparse_checkpoint
from nemotron_models import PLAIN, make_nemotron

PUBLISHED = CONFIGS / "nemotron-3-nano-30b-a3b.json"


@pytest.mark.usefixtures("no_bytes")
def test_every_tensor_of_the_published_model_is_used_once(tmp_path: Path) -> None:
    tensors = make_sparse_checkpoint(tmp_path / "checkpoint", PUBLISHED)
    # The model's parameters as published; the correction biases are buffers, which the count leaves out.
    parameters = {name: shape for name, shape in tensors.items() if not name.endswith("e_score_correction_bias")}
    assert sum(math.prod(shape) for shape in parameters.values()) == 31_577_937_344
    assert "backbone.layers.1.mixer.experts.127.down_proj.weight" in tensors
    policies = read_policy_file(REPOSITORY / "examples" / "policies" / "nemotron3_nano.json")
    config = build(tmp_path / "checkpoint", tmp_path / "engine", target="onnx", policy=policies)
    assert Shard.reads == Counter(list(tensors))

    model = config.pretrained_config
    assert model.mamba is not None
    assert (len(model.mamba.layers), model.num_moe_layers, len(model.attention_layers)) == (23, 23, 6)
    assert model.mamba.conv_dim == 6144
    # Shapes agree through every node: the inference fails on the first that does not.
    graph = onnx.load(tmp_path / "engine" / "model.onnx", load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True, data_prop=True)
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in inferred.graph.value_info
    }
    assert shapes["backbone.layers.51.sum"][-1] == 2688
    assert {(node.domain, node.op_type) for node in graph.graph.node if node.domain} == {
        ("adaptive_k", "AdaptiveKMoe"),
        ("adaptive_k", "Mamba2"),
    }


def test_the_openvino_target_takes_the_published_heads_and_states(tmp_path: Path) -> None:
    """A few layers with the model's own heads and groups, and few narrow experts."""
    from adaptive_k_moe.runtime import LLM, SamplingParams

    changes = {
        "hybrid_override_pattern": "MEM*E",
        "num_hidden_layers": 5,
        "hidden_size": 96,
        "vocab_size": 512,
        "n_routed_experts": 8,
        "moe_intermediate_size": 48,
        "moe_shared_expert_intermediate_size": 80,
    }
    make_sparse_checkpoint(tmp_path / "checkpoint", PUBLISHED, changes=changes)
    build(tmp_path / "checkpoint", tmp_path / "engine", max_seq_len=64, max_batch_size=2)
    with LLM(tmp_path / "engine", skip_tokenizer_init=True) as llm:
        output = llm.generate([3, 4, 5], SamplingParams(max_tokens=2, end_id=-1))
    assert output.outputs[0].token_ids == [0, 0]  # all logits are 0


def edit(checkpoint: Path, **changes: Any) -> Path:
    """Set fields of the config; None removes one."""
    path = checkpoint / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    return checkpoint


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """The graph and the weights of the plain model, to compare others with."""
    directory = tmp_path_factory.mktemp("plain")
    build(make_nemotron(directory / "checkpoint"), directory / "engine", target="onnx")
    return contents(directory / "engine")


def contents(engine_dir: Path) -> tuple[bytes, bytes]:
    return (engine_dir / "model.onnx").read_bytes(), (engine_dir / "model.onnx.data").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_block_type": None, "hybrid_override_pattern": PLAIN.pattern},
        {"hybrid_override_pattern": PLAIN.pattern, "num_hidden_layers": len(PLAIN.pattern)},
        {"layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba", "moe"]},
        {"time_step_limit": [0.0, float("inf")]},
        {"time_step_limit": None, "n_shared_experts": None, "mlp_hidden_act": None},
        {"num_nextn_predict_layers": 2, "mtp_hybrid_override_pattern": "*E"},
    ],
    ids=str,
)
def test_other_spellings_give_the_same_engine(
    changes: dict[str, Any], engine: tuple[bytes, bytes], tmp_path: Path
) -> None:
    checkpoint = edit(make_nemotron(tmp_path / "checkpoint"), **changes)
    build(checkpoint, tmp_path / "engine", target="onnx")
    assert contents(tmp_path / "engine") == engine


@pytest.mark.parametrize("fused", [False, True], ids=["hub", "transformers"])
def test_layers_of_multi_token_prediction_are_left_out(
    fused: bool, engine: tuple[bytes, bytes], tmp_path: Path
) -> None:
    checkpoint = make_nemotron(tmp_path / "checkpoint", fused=fused)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["mtp.layers.0.mixer.q_proj.weight"] = np.zeros((48, 48), np.float32)
    save_file(tensors, checkpoint / "model.safetensors")
    build(checkpoint, tmp_path / "engine", target="onnx")
    assert contents(tmp_path / "engine") == engine


def test_a_tensor_that_has_no_place_is_refused(tmp_path: Path) -> None:
    checkpoint = make_nemotron(tmp_path / "checkpoint")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["backbone.layers.0.mixer.extra"] = np.zeros(3, np.float32)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"backbone\.layers\.0\.mixer\.extra"):
        build(checkpoint, tmp_path / "engine", target="onnx")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"layers_block_type": ["mamba", "moe", "sliding_attention"]}, "layers_block_type"),
        ({"layers_block_type": ["M", "E"]}, "layers_block_type"),
        ({"layers_block_type": ["linear_attention", "mlp"]}, "layers_block_type"),
        ({"layers_block_type": []}, "layers_block_type"),
        ({"layers_block_type": "ME"}, "layers_block_type"),
        ({"layers_block_type": None}, "layers_block_type"),
        ({"layers_block_type": None, "hybrid_override_pattern": "MEX"}, "hybrid_override_pattern"),
        ({"hybrid_override_pattern": "ME*ME-"}, "hybrid_override_pattern"),
        ({"num_hidden_layers": 7}, "num_hidden_layers"),
        ({"mlp_hidden_act": "swish2"}, "mlp_hidden_act"),
        ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"n_shared_experts": 2}, "n_shared_experts"),
        ({"n_groups": 4}, "n_groups"),
        ({"conv_kernel": 1}, "conv_kernel"),
        ({"n_group": 3}, "n_group"),
        ({"n_group": 10}, "n_group"),
        ({"n_group": 2, "topk_group": 3}, "topk_group"),
        ({"num_experts_per_tok": 11}, "num_experts_per_tok"),
        ({"n_group": 5, "topk_group": 1}, "num_experts_per_tok"),
        ({"time_step_limit": [0.0, 0.1]}, "time_step_limit"),
        ({"time_step_min": -1.0}, "time_step_min"),
        ({"mamba_d_conv": 3}, "mamba_d_conv"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"moe_latent_size": 0}, "moe_latent_size"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon"),
        ({"quantization_config": {"quant_algo": "FP8"}}, "quantization_config"),
        ({"hidden_size": 50}, "has shape"),
        ({"ssm_state_size": 8}, "has shape"),
    ],
    ids=str,
)
def test_what_the_builder_does_not_know_is_refused_by_name(changes: dict[str, Any], field: str, tmp_path: Path) -> None:
    checkpoint = edit(make_nemotron(tmp_path / "checkpoint"), **changes)
    with pytest.raises(CheckpointError, match=field):
        build(checkpoint, tmp_path / "engine", target="onnx")
    assert not (tmp_path / "engine").exists()
