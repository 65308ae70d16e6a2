# SPDX-License-Identifier: Apache-2.0
"""The TensorRT target without a GPU: the lowered graph's numbers, its bindings, and a real compiler's word on it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
from lowered import (
    NUMPY,
    SIZES,
    Lowered,
    assert_mamba_steps_equal_transformers,
    assert_steps_equal_transformers,
    sequences,
)
from onnx import TensorProto

from adaptive_k_moe.cli import main
from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_builder.build import dry_run
from adaptive_k_moe.engine_builder.graph.graph_builder import DATA_TYPES
from adaptive_k_moe.engine_builder.targets import tensorrt as target
from adaptive_k_moe.engine_builder.targets.tensorrt_compiler import Tensor, require_bindings
from adaptive_k_moe.engine_builder.targets.tensorrt_lowering import for_plugin
from adaptive_k_moe.engine_config import BuildConfig, read_engine_config
from adaptive_k_moe.engine_format.tensorrt import PROFILES, Binding, make_bindings
from adaptive_k_moe.errors import BuildError, DependencyError
from adaptive_k_moe.model_config import Dtype, PretrainedConfig
from adaptive_k_moe.tensorrt_plugin import PLUGIN_VARIABLE

from checkpoints import MIXTRAL_SMALL, Shape, make_checkpoint
from nemotron_models import Nemotron, make_nemotron

# TensorRT's attention has kernels for some head sizes only.
COMPILED = {"head_dim": 16}

SHAPES = [
    Shape("plain"),
    Shape("one KV head, tied, gelu", {"num_key_value_heads": 1, "tie_word_embeddings": True, "hidden_act": "gelu"}),
    Shape("bias, shared expert, dense layer", {"mlp_only_layers": [0]}, "qwen2_moe"),
    Shape("norms of heads, window", {"sliding_window": 9, "use_sliding_window": True}, "qwen3_moe"),
    Shape("no GQA, clipped", {"num_key_value_heads": 4, "clip_qkv": 0.7}, "olmoe"),
]


NEMOTRONS = [
    Nemotron("every kind of layer", "ME*-ME", COMPILED),
    Nemotron("Mamba and experts alone", "MEM-E", {"conv_kernel": 7}),
    Nemotron("one group, latent experts, biases", "*MEM", {"n_groups": 1, "mamba_num_heads": 5, "mamba_head_dim": 7,
             "moe_latent_size": 28, "mlp_bias": True, "use_bias": True, **COMPILED}),
    Nemotron("two taps, no bias, steps at their limit", "ME*",
             {"conv_kernel": 2, "use_conv_bias": False, "time_step_min": 0.7}),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_lowered_graph_equals_transformers(shape: Shape, tmp_path: Path) -> None:
    assert_steps_equal_transformers(Lowered(tmp_path, shape, "float32"), 1e-4)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_the_float16_graph_is_near_transformers_in_float32(shape: Shape, tmp_path: Path) -> None:
    assert_steps_equal_transformers(Lowered(tmp_path, shape, "float16"), 1e-2)


@pytest.mark.parametrize("shape", NEMOTRONS, ids=str)
def test_the_lowered_graph_with_mamba_layers_equals_transformers(shape: Nemotron, tmp_path: Path) -> None:
    assert_mamba_steps_equal_transformers(Lowered(tmp_path, shape, "float32"), 1e-4)


@pytest.mark.parametrize("shape", NEMOTRONS[:3], ids=str)
def test_the_float16_graph_with_mamba_layers_is_near_transformers(shape: Nemotron, tmp_path: Path) -> None:
    assert_mamba_steps_equal_transformers(Lowered(tmp_path, shape, "float16"), 1e-2)


def test_policies_choose_as_in_the_unlowered_graph(tmp_path: Path) -> None:
    lowered = Lowered(tmp_path, Shape("plain"), "float32")
    text = sequences(lowered)[2][None, :16]
    given = lowered.step([1], text, [0], [15], "mixed")
    assert set(given["k"].ravel()) == {1, 2, 3}
    limits = np.searchsorted([1.0, 1.4], given["entropy"], side="right")
    np.testing.assert_array_equal(given["k"], limits + 1)


@pytest.mark.parametrize("profile", range(len(PROFILES)), ids=PROFILES)
@pytest.mark.parametrize("corner", ["min", "opt", "max"])
def test_the_graph_takes_the_corners_of_each_profile(profile: int, corner: str, lowered_plain: Lowered) -> None:
    """The shapes must fit each other: so many tokens as sequences have, tables of one size."""
    shapes = {b.name: getattr(b.profiles[profile], corner) for b in lowered_plain.table}
    feed = {b.name: np.ones(shapes[b.name], NUMPY[b.dtype]) for b in lowered_plain.table if b.is_input}
    feed["policy_index"][:], feed["policy_kind"][:] = 0, 0
    feed["logits_indices"][:], feed["write_indices"][:] = 0, 0
    given = lowered_plain.run(feed)
    assert {name: array.shape for name, array in given.items()} == {
        b.name: shapes[b.name] for b in lowered_plain.table if not b.is_input
    }


def test_the_profiles_are_decode_and_a_chunk_of_one_sequence(lowered_plain: Lowered) -> None:
    decode, prefill = lowered_plain.table[0].profiles
    assert (decode.min, decode.opt, decode.max) == ((1, 1), (3, 1), (3, 1))
    assert (prefill.min, prefill.opt, prefill.max) == ((1, 1), (1, 16), (1, 16))
    logits = next(b for b in lowered_plain.table if b.name == "logits_indices").profiles
    assert [limits.max for limits in logits] == [(3,), (16,)]
    small = BuildConfig(target="tensorrt", max_batch_size=2, max_seq_len=5, max_num_tokens=99)
    assert make_bindings(lowered_plain.model, small)[0].profiles[1].max == (1, 5)


def test_a_cache_goes_in_and_out_in_place(lowered_plain: Lowered) -> None:
    inputs = {b.name: b for b in lowered_plain.table if b.is_input}
    pairs = [(b, inputs[b.in_place_of]) for b in lowered_plain.table if b.in_place_of is not None]
    assert len(pairs) == 2 * len(lowered_plain.model.attention_layers)
    scatters = {
        node.output[0]: node.input[0] for node in lowered_plain.proto.graph.node if node.op_type == "TensorScatter"
    }
    for present, past in pairs:
        assert dataclasses.replace(present, name=past.name, is_input=True, in_place_of=None) == past
        assert scatters[present.name] == past.name


@pytest.fixture(scope="module")
def lowered_plain(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    return Lowered(tmp_path_factory.mktemp("plain"), Shape("plain"), "float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=str)
def test_the_graph_for_the_plugin_gives_it_the_types_that_it_takes(shape: Shape, dtype: Dtype, tmp_path: Path) -> None:
    lowered = Lowered(tmp_path, shape, dtype)
    typed = onnx.shape_inference.infer_shapes(lowered.proto, strict_mode=True)
    types = {v.name: v.type.tensor_type.elem_type for v in [*typed.graph.value_info, *typed.graph.input]}
    types |= {initializer.name: initializer.data_type for initializer in typed.graph.initializer}
    own, f32, i32 = DATA_TYPES[dtype], TensorProto.FLOAT, TensorProto.INT32
    proto = for_plugin(lowered.proto)
    assert not proto.functions
    nodes = [node for node in proto.graph.node if node.op_type == "AdaptiveKMoe"]
    assert len(nodes) == lowered.model.num_moe_layers
    for node in nodes:
        assert [types[name] for name in node.input] == [own, f32, i32, i32, f32, i32, own, own, f32]
        assert [types[name] for name in node.output] == [own, i32, f32, i32]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (attributes["plugin_namespace"], attributes["plugin_version"]) == (b"adaptive_k", b"1")
        assert attributes["weight_format"] == dtype.encode()
    # Nothing float32 is left beside the router, the policies and what is reported.
    wide = {name for name, type_ in types.items() if type_ == f32}
    products = {n.output[0] for n in proto.graph.node if n.op_type == "MatMul" and n.output[0] in wide}
    assert products == {node.input[1] for node in nodes}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_graph_for_the_plugin_gives_mamba_the_types_that_it_takes(dtype: Dtype, tmp_path: Path) -> None:
    lowered = Lowered(tmp_path, NEMOTRONS[0], dtype)
    typed = onnx.shape_inference.infer_shapes(lowered.proto, strict_mode=True)
    types = {v.name: v.type.tensor_type.elem_type for v in (*typed.graph.value_info, *typed.graph.input)}
    types |= {v.name: v.type.tensor_type.elem_type for v in typed.graph.output}
    types |= {initializer.name: initializer.data_type for initializer in typed.graph.initializer}
    own, f32, i32 = DATA_TYPES[dtype], TensorProto.FLOAT, TensorProto.INT32
    graph = for_plugin(lowered.proto).graph
    nodes = [node for node in graph.node if node.op_type == "Mamba2"]
    assert len(nodes) == 2
    for node in nodes:
        assert [types[name] for name in node.input] == [own, own, i32, i32, i32, f32, f32, f32, f32, f32, own, f32]
        assert [types[name] for name in node.output] == [own, own, f32]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (attributes["plugin_namespace"], attributes["plugin_version"]) == (b"adaptive_k", b"1")
        assert attributes["n_groups"] == 3
        assert attributes["dt_min"] == pytest.approx(0.01)
    # The gated norm behind it, and nothing else beside the router, computes in float32.
    norms = [node for node in graph.node if node.op_type == "RMSNormalization" and types[node.output[0]] == f32]
    assert len(norms) == 2
    wide = [node for node in graph.node if node.op_type == "MatMul" and types.get(node.output[0]) == f32]
    assert len(wide) == lowered.model.num_moe_layers


def test_weights_keep_their_values_in_the_new_type(tmp_path: Path) -> None:
    wide = build(make_checkpoint(tmp_path / "checkpoint", SHAPES[2]), tmp_path / "wide", target="onnx", **SIZES)
    before = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "wide/model.onnx").graph.initializer}
    lowered = Lowered(tmp_path / "lowered", SHAPES[2], "float16")
    assert wide.pretrained_config.dtype == "float32"
    halves = 0
    for tensor in onnx.load(lowered.path).graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if tensor.name == "expert_load.axis":
            continue  # no weight: the lowering's own
        assert tensor.data_type != TensorProto.FLOAT or "gate.weight" in tensor.name, tensor.name
        halves += array.dtype == np.float16
        np.testing.assert_array_equal(array, before[tensor.name].astype(array.dtype))
    assert halves > 20


def mutations(table: list[Binding]) -> dict[str, list[Binding]]:
    """The table with one fault each."""

    def changed(index: int, **changes: Any) -> list[Binding]:
        return [dataclasses.replace(b, **changes) if i == index else b for i, b in enumerate(table)]

    return {
        "an input's name": changed(0, name="ids"),
        "an output's name": changed(-1 % len(table), name="present.9.value"),
        "an input's type": changed(4, dtype="int64"),
        "an output's type": changed(len(table) - 1, dtype="float32"),
        "a fixed size": changed(8, shape=("batch", 2, 41, 12)),
        "a size that should be open": changed(0, shape=(3, "sequence")),
        "a rank": changed(2, shape=("batch", 1)),
        "the order": [table[1], table[0], *table[2:]],
        "one too few": table[:-1],
        "one too many": [*table, table[-1]],
    }


FAULTS = list(mutations([Binding(str(i), True, "int32", ("batch",), ()) for i in range(10)]))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_network_with_other_bindings_is_refused(fault: str) -> None:
    model = PretrainedConfig.model_validate(_plain_model())
    table = make_bindings(model, BuildConfig(target="tensorrt", **SIZES))
    tensors = [
        Tensor(b.name, b.is_input, b.dtype, tuple(-1 if isinstance(size, str) else size for size in b.shape))
        for b in table
    ]
    require_bindings(tensors, table)
    with pytest.raises(BuildError, match="table of bindings"):
        require_bindings(tensors, mutations(table)[fault])


def test_mambas_states_in_the_table_are_held_to_the_network() -> None:
    mamba = {"num_heads": 4, "head_dim": 8, "state_size": 16, "n_groups": 2, "conv_kernel": 4, "layers": [0]}
    model = PretrainedConfig.model_validate({**_plain_model(), "mamba": mamba})
    table = make_bindings(model, BuildConfig(target="tensorrt", **SIZES))
    by_name = {b.name: b for b in table}
    assert by_name["conv_state.0"].shape == ("num_slots", 3, 96)
    assert by_name["conv_state.0"].dtype == "float16"
    assert by_name["ssm_state.0"].shape == ("num_slots", 4, 16, 8)
    assert by_name["ssm_state.0"].dtype == "float32"
    for kind in ("conv", "ssm"):
        past, present = by_name[f"{kind}_state.0"], by_name[f"present_{kind}_state.0"]
        assert dataclasses.replace(present, name=past.name, is_input=True, in_place_of=None) == past
        assert present.in_place_of == past.name
        assert [(limits.min[0], limits.max[0]) for limits in past.profiles] == [(1, 3)] * 2  # all slots
    assert by_name["state_slots"].dtype == "int32"
    tensors = [
        Tensor(b.name, b.is_input, b.dtype, tuple(-1 if isinstance(size, str) else size for size in b.shape))
        for b in table
    ]
    require_bindings(tensors, table)
    index = {b.name: i for i, b in enumerate(table)}
    wrong = {
        "the scan's state in 16 bits": ("ssm_state.0", {"dtype": "float16"}),
        "the convolution's in 32": ("present_conv_state.0", {"dtype": "float32"}),
        "the state's axes exchanged": ("ssm_state.0", {"shape": ("num_slots", 4, 8, 16)}),
        "a tap too many": ("conv_state.0", {"shape": ("num_slots", 4, 96)}),
        "slots as int64": ("state_slots", {"dtype": "int64"}),
        "another name": ("present_ssm_state.0", {"name": "ssm_state_out.0"}),
    }
    for name, changes in wrong.values():
        faulty = list(table)
        faulty[index[name]] = dataclasses.replace(by_name[name], **changes)  # type: ignore[arg-type]
        with pytest.raises(BuildError, match="table of bindings"):
            require_bindings(tensors, faulty)
    without = [b for b in table if b.name != "state_slots"]
    with pytest.raises(BuildError, match="table of bindings"):
        require_bindings(tensors, without)


def _plain_model() -> dict[str, Any]:
    moe = {
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "intermediate_size": 56,
        "activation": "swiglu",
        "layers": [0, 1],
    }
    return {
        "architecture": "MixtralForCausalLM",
        "dtype": "float16",
        "vocab_size": 101,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "moe": moe,
    }


# A real compiler. ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "capabilities"),
    [
        (Shape("GQA", COMPILED), "float16", ("SM89", "SM120")),
        (Shape("bias, shared expert", {**COMPILED, "mlp_only_layers": [0]}, "qwen2_moe"), "bfloat16", ("SM89",)),
        (Shape("clipped", {"hidden_size": 64, "num_key_value_heads": 4, "clip_qkv": 0.7}, "olmoe"),
         "float16", ("SM89",)),
        (NEMOTRONS[0], "float16", ("SM89", "SM120")),
        (NEMOTRONS[1], "bfloat16", ("SM89",)),
    ],
    ids=str,
)  # fmt: skip
def test_tensorrt_for_rtx_compiles_the_graph_with_the_tables_bindings(
    shape: Shape | Nemotron, dtype: Dtype, capabilities: tuple[str, ...], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    lowered = Lowered(tmp_path, shape, dtype)
    for capability in capabilities:
        result = target.compile_ahead(lowered.path, lowered.model, lowered.build, capability)
        assert "error" not in result, result
        assert result["capability"] == capability
        assert result["fused_attention"]
        assert result["tensors"] == [
            {
                "name": b.name,
                "is_input": b.is_input,
                "dtype": b.dtype,
                "shape": [-1 if isinstance(size, str) else size for size in b.shape],
            }
            for b in lowered.table
        ]
        for index, given in enumerate(result["profiles"]):
            for binding in lowered.table:
                if binding.is_input and any(isinstance(size, str) for size in binding.shape):
                    limits = binding.profiles[index]
                    assert given[binding.name] == [list(limits.min), list(limits.opt), list(limits.max)]
        layers = len(lowered.model.attention_layers)
        assert result["layers"].get("KV_CACHE_UPDATE", 0) == 2 * layers
        assert result["layers"].get("ATTENTION_INPUT", 0) == layers
        mamba = lowered.model.mamba
        assert result["layers"].get("TRIP_LIMIT", 0) == (len(mamba.layers) if mamba else 0)  # a loop over the tokens
        assert result["bytes"] > 100_000


def test_a_graph_that_the_compiler_refuses_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    lowered = Lowered(tmp_path, Shape("plain"), "float16")
    other = lowered.build.model_copy(update={"max_seq_len": 39})
    result = target.compile_ahead(lowered.path, lowered.model, other, "SM89")
    assert "table of bindings" in result["error"]


def test_attention_without_a_kernel_is_taken_apart_and_said_so(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    lowered = Lowered(tmp_path, Shape("plain"), "float16")  # heads of 12
    result = target.compile_ahead(lowered.path, lowered.model, lowered.build, "SM89")
    assert "error" not in result, result
    assert not result["fused_attention"]
    found = target.DryRun(lowered.model, lowered.build, lowered.table, 0, 0, [result], None)
    assert any("no fused kernel" in line for line in found.lines())


# TensorRT for RTX in TensorRT's place: all of a build but the plugin, which it cannot take.
STAND_IN = """
import sys
from pathlib import Path
from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_builder.targets import tensorrt as target
from adaptive_k_moe.engine_builder.targets import tensorrt_lowering as lowering
import tensorrt_rtx_bindings as tensorrt_rtx
target.require_tensorrt = lambda: tensorrt_rtx
target.for_plugin = lambda lowered: lowered
phases = []
build(sys.argv[1], sys.argv[2], target="tensorrt", max_batch_size=2, max_seq_len=32, timing_cache=sys.argv[3],
      progress=lambda part, done, total: phases.append(part))
assert "TensorRT: Building engine" in phases, phases
"""


def test_a_build_writes_the_engine_directory(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Shape("GQA", {**COMPILED, "num_hidden_layers": 1}))
    arguments = [str(checkpoint), str(tmp_path / "engine"), str(tmp_path / "timings")]
    subprocess.run([sys.executable, "-c", STAND_IN, *arguments], check=True)
    config = read_engine_config(tmp_path / "engine")
    assert (config.build_config.target, config.pretrained_config.dtype) == ("tensorrt", "float16")
    assert "rank0.engine" in config.files
    assert not [name for name in config.files if "onnx" in name]
    assert (tmp_path / "timings").stat().st_size > 0


# The command. ----------------------------------------------------------------------------------------


def test_without_tensorrt_a_build_says_what_to_install_and_what_works_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    arguments = ["build", "--checkpoint_dir", str(MIXTRAL_SMALL), "--target", "tensorrt"]
    assert main([*arguments, "--output_dir", str(tmp_path / "engine")]) != 0
    error = capsys.readouterr().err
    assert "pip install tensorrt" in error
    assert "--target openvino works" in error
    assert not list(tmp_path.iterdir())


class Registry:
    """A plugin registry that knows our operator, or comes to know it from a library that it can load."""

    def __init__(self, *, known: bool = False, loads: bool = True) -> None:
        self.known, self.loads, self.loaded = known, loads, list[str]()

    def get_creator(self, *key: str) -> object | None:
        assert key == ("AdaptiveKMoe", "1", "adaptive_k")
        return self if self.known else None

    def load_library(self, path: str) -> object | None:
        self.loaded.append(path)
        return self if self.loads else None


def test_the_plugin_is_loaded_once_and_its_absence_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_registry(registry: Registry) -> None:
        module = SimpleNamespace(Builder=object, get_plugin_registry=lambda: registry)
        monkeypatch.setitem(sys.modules, "tensorrt", module)

    library = tmp_path / "plugin.so"
    monkeypatch.setenv(PLUGIN_VARIABLE, str(library))
    with_registry(Registry(known=True))
    target.require_tensorrt()
    with_registry(Registry())
    with pytest.raises(DependencyError, match=r"plugin\.so is not there: build it .* in ADAPTIVE_K_TENSORRT_LIBRARY"):
        target.require_tensorrt()
    library.touch()
    registry = Registry()
    with_registry(registry)
    target.require_tensorrt()
    assert registry.loaded == [str(library)]
    with_registry(Registry(loads=False))
    with pytest.raises(DependencyError, match=r"cannot load the plugin .*plugin\.so"):
        target.require_tensorrt()


def test_a_dry_run_prints_bindings_memory_and_what_was_proved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "CAPABILITIES", ("SM89",))
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Shape("GQA", COMPILED))
    assert main(["build", "--checkpoint_dir", str(checkpoint), "--target", "tensorrt", "--dry_run"]) == 0
    text = capsys.readouterr().out
    for expected in (
        "past_key_values.0.value",
        "and such a cache for each of 2 layers",
        "[batch,2,256,16]",
        "[1,1] [16,1] [16,1]",
        "cache 0.1 MB a sequence, 1.0 MB for 16",
        "not checked: the plugin in the engine, numbers on a GPU, speed",
    ):
        assert expected in text
    assert ("compiled by TensorRT for RTX" in text) == target.has_compiler()


def test_a_dry_run_without_a_compiler_says_that_only_the_lowering_was_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(target, "has_compiler", lambda: False)
    found = dry_run(MIXTRAL_SMALL)
    assert not found.failed
    assert not found.compiled
    assert any(line.startswith("not compiled: TensorRT for RTX is not installed") for line in found.lines())


def test_slots_that_tensorrt_cannot_address_are_refused_before_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Shape("plain"))  # 2 key-value heads of 12
    monkeypatch.setattr(target, "has_compiler", lambda: False)
    monkeypatch.setattr(target, "require_tensorrt", lambda: None)
    with pytest.raises(BuildError, match=r"'past_key_values\.0\.key' has 1584 bytes, .* multiples of 256 only: choose"):
        build(checkpoint, tmp_path / "engine", target="tensorrt", max_seq_len=33)
    assert not (tmp_path / "engine").exists()
    for length, said in ((33, True), (32, False)):
        lines = dry_run(checkpoint, max_seq_len=length).lines()
        assert any(line.startswith("no session could run it: a sequence's part") for line in lines) == said


def test_sizes_that_the_kernels_do_not_take_are_refused_before_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "has_compiler", lambda: False)
    monkeypatch.setattr(target, "require_tensorrt", lambda: None)
    fits = {"moe_intermediate_size": 24, "mamba_head_dim": 8, "ssm_state_size": 8}
    for changes, sentence in (
        (
            {"moe_intermediate_size": 20},
            "the experts' intermediate size is 20, and the CUDA kernels take multiples of 8",
        ),
        ({"mamba_head_dim": 12}, "the width of the Mamba heads is 12, and the CUDA kernels take multiples of 8"),
        ({"ssm_state_size": 264}, "the CUDA kernels take Mamba states of at most 256, and the model's have 264"),
    ):
        checkpoint = make_nemotron(tmp_path / str(changes), Nemotron("odd", "ME*", {**fits, **changes}))
        with pytest.raises(BuildError, match=f"^{sentence}"):
            build(checkpoint, tmp_path / "engine", target="tensorrt")
        assert not (tmp_path / "engine").exists()
        assert f"the plugin could not run it: {sentence}" in dry_run(checkpoint, dtype="float16").lines()
    good = make_nemotron(tmp_path / "good", Nemotron("even", "ME*", fits))
    lines = dry_run(good, dtype="float16").lines()
    assert not [line for line in lines if line.startswith("the plugin could not")]
    assert any("ssm_state.0" in line and "float32" in line and "[num_slots,6,8,8]" in line for line in lines)
    assert "  and such states for each of 1 layers" in lines


def test_what_the_target_cannot_build_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildError, match="no dtype 'float32': it is one of float16, bfloat16"):
        dry_run(MIXTRAL_SMALL, dtype="float32")
    with pytest.raises(BuildError, match="openvino target has no dtype 'float16'"):
        build(MIXTRAL_SMALL, tmp_path / "engine", dtype="float16")
    assert main(["build", "--checkpoint_dir", str(MIXTRAL_SMALL), "--dry_run"]) != 0
    checkpoint = make_checkpoint(tmp_path / "large", Shape("plain"))
    weights = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    weights["lm_head.weight"][3, 4] = 1e5
    safetensors.numpy.save_file(weights, checkpoint / "model.safetensors")
    monkeypatch.setattr(target, "has_compiler", lambda: False)
    with pytest.raises(BuildError, match=r"lm_head\.weight has values beyond float16's range"):
        dry_run(checkpoint)
    dry_run(checkpoint, dtype="bfloat16")
