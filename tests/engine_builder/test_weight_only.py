# SPDX-License-Identifier: Apache-2.0
"""Weights as int8 and int4: their rounding, the graphs that read them, and a real compiler's word on those."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import safetensors.numpy
import torch
from cases import quantise as kernels_quantise
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered import SIZES, Lowered, assert_mamba_steps_equal_transformers, assert_steps_equal_transformers
from onnx import TensorProto

from adaptive_k_moe.cli import main
from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_builder.build import dry_run
from adaptive_k_moe.engine_builder.checkpoint import HfConfig
from adaptive_k_moe.engine_builder.graph import GraphBuilder, weight_only
from adaptive_k_moe.engine_builder.graph.graph_builder import DATA_TYPES
from adaptive_k_moe.engine_builder.graph.weight_only import quantise
from adaptive_k_moe.engine_builder.models import architecture_of
from adaptive_k_moe.engine_builder.targets import tensorrt as target
from adaptive_k_moe.engine_builder.targets.tensorrt_lowering import for_compiler, for_plugin
from adaptive_k_moe.engine_config import read_engine_config
from adaptive_k_moe.errors import BuildError
from adaptive_k_moe.model_config import Dtype, QuantizationConfig, WeightOnlyPrecision

from checkpoints import CONFIGS, MIXTRAL_SMALL, Shape, make_checkpoint, make_mixtral
from nemotron_models import Nemotron
from rounded_models import NEMOTRON, PRECISIONS, SHAPES, WIDE, quantise_reference

INT8 = QuantizationConfig(quant_algo="W8A16")
INT4 = QuantizationConfig(quant_algo="W4A16", group_size=32)

# Rounding. -------------------------------------------------------------------------------------------


def unpacked(values: np.ndarray, bits: int) -> np.ndarray:
    """The integers, one each, of two that share a byte."""
    if bits == 8:
        return values
    pairs = np.stack([values & 15, (values >> 4) & 15], -1).reshape(*values.shape[:-1], -1)
    return np.where(pairs > 7, pairs - 16, pairs)


@given(
    bits=st.sampled_from([8, 4]),
    groups=st.integers(1, 3),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    seed=st.integers(0, 2**32 - 1),
    magnitude=st.integers(-2, 3),  # below that float16 scales are subnormal
)
@settings(max_examples=60, deadline=None)
def test_values_are_near_the_weights(bits: int, groups: int, dtype: str, seed: int, magnitude: int) -> None:
    rng = np.random.default_rng(seed)
    weights = (rng.standard_normal((3, 2, 32 * groups)) * 10.0**magnitude).astype(np.float32)
    weights[0, 0, :32] = 0  # a group of nothing but zeros
    group = 32 if groups > 1 else None
    config = QuantizationConfig(quant_algo="W8A16" if bits == 8 else "W4A16", group_size=group)
    values, scales = quantise("w", weights, config, dtype)
    assert values.shape == (3, 2, 32 * groups * bits // 8)
    assert scales.shape == (3, 2, groups if group else 1)
    values = unpacked(values, bits).reshape(*scales.shape, -1)
    assert np.abs(values[0, 0, 0]).max() == 0
    spread, own = scales.astype(np.float64)[..., None], weights.reshape(values.shape)
    largest = np.abs(own).max(-1, keepdims=True)
    limit = 2 ** (bits - 1) - 1
    if bits == 8:
        # Rounding the scale to its type moves the largest value by less than half a step more.
        room = 1e-6 if dtype == "float32" else limit * 2.0**-9
        assert (np.abs(values * spread - own) <= spread * (0.5 + room)).all()
    else:
        # No more squared error than with the scale that keeps the largest value, and none of the others far off.
        whole = np.where(largest > 0, largest / limit, 1)
        plain = np.square(np.rint(own / whole) * whole - own).sum(-1)
        assert (np.square(values * spread - own).sum(-1) <= plain * 1.1 + 1e-12).all()
        assert (np.abs(values * spread - own) <= 0.2 * largest).all()


@pytest.mark.parametrize("size", [1, 40, 10**9])
def test_how_much_is_rounded_at_once_changes_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.random.default_rng(5).standard_normal((5, 3, 64)).astype(np.float32)
    expected = quantise("w", weights, INT4, "float16")
    monkeypatch.setattr(weight_only, "_CHUNK", size)
    for found, wanted in zip(quantise("w", weights, INT4, "float16"), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_stored_form_is_that_of_the_kernels_tests(bits: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels and the plugin are held against the form that their tests write: the builder's is the same."""
    monkeypatch.setitem(weight_only._SHRINKS, bits, (1.0,))  # they round in the plain way
    weights = np.random.default_rng(3).standard_normal((3, 4, 96)).astype(np.float32)
    for groups in (1, 3):
        group = 96 // groups if groups > 1 else None
        config = QuantizationConfig(quant_algo="W8A16" if bits == 8 else "W4A16", group_size=group)
        values, scales = quantise("w", weights, config, np.dtype(dtype).name)
        expected_values, expected_scales, _ = kernels_quantise(weights, bits, groups, dtype)
        np.testing.assert_array_equal(values, expected_values)
        np.testing.assert_array_equal(scales, expected_scales)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39 / 10])
def test_a_weight_that_no_scale_holds_is_refused(value: float) -> None:
    weights = np.ones((2, 32), np.float64)
    weights[1, 3] = value
    with pytest.raises(BuildError, match=r"^w has values that are not finite or beyond float16's range"):
        quantise("w", weights.astype(np.float32), INT4, "float16")


def test_memory_in_use_is_that_of_a_piece(tmp_path: Path) -> None:
    piece, pieces = np.ones((512, 4096), np.float32), 12

    def stream() -> Iterator[Any]:
        for _ in range(pieces):
            yield piece[None]

    with GraphBuilder(tmp_path / "model.onnx", "g") as graph:
        tracemalloc.start()
        graph.quantised_weight("w", INT4, "float16", (pieces, 512, 4096), stream(), for_operator=True)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 4 * piece.nbytes  # 12 pieces passed
    assert (tmp_path / "model.onnx.data").stat().st_size >= piece.size * pieces // 2


# Numbers. --------------------------------------------------------------------------------------------


def lowered(directory: Path, shape: Shape | Nemotron, dtype: Dtype, precision: tuple[str, int, int | None]) -> Lowered:
    name, bits, group = precision
    return Lowered(
        directory,
        shape,
        dtype,
        prepare=partial(quantise_reference, bits, group, getattr(torch, dtype)),
        weight_only_precision=name,
        group_size=group,
    )


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_lowered_graph_equals_transformers_with_the_same_rounding(
    shape: Shape, precision: tuple[str, int, int | None], tmp_path: Path
) -> None:
    assert_steps_equal_transformers(lowered(tmp_path, shape, "float32", precision), 1e-4)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_so_does_one_with_mamba_layers(precision: tuple[str, int, int | None], tmp_path: Path) -> None:
    assert_mamba_steps_equal_transformers(lowered(tmp_path, NEMOTRON, "float32", precision), 1e-4)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_the_float16_graph_is_near_it(precision: tuple[str, int, int | None], tmp_path: Path) -> None:
    assert_steps_equal_transformers(lowered(tmp_path, SHAPES[2], "float16", precision), 1e-2)


def test_the_rounding_would_show(tmp_path: Path) -> None:
    """The same comparison with unrounded weights fails, so the ones above do compare the rounding."""
    graph = Lowered(tmp_path, SHAPES[0], "float32", weight_only_precision="int4")
    with pytest.raises(AssertionError):
        assert_steps_equal_transformers(graph, 1e-2)


# What is stored. -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[2], NEMOTRON], ids=str)
def test_the_plugin_gets_integers_and_scales_of_its_own_type(
    shape: Shape | Nemotron, precision: tuple[str, int, int | None], dtype: Dtype, tmp_path: Path
) -> None:
    name, bits, group = precision
    graph = lowered(tmp_path, shape, dtype, precision)
    tensors = {initializer.name: initializer for initializer in graph.proto.graph.initializer}
    moe = graph.model.moe
    size = moe.latent_size or graph.model.hidden_size
    widths = (2 * moe.intermediate_size if moe.activation == "swiglu" else moe.intermediate_size, size)
    nodes = [node for node in for_plugin(graph.proto).graph.node if node.op_type == "AdaptiveKMoe"]
    assert len(nodes) == graph.model.num_moe_layers
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["weight_format"] == name.encode()
        # After up and down: the correction bias if there is one, the scales, the experts' norms.
        scales = node.input[9:11] if moe.correction_bias else node.input[8:10]
        assert len(node.input) == 11 + moe.correction_bias
        for weight, scale, rows, row in zip(
            node.input[6:8], scales, widths, (size, moe.intermediate_size), strict=True
        ):
            assert tensors[weight].data_type == TensorProto.INT8
            assert list(tensors[weight].dims) == [moe.num_experts, rows, row * bits // 8]
            assert tensors[scale].data_type == DATA_TYPES[dtype]
            assert list(tensors[scale].dims) == [moe.num_experts, rows, row // (group or row)]
    # Integers are all that is multiplied but for head, router and the shared expert's gate.
    left = Counter(
        name.rsplit(".", 2)[-2]
        for name, tensor in tensors.items()
        if len(tensor.dims) >= 2
        and tensor.data_type not in (TensorProto.INT8, TensorProto.INT4)
        and not name.endswith("_scales")
    )
    expected = {"embed_tokens", "embeddings", "lm_head", "gate", "shared_expert_gate", "conv1d", "rope"}
    assert set(left) <= expected, left
    assert left["gate"] == graph.model.num_moe_layers


def test_the_engine_directory_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build", "--checkpoint_dir", str(MIXTRAL_SMALL), "--target", "onnx", "--output_dir"]
    assert main([*arguments, str(tmp_path / "int8"), "--use_weight_only"]) == 0
    assert main([*arguments, str(tmp_path / "int4"), "--use_weight_only", "--weight_only_precision", "int4"]) == 0
    assert main([*arguments, str(tmp_path / "plain"), "--weight_only_precision", "int4"]) == 0  # as in TensorRT-LLM
    excluded = ["lm_head", "vocab_embedding", "router", "shared_expert_gate"]
    found = {name: read_engine_config(tmp_path / name) for name in ("int8", "int4", "plain")}
    written = {name: config.to_json()["pretrained_config"].get("quantization") for name, config in found.items()}
    assert written == {
        "int8": {"quant_algo": "W8A16", "exclude_modules": excluded},
        "int4": {"quant_algo": "W4A16", "group_size": 32, "exclude_modules": excluded},
        "plain": None,
    }
    sizes = {name: config.files["model.onnx.data"].size for name, config in found.items()}
    assert sizes["int4"] < sizes["int8"] < sizes["plain"]
    capsys.readouterr()
    assert main(["inspect", "--engine_dir", str(tmp_path / "int4")]) == 0
    assert "W4A16" in capsys.readouterr().out


def test_the_onnx_target_runs_in_plain_onnx_runtime(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", SHAPES[0])
    config = build(checkpoint, tmp_path / "engine", target="onnx", dtype="bfloat16", weight_only_precision="int4")
    session = ort.InferenceSession(tmp_path / "engine" / "model.onnx", providers=["CPUExecutionProvider"])
    tables, model = config.policy_tables(), config.pretrained_config
    ids = np.arange(9)[None]
    past = np.zeros((1, model.num_key_value_heads, 0, model.head_dim), np.float32)
    feed = {
        "input_ids": ids,
        "position_ids": ids,
        "logits_indices": np.arange(9),
        "policy_index": np.zeros(9, np.int32),
        "policy_kind": tables.policy_kind,
        "thresholds": tables.thresholds,
        "k_values": tables.k_values,
        "expert_norms": tables.expert_norms,
        **{f"past_key_values.{layer}.{kind}": past for layer in range(2) for kind in ("key", "value")},
    }
    logits = session.run(["logits"], feed)[0]
    assert logits.shape == (9, model.vocab_size)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("arguments", "quant_algo"),
    [
        (["--use_weight_only"], "W8A8"),
        (["--use_weight_only", "--weight_only_precision", "int4"], "W4A8"),
        (["--use_weight_only", "--quant_algo", "W8A16"], "W8A16"),
        (["--quant_algo", "W4A16"], "W4A16"),
        (["--use_weight_only", "--quant_algo", "W4A8"], "W4A8"),
        (["--use_weight_only", "--target", "onnx"], "W8A16"),
    ],
    ids=" ".join,
)
def test_bits_of_weights_and_activations_are_asked_for_in_one_word_or_two(
    arguments: list[str], quant_algo: str, tmp_path: Path
) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint", num_hidden_layers=1, **WIDE)
    command = ["build", "--checkpoint_dir", str(checkpoint), "--output_dir", str(tmp_path / "engine")]
    assert main([*command, "--max_seq_len", "32", *arguments]) == 0
    quantization = read_engine_config(tmp_path / "engine").pretrained_config.quantization
    assert quantization is not None
    assert quantization.quant_algo == quant_algo
    kept = {"router", "shared_expert_gate"} | ({"lm_head", "vocab_embedding"} if "onnx" in arguments else set())
    assert set(quantization.exclude_modules) == kept


def test_an_engine_of_an_earlier_release_says_that_its_vocabulary_is_wide() -> None:
    excluded = ["lm_head", "router", "shared_expert_gate"]
    old = QuantizationConfig.model_validate({"quant_algo": "W8A16", "exclude_modules": excluded})
    assert old.vocabulary is None
    assert not old.rounds_activations


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("precision", "most"), [("int8", 8.5), ("int4", 4.5)])
def test_an_engine_for_cpus_is_no_larger_than_llama_cpps_file(
    precision: WeightOnlyPrecision, most: float, tied: bool, tmp_path: Path
) -> None:
    """8.5 and 4.5 bits a weight are those of Q8_0 and Q4_0; embedding and head are int8 in either."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 3}
    checkpoint = make_mixtral(tmp_path / "checkpoint", tie_word_embeddings=tied, **sizes)
    weights = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    config = build(
        checkpoint, tmp_path / "engine", dtype="bfloat16", weight_only_precision=precision, max_seq_len=32, force=True
    )
    assert ("lm_head.weight" in weights) != tied
    bits = 8 * config.files["rank0.bin"].size / sum(weight.size for weight in weights.values())
    assert bits <= most


def test_a_tied_vocabulary_is_stored_once(tmp_path: Path) -> None:
    sizes: dict[str, int] = {}
    for tied in (False, True):
        checkpoint = make_mixtral(tmp_path / f"checkpoint-{tied}", tie_word_embeddings=tied, **WIDE)
        config = build(checkpoint, tmp_path / f"{tied}", weight_only_precision="int8", max_seq_len=32)
        sizes[str(tied)] = config.files["rank0.bin"].size
    vocabulary = config.pretrained_config.vocab_size * (WIDE["hidden_size"] + 4)  # integers, a float32 scale a row
    assert vocabulary <= sizes["False"] - sizes["True"] < vocabulary + 128  # alignment


@pytest.mark.parametrize(
    ("sizes", "group"),
    [({"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}, 128),
     ({"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}, 64),
     ({"hidden_size": 128, "intermediate_size": 96, "head_dim": 32}, 32),
     ({"hidden_size": 128, "intermediate_size": 256, "head_dim": 24}, 32)],
    ids=str,
)  # fmt: skip
def test_groups_are_as_large_as_all_rows_allow(sizes: dict[str, int], group: int, tmp_path: Path) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint", num_hidden_layers=1, **sizes)
    config = build(checkpoint, tmp_path / "engine", target="onnx", weight_only_precision="int4", max_seq_len=32)
    assert config.pretrained_config.quantization == QuantizationConfig(quant_algo="W4A16", group_size=group)


PUBLISHED = {"mixtral-8x7b": 128, "nemotron-3-nano-30b-a3b": 64, "olmoe-1b-7b": 128, "qwen1.5-moe-a2.7b": 128,
             "qwen3-30b-a3b": 128}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_can_be_quantised(name: str) -> None:
    config = HfConfig(json.loads((CONFIGS / f"{name}.json").read_text()), CONFIGS / f"{name}.json")
    model = architecture_of(config).read_config(config, "bfloat16")
    assert weight_only.plan_weight_only(model, "tensorrt", "int8", None, None) == INT8
    int4 = weight_only.plan_weight_only(model, "tensorrt", "int4", None, None)
    assert int4 is not None
    assert int4.group_size == PUBLISHED[name]


# A real compiler. ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "precision", "capabilities"),
    [
        (SHAPES[0], "float16", PRECISIONS[0], ("SM89", "SM120")),
        (SHAPES[2], "bfloat16", PRECISIONS[1], ("SM89", "SM120")),
        (NEMOTRON, "float16", PRECISIONS[1], ("SM89",)),
    ],
    ids=str,
)
def test_tensorrt_for_rtx_compiles_the_graph(
    shape: Shape, dtype: Dtype, precision: Any, capabilities: tuple[str, ...], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    graph = lowered(tmp_path, shape, dtype, precision)
    onnx.save(for_compiler(graph.proto), graph.path)
    products = sum(node.op_type == "DequantizeLinear" for node in graph.proto.graph.node)
    for capability in capabilities:
        result = target.compile_ahead(graph.path, graph.model, graph.build, capability)
        assert "error" not in result, result
        # Each product's weight, and up and down of each layer's experts.
        assert result["layers"]["DEQUANTIZE"] == products + 2 * graph.model.num_moe_layers


def test_a_dry_run_knows_the_weights_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "has_compiler", lambda: False)
    plain, int8, int4 = (dry_run(MIXTRAL_SMALL, weight_only_precision=p).weight_bytes for p in (None, "int8", "int4"))
    # Of 7.2 M parameters all but embedding, head, router and norms are quantised.
    assert int8 < 0.6 * plain
    assert int4 < 0.65 * int8


# Refusals. -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "changes", "sentence"),
    [
        ([], {}, "int8 weights need rows of a multiple of 16 values, but the model's experts' intermediate_size is 56"),
        (["--weight_only_precision", "int4"], {"intermediate_size": 96},
         "int4 weights need rows of a multiple of 32 values, but the model's hidden_size is 48"),
        (["--weight_only_precision", "int4", "--group_size", "64"], WIDE,
         "int4 weights need rows of a multiple of 64 values, but the model's experts' intermediate_size is 96"),
        (["--weight_only_precision", "int4", "--group_size", "48"], WIDE, "group_size is 48: it is one of 32, 64, 128"),
        (["--group_size", "32"], WIDE, "group_size is for --weight_only_precision int4"),
        (["--quant_algo", "W8A8"], WIDE, "quant_algo W8A8 is for --target openvino: the onnx target multiplies with "
         "activations of the engine's dtype, which is W8A16"),
        (["--weight_only_precision", "int8", "--quant_algo", "W4A16"], WIDE,
         "quant_algo W4A16 has int4 weights, not int8: give one of them"),
    ],
)  # fmt: skip
def test_what_cannot_be_quantised_is_refused(
    arguments: list[str],
    changes: dict[str, Any],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint", num_hidden_layers=1, **changes)
    capsys.readouterr()
    command = ["build", "--checkpoint_dir", str(checkpoint), "--output_dir", str(tmp_path / "engine")]
    assert main([*command, "--target", "onnx", "--use_weight_only", *arguments]) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_precision_beside_another_quant_algo_is_refused_without_use_weight_only_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint", num_hidden_layers=1, **WIDE)
    command = ["build", "--checkpoint_dir", str(checkpoint), "--output_dir", str(tmp_path / "engine")]
    assert main([*command, "--quant_algo", "W8A8", "--weight_only_precision", "int4"]) == 1
    assert "quant_algo W8A8 has int8 weights, not int4: give one of them" in capsys.readouterr().err
    assert not (tmp_path / "engine").exists()


def test_a_broken_weight_leaves_nothing_behind(tmp_path: Path) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint", **WIDE)
    weights = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"][3, 4] = np.nan
    safetensors.numpy.save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(BuildError, match=r"layers\.1\.self_attn\.o_proj\.weight has values that are not finite"):
        build(checkpoint, tmp_path / "engine", target="onnx", weight_only_precision="int8", **SIZES)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_groups_of_weights_that_are_not_quantised_are_refused(tmp_path: Path) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint", num_hidden_layers=1)
    with pytest.raises(BuildError, match="group_size is for --use_weight_only"):
        build(checkpoint, tmp_path / "engine", target="onnx", group_size=32)
    assert not (tmp_path / "engine").exists()
