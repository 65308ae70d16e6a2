# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM's checkpoint against a statement of its format of our own, and the model file's use of its API."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from onnx import helper

from adaptive_k_moe.cli import main
from adaptive_k_moe.engine_builder.graph.moe_function import moe_attributes
from adaptive_k_moe.engine_builder.tensorrt_llm import convert
from adaptive_k_moe.engine_builder.tensorrt_llm.safetensors_writer import SafetensorsWriter, TensorSpec
from adaptive_k_moe.errors import BuildError, CheckpointError, PolicyError
from adaptive_k_moe.model_config import MoeConfig
from adaptive_k_moe.policy import PolicySet
from adaptive_k_moe.policy_kinds import KINDS

from checkpoints import MIXTRAL_SMALL, REPOSITORY, Shape, hub_tensors, make_checkpoint, make_mixtral

MODEL_FILE = REPOSITORY / "engine_builder" / "tensorrt_llm" / "model.py"

Tensors = dict[str, np.ndarray]

# 12 heads over 6 (or so many) key-value heads, 5 layers, an odd vocabulary.
SIZES: dict[str, Any] = {
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "head_dim": 10,
    "num_hidden_layers": 5,
    "intermediate_size": 36,
}
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "whole": (SIZES, 1, 1),
    "head_dim of the hidden size": ({"num_hidden_layers": 1}, 1, 1),
    "two ranks": (SIZES, 2, 1),
    "three ranks, tied": ({**SIZES, "tie_word_embeddings": True}, 3, 1),
    "fewer key-value heads than ranks": ({**SIZES, "num_key_value_heads": 2}, 6, 1),
    "no grouped queries": ({**SIZES, "num_key_value_heads": 12}, 4, 1),
    "stages of unequal length": (SIZES, 1, 3),
    "two by two": ({**SIZES, "num_key_value_heads": 1}, 2, 2),
}


def read(directory: Path, ranks: int) -> list[Tensors]:
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        ["config.json", *(f"rank{rank}.safetensors" for rank in range(ranks))]
    )
    return [safetensors.numpy.load_file(directory / f"rank{rank}.safetensors") for rank in range(ranks)]


def stage_layers(num_layers: int, pp_size: int) -> list[list[int]]:
    """By torch, as TensorRT-LLM has it: the first stages get the layers that are over."""
    return [part.tolist() for part in torch.tensor_split(torch.arange(num_layers), pp_size)]


def expected_shapes(config: dict[str, Any], tp: int, layers: list[int], *, first: bool, last: bool) -> dict[str, tuple]:
    """Names and shapes of a rank's tensors, from the fields of Hugging Face's ``config.json``."""
    hidden, heads, kv_heads = (config[n] for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    width, inner, experts = config["head_dim"], config["intermediate_size"], config["num_local_experts"]
    rank_kv = max(1, kv_heads // tp)
    shapes: dict[str, tuple] = {}
    if first:
        shapes["transformer.vocab_embedding.weight"] = (config["vocab_size"], hidden)
    for number in range(len(layers)):
        prefix = f"transformer.layers.{number}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.attention.qkv.weight": ((heads // tp + 2 * rank_kv) * width, hidden),
            f"{prefix}.attention.dense.weight": (hidden, heads // tp * width),
            f"{prefix}.post_layernorm.weight": (hidden,),
            f"{prefix}.mlp.router.weight": (experts, hidden),
            f"{prefix}.mlp.fc.weight": (experts, 2 * inner // tp, hidden),
            f"{prefix}.mlp.proj.weight": (experts, hidden, inner // tp),
        }
    if last:
        shapes["transformer.ln_f.weight"] = (hidden,)
        shapes["lm_head.weight"] = (-(-config["vocab_size"] // tp), hidden)
    return shapes


def recombined(ranks: list[Tensors], config: dict[str, Any], tp: int, layers: list[list[int]]) -> Tensors:
    """Hugging Face's tensors from all ranks' parts."""
    width = config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    found: Tensors = {}
    for stage, stage_of_layers in enumerate(layers):
        group = ranks[stage * tp : (stage + 1) * tp]
        for number, layer in enumerate(stage_of_layers):
            ours, theirs = f"transformer.layers.{number}", f"model.layers.{layer}"
            rows = {"q": heads // tp * width, "k": max(1, kv_heads // tp) * width}
            parts = [
                np.split(rank[f"{ours}.attention.qkv.weight"], [rows["q"], rows["q"] + rows["k"]]) for rank in group
            ]
            for kind, pieces in zip("qkv", zip(*parts, strict=True), strict=True):
                if kind != "q" and kv_heads < tp:  # every so many ranks share a head
                    for index, piece in enumerate(pieces):
                        np.testing.assert_array_equal(piece, pieces[index - index % (tp // kv_heads)])
                    pieces = pieces[:: tp // kv_heads]
                found[f"{theirs}.self_attn.{kind}_proj.weight"] = np.concatenate(pieces)
            dense = [rank[f"{ours}.attention.dense.weight"] for rank in group]
            found[f"{theirs}.self_attn.o_proj.weight"] = np.concatenate(dense, 1)
            for expert in range(config["num_local_experts"]):
                name = f"{theirs}.block_sparse_moe.experts.{expert}"
                halves = [np.split(rank[f"{ours}.mlp.fc.weight"][expert], 2) for rank in group]
                found[f"{name}.w3.weight"] = np.concatenate([up for up, _ in halves])
                found[f"{name}.w1.weight"] = np.concatenate([gate for _, gate in halves])
                found[f"{name}.w2.weight"] = np.concatenate(
                    [rank[f"{ours}.mlp.proj.weight"][expert] for rank in group], 1
                )
            for whole, name in (
                ("input_layernorm", "input_layernorm"),
                ("post_layernorm", "post_attention_layernorm"),
                ("mlp.router", "block_sparse_moe.gate"),
            ):
                for rank in group:
                    np.testing.assert_array_equal(rank[f"{ours}.{whole}.weight"], group[0][f"{ours}.{whole}.weight"])
                found[f"{theirs}.{name}.weight"] = group[0][f"{ours}.{whole}.weight"]
    found["model.embed_tokens.weight"] = ranks[0]["transformer.vocab_embedding.weight"]
    found["model.norm.weight"] = ranks[-1]["transformer.ln_f.weight"]
    head = np.concatenate([rank["lm_head.weight"] for rank in ranks[-tp:]])
    assert not head[config["vocab_size"] :].any()
    found["lm_head.weight"] = head[: config["vocab_size"]]
    return found


@pytest.mark.parametrize("fused", [False, True], ids=["the hub's layout", "transformers' layout"])
@pytest.mark.parametrize("case", CASES)
def test_all_ranks_together_are_the_checkpoint(case: str, fused: bool, tmp_path: Path) -> None:
    changes, tp, pp = CASES[case]
    shape = Shape(case, changes)
    hub = make_checkpoint(tmp_path / "hub", shape)
    source = make_checkpoint(tmp_path / "fused", shape, fused=True) if fused else hub
    convert(source, tmp_path / "converted", tp_size=tp, pp_size=pp)
    ranks = read(tmp_path / "converted", tp * pp)
    config = json.loads((hub / "config.json").read_text())
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    layers = stage_layers(config["num_hidden_layers"], pp)
    for rank, tensors in enumerate(ranks):
        stage = rank // tp
        expected = expected_shapes(config, tp, layers[stage], first=stage == 0, last=stage == pp - 1)
        assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    original = safetensors.numpy.load_file(hub / "model.safetensors")
    if config["tie_word_embeddings"]:
        original["lm_head.weight"] = original["model.embed_tokens.weight"]
    found = recombined(ranks, config, tp, layers)
    assert found.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def test_a_published_models_tensors_are_all_used(tmp_path: Path) -> None:
    """By names and shapes alone: those of Mixtral 8x7B, whose weights nobody has here."""
    config = json.loads((REPOSITORY / "tests" / "configs" / "mixtral-8x7b.json").read_text())
    config["head_dim"] = 128
    tensors = hub_tensors(REPOSITORY / "tests" / "configs" / "mixtral-8x7b.json")
    for tp in (1, 2, 8):
        shapes = expected_shapes(config, tp, list(range(32)), first=True, last=True)
        sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        shared = sum(size for name, size in sizes.items() if "norm" in name or "ln_f" in name or "router" in name)
        shared += sizes["transformer.vocab_embedding.weight"]
        total = tp * (sum(sizes.values()) - shared) + shared
        assert total == sum(int(np.prod(shape)) for shape in tensors.values())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_have_the_dtype_and_the_router_float32(dtype: Any, tmp_path: Path) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint")
    content = convert(checkpoint, tmp_path / "converted", dtype=dtype, tp_size=2)
    assert content["dtype"] == dtype
    types = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    original = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    for tensors in read(tmp_path / "converted", 2):
        for name, tensor in tensors.items():
            assert tensor.dtype == (np.float32 if "router" in name else types[dtype]), name
        expected = original["model.embed_tokens.weight"].astype(types[dtype])
        np.testing.assert_array_equal(tensors["transformer.vocab_embedding.weight"], expected)


# The fields that TensorRT-LLM's classes LLaMAConfig and PretrainedConfig, and those of their parts, take.
FIELDS = {
    "": "architecture attn_bias disable_weight_only_quant_plugin dtype embedding_sharding_dim head_size hidden_act "
    "hidden_size intermediate_size logits_dtype mapping max_position_embeddings mlp_bias moe norm_epsilon "
    "num_attention_heads num_hidden_layers num_key_value_heads position_embedding_type qk_layernorm quantization "
    "residual_mlp rotary_base rotary_scaling tie_word_embeddings use_parallel_embedding vocab_size",
    "moe": "num_experts top_k normalization_mode",
    "mapping": "world_size tp_size pp_size moe_tp_size moe_ep_size",
    "quantization": "quant_algo kv_cache_quant_algo",
}


@pytest.mark.parametrize(("precision", "algo"), [(None, None), ("int8", "W8A16"), ("int4", "W4A16")])
def test_config_json_has_the_published_fields(precision: Any, algo: str | None, tmp_path: Path) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint", **SIZES, hidden_act="gelu", rope_theta=5e5)
    returned = convert(checkpoint, tmp_path / "converted", tp_size=2, pp_size=3, weight_only_precision=precision)
    content = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert content == returned
    policy = content.pop("adaptive_k")
    for part, names in FIELDS.items():
        assert set(content[part] if part else content) == set(names.split())
    assert content["mapping"] == {"world_size": 6, "tp_size": 2, "pp_size": 3, "moe_tp_size": 2, "moe_ep_size": 1}
    assert content["moe"] == {"num_experts": 5, "top_k": 3, "normalization_mode": 1}
    assert content["quantization"] == {"quant_algo": algo, "kv_cache_quant_algo": None}
    assert (content["architecture"], content["hidden_act"]) == ("MixtralForCausalLM", "geglu")
    assert (content["head_size"], content["intermediate_size"], content["num_key_value_heads"]) == (10, 36, 6)
    assert policy["policy"] == "full"
    # Weights stay as they are: trtllm-build rounds those that are no integers yet when it loads them.
    assert all(t.dtype == np.float32 for rank in read(tmp_path / "converted", 6) for t in rank.values())


def test_the_policy_asked_for_is_written_by_layer(tmp_path: Path) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint")
    rules = {
        "narrow": {"kind": "fixed", "k": 1},
        "layered": {"kind": "entropy", "layers": {"0": {"thresholds": [0.5, 1.0], "k": [1, 2, 3]},
                                                  "1": {"thresholds": [0.7], "k": [2, 3]}}},
    }  # fmt: skip
    policies = PolicySet.model_validate({"default": "narrow", "policies": rules})
    content = convert(checkpoint, tmp_path / "default", policy=policies)
    assert content["adaptive_k"]["policy"] == "narrow"
    content = convert(checkpoint, tmp_path / "layered", policy=policies, adaptive_k_policy="layered")
    written = json.loads((tmp_path / "layered" / "config.json").read_text())["adaptive_k"]
    assert written["policy_kind"] == KINDS["entropy"].number
    assert [row[:2] for row in written["k_values"]] == [[1, 2], [2, 3]]
    assert written["k_values"][0][2] == written["k_values"][1][2] == 3
    np.testing.assert_allclose([row[0] for row in written["thresholds"]], [0.5, 0.7])
    assert np.isfinite(written["thresholds"]).all()  # JSON has no infinity
    assert max(written["thresholds"][1]) > 1e38
    assert np.array(written["expert_norms"]).shape == (2, 5)
    with pytest.raises(PolicyError, match="'wide' is not one of"):
        convert(checkpoint, tmp_path / "wide", policy=policies, adaptive_k_policy="wide")
    assert not (tmp_path / "wide").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "elsewhere").mkdir()
    output = tmp_path / "converted"
    output.symlink_to(tmp_path / "elsewhere")  # stays a link, to a directory that is free to take
    command = ["convert", "--checkpoint_dir", str(MIXTRAL_SMALL), "--output_dir", str(output), "--dtype", "float16"]
    assert main([*command, "--tp_size", "2", "--use_weight_only", "--weight_only_precision", "int4"]) == 0
    assert "MixtralForCausalLM, float16, 2 ranks (tp_size 2, pp_size 1), policy full" in capsys.readouterr().out
    assert len(read(output, 2)) == 2
    assert output.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "elsewhere"]
    wide = tmp_path / "wide.json"
    wide.write_text(json.dumps({"policies": {"wide": {"kind": "fixed", "k": 4}}}))
    command[4] = str(tmp_path / "warned")
    assert main([*command, "--policy", str(wide)]) == 0
    error = capsys.readouterr().err
    assert error.startswith("adaptive-k: warning: policy 'wide'")
    assert error.count("\n") == 1
    command[4] = str(output)
    assert main(command) == 1  # the directory is not empty any more
    assert "is not an empty directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        ({}, {"tp_size": 0}, "tp_size is 0: it must be at least 1"),
        ({}, {"pp_size": 3}, "pp_size is 3, but the model has 2 layers"),
        ({}, {"tp_size": 8}, "does not divide the model's num_attention_heads 4"),
        ({"intermediate_size": 30}, {"tp_size": 4}, "does not divide the model's intermediate_size 30"),
        ({**SIZES, "num_key_value_heads": 3}, {"tp_size": 4}, "neither divides num_key_value_heads 3 nor"),
        ({"sliding_window": 16}, {}, "sliding window of 16 tokens"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "head_dim": 12}, {},
         "rotary embedding without scaling"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused(
    changes: dict[str, Any], options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint", **changes)
    with pytest.raises(BuildError, match=sentence):
        convert(checkpoint, tmp_path / "converted", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_other_checkpoints_leave_nothing_behind(tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "olmoe", Shape("plain", {}, "olmoe"))
    with pytest.raises(BuildError, match="Mixtral's TensorRT-LLM checkpoint alone, not that of OlmoeForCausalLM"):
        convert(other, tmp_path / "converted")
    checkpoint = make_mixtral(tmp_path / "mixtral")
    weights = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    safetensors.numpy.save_file({**weights, "model.layers.9.extra": weights["model.norm.weight"]},
                                checkpoint / "model.safetensors")  # fmt: skip
    with pytest.raises(CheckpointError, match=r"1 tensor that Mixtral has no place for, 'model\.layers\.9\.extra'"):
        convert(checkpoint, tmp_path / "converted")
    weights["lm_head.weight"][3, 4] = 1e5
    safetensors.numpy.save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(BuildError, match="beyond float16's range"):
        convert(checkpoint, tmp_path / "converted", dtype="float16")
    del weights["model.layers.1.block_sparse_moe.experts.4.w2.weight"]
    safetensors.numpy.save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor .*experts\.4\.w2\.weight"):
        convert(checkpoint, tmp_path / "converted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixtral", "olmoe"]


def test_a_file_written_in_pieces_is_read_by_safetensors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    wide, odd = rng.standard_normal((3, 5, 7)).astype(np.float32), rng.standard_normal(3).astype(np.float32)
    specs = [
        TensorSpec("odd", "float16", (3,)),
        TensorSpec("wide", "bfloat16", (3, 5, 7)),
        TensorSpec("none", "float32", (0,)),
    ]
    with SafetensorsWriter(tmp_path / "file.safetensors", specs) as writer:
        writer.write(odd, "float16")
        for piece in wide:
            writer.write(piece.T.copy().T, "bfloat16")  # not contiguous
    found = safetensors.numpy.load_file(tmp_path / "file.safetensors")
    np.testing.assert_array_equal(found["odd"], odd.astype(np.float16))
    np.testing.assert_array_equal(found["wide"], wide.astype(ml_dtypes.bfloat16))
    assert found["none"].shape == (0,)
    with pytest.raises(AssertionError, match="instead of"), SafetensorsWriter(tmp_path / "short", specs) as writer:
        writer.write(odd, "float16")


# The model file. ------------------------------------------------------------------------------------
# TensorRT-LLM cannot be had here. What can be checked is which of its names the file uses, against those that
# TensorRT-LLM 1.2 publishes, and the parts of the file that need nothing of it.

PUBLISHED = {
    "tensorrt_llm._common": {"default_net", "default_trtnet"},
    "tensorrt_llm.functional": {"Tensor", "_create_tensor", "cast", "concat", "constant", "expand", "shape"},
    "tensorrt_llm.layers": {"MOE"},
    "tensorrt_llm.models.llama.model": {"LLaMAForCausalLM"},
}
# Of MixtureOfExperts and PretrainedModel.
EXPERTS_OPTIONS = [
    *("moe_config", "hidden_size", "ffn_hidden_size", "hidden_act", "mapping"),
    *("bias", "dtype", "tp_group", "tp_size", "quant_mode"),
]
EXPERTS_FORWARD = ["hidden_states", "lora_layer_params", "all_reduce_params", "last_local_layer_residual"]
EXPERTS_ATTRIBUTES = {"router", "fc", "proj", "hidden_act", "forward_allreduce"}


@pytest.fixture(scope="module")
def model_file() -> ast.Module:
    return ast.parse(MODEL_FILE.read_text())


def test_the_model_file_uses_published_names_alone(model_file: ast.Module) -> None:
    imports = [node for node in ast.walk(model_file) if isinstance(node, ast.ImportFrom) and node.module]
    used = {i.module: {name.name for name in i.names} for i in imports if i.module.startswith("tensorrt_llm")}
    assert used.keys() == PUBLISHED.keys()
    for module, names in used.items():
        assert names <= PUBLISHED[str(module)], module
    assert not [i.module for i in imports if str(i.module).startswith("adaptive_k_moe")]  # it stands alone


def test_the_model_file_overrides_what_is_there(model_file: ast.Module) -> None:
    classes = {node.name: node for node in model_file.body if isinstance(node, ast.ClassDef)}
    assert {name: [ast.unparse(base) for base in node.bases] for name, node in classes.items()} == {
        "AdaptiveKExperts": ["MOE"],
        "AdaptiveKMixtral": ["LLaMAForCausalLM"],
    }
    methods = {
        name: {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
        for name, node in classes.items()
    }
    assert methods["AdaptiveKExperts"].keys() == {"__init__", "forward"}
    assert methods["AdaptiveKMixtral"].keys() == {"__init__", "load"}
    forward = methods["AdaptiveKExperts"]["forward"].args
    assert [argument.arg for argument in forward.args][1:] == EXPERTS_FORWARD
    assert forward.kwarg is not None
    assert [a.arg for a in methods["AdaptiveKMixtral"]["load"].args.args] == ["self", "weights", "from_pruned"]
    own = {node.attr for node in ast.walk(classes["AdaptiveKExperts"])
           if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"}  # fmt: skip
    assert own - {"policy", "layer"} == EXPERTS_ATTRIBUTES
    [made] = [node for node in ast.walk(classes["AdaptiveKMixtral"])
              if isinstance(node, ast.Call) and ast.unparse(node.func) == "AdaptiveKExperts"]  # fmt: skip
    assert [keyword.arg for keyword in made.keywords] == EXPERTS_OPTIONS


def test_tensorrts_own_names_are_there(model_file: ast.Module) -> None:
    """TensorRT for RTX has TensorRT's Python interface, but for `INetworkDefinition.add_plugin_v3`."""
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    names = {ast.unparse(node) for node in ast.walk(model_file) if isinstance(node, ast.Attribute)}
    for name in sorted(n for n in names if n.startswith("trt.") and n.count(".") == 1):
        assert hasattr(trt, name.removeprefix("trt.")), name
    for name in ("get_creator", "load_library"):
        assert hasattr(trt.IPluginRegistry, name)
    assert hasattr(trt.IPluginCreatorV3One, "create_plugin")


@pytest.fixture(scope="module")
def functions(model_file: ast.Module) -> dict[str, Any]:
    """The file's functions that need no TensorRT, as they stand."""
    wanted = ("operator_fields", "policy_tables", "gate_first")
    body = [node for node in model_file.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    future = ast.parse("from __future__ import annotations").body
    space: dict[str, Any] = {"np": np, "torch": torch}
    exec(compile(ast.Module([*future, *body], []), str(MODEL_FILE), "exec"), space)
    return space


def test_experts_come_to_the_operator_gate_first(functions: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint")
    convert(checkpoint, tmp_path / "converted")
    [rank] = read(tmp_path / "converted", 1)
    before = {name: torch.tensor(tensor) for name, tensor in rank.items()}
    after = functions["gate_first"](before)
    original = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    for name, tensor in after.items():
        if not name.endswith("mlp.fc.weight"):
            assert tensor is before[name]
            continue
        layer = name.split(".")[2]
        for expert in range(5):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            gate_up = np.concatenate([original[f"{prefix}.w1.weight"], original[f"{prefix}.w3.weight"]])
            np.testing.assert_array_equal(tensor[expert].numpy(), gate_up)


def test_the_operator_gets_a_mixtrals_rule_and_the_policy(functions: dict[str, Any], tmp_path: Path) -> None:
    rules = {"mixed": {"kind": "entropy", "thresholds": [0.5, 1.0], "k": [1, 2, 3]}}
    policies = PolicySet.model_validate({"default": "mixed", "policies": rules})
    content = convert(make_mixtral(tmp_path / "checkpoint"), tmp_path / "converted", policy=policies)
    fields = functions["operator_fields"](content["hidden_act"], content["adaptive_k"])
    moe = MoeConfig(num_experts=5, num_experts_per_tok=3, intermediate_size=56, activation="swiglu", layers=[0, 1])
    attributes = moe_attributes(moe, max_k=3, weight_format="float16", expert_norms=True)
    assert fields == {name: attributes[name] for name in fields}
    # What it does not name has the operator's default, which the plugin's page states.
    defaults = {"routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "activation_format": ""}
    defaults["first_expert"] = -1
    assert {name: attributes[name] for name in attributes.keys() - fields.keys() - {"weight_format"}} == defaults
    kind, thresholds, k_values, norms = functions["policy_tables"](content["adaptive_k"], 1)
    assert [a.dtype for a in (kind, thresholds, k_values, norms)] == [np.int32, np.float32, np.int32, np.float32]
    assert (kind.shape, k_values.shape[0], thresholds.shape) == ((1,), 1, (1, k_values.shape[1] - 1))
    np.testing.assert_array_equal(k_values[0, :3], [1, 2, 3])
    np.testing.assert_allclose(thresholds[0, :2], [0.5, 1.0])
    np.testing.assert_array_equal(norms, np.ones(5))
    assert all(helper.make_attribute(name, value) for name, value in fields.items())
