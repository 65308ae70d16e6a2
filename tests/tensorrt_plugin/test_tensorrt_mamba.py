# SPDX-License-Identifier: Apache-2.0
"""Mamba2's plugin: fields, types, shapes, formats and workspace, what it hands to the kernels, what it computes
with them in the interpreter, and its place in a real TensorRT's registry and parser."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import plugin_harness as h
import pytest
from plugin_harness import BF16, FLOAT, HALF, INT8, INT32, INT64, Field, MambaTensors, Plugin, PluginLibrary, Recorder
from test_tensorrt_registry import all_of, eleven, encounter  # noqa: F401 (a fixture)

from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_builder.graph.mamba_function import INPUTS, OUTPUTS, mamba_attributes
from adaptive_k_moe.engine_builder.targets.tensorrt_lowering import for_plugin, lower_graph
from adaptive_k_moe.model_config import MambaConfig

from nemotron_models import Nemotron, make_nemotron  # isort: skip
from mamba_oracle import Array, Case, make_inputs, oracle

CREATOR = 2  # in the library: Mamba2 without a namespace; 3 is the one with
ATTRIBUTES = {"n_groups": 2, "dt_min": 0.25, "dt_max": 8.0}
ELEMENTS = {FLOAT: np.dtype(np.float32), HALF: np.dtype(np.float16), BF16: np.dtype(ml_dtypes.bfloat16)}
STEP = MambaTensors(tokens=7, sequences=3, slots=5)


@pytest.fixture
def plugin(library: PluginLibrary) -> Iterator[Plugin]:
    made = library.made(creator=CREATOR, n_groups=2)
    yield made
    made.destroy()


def errors(plugin: Plugin) -> str:
    """The one sentence that was logged."""
    [sentence] = plugin.library.errors()
    assert sentence.startswith("Mamba2: ")
    assert "\n" not in sentence
    return sentence.removeprefix("Mamba2: ")


# ---------------------------------------------------------------- fields


def test_the_announced_fields_are_the_onnx_attributes_and_the_upper_limit(library: PluginLibrary) -> None:
    config = MambaConfig(num_heads=4, head_dim=8, state_size=16, n_groups=2, conv_kernel=4, layers=[0])
    types = {int: h.F_INT32, float: h.F_FLOAT32}
    expected = {name: types[type(value)] for name, value in mamba_attributes(config).items()}
    for creator in library.creators()[CREATOR:]:
        assert creator.fields == {**expected, "dt_max": h.F_FLOAT32}


def test_fields_travel_through_an_engine(library: PluginLibrary) -> None:
    for index, creator in enumerate(library.creators()[CREATOR:], start=CREATOR):
        plugin = library.made(creator=index, **ATTRIBUTES)
        assert plugin.text()[:3] == [creator.name, creator.version, creator.namespace]
        again = library.create(plugin.serialized(), creator=index, phase=h.RUNTIME_PHASE)
        assert again is not None
        assert again.serialized() == plugin.serialized()
        assert again.cache_id == plugin.cache_id == "n_groups=2 dt_min=0.25 dt_max=8"
        for each in (plugin, again):
            each.destroy()


def test_absent_fields_have_the_operators_defaults(library: PluginLibrary) -> None:
    plugin = library.made(creator=CREATOR)
    assert {f.name: f.data for f in plugin.serialized()} == {
        "n_groups": struct.pack("i", 1),
        "dt_min": struct.pack("f", 0.0),
        "dt_max": struct.pack("f", float("inf")),
    }
    plugin.destroy()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"groups": 2}, "field groups is not known; the fields are n_groups, dt_min, dt_max"),
        ({"n_groups": "two"}, "field n_groups has type CHAR and length 4 but must be one INT32 or INT64"),
        ({"dt_min": 1}, "field dt_min has type INT32 and length 1 but must be one FLOAT32 or FLOAT64"),
        ({"n_groups": 0}, "field n_groups must be at least 1 and divide the heads (n_groups=0 dt_min=0 dt_max=inf)"),
        ({"dt_min": 2.0, "dt_max": 1.0}, "field dt_min and dt_max must rise from 0 (n_groups=1 dt_min=2 dt_max=1)"),
        ({"dt_min": float("nan")}, "field dt_min and dt_max must rise from 0 (n_groups=1 dt_min=nan dt_max=inf)"),
    ],
)
def test_wrong_fields_are_one_sentence_and_no_plugin(
    library: PluginLibrary, fields: dict[str, Any], sentence: str
) -> None:
    assert library.create(creator=CREATOR, **fields) is None
    assert library.errors() == [f"Mamba2: layer layers.0.moe: {sentence}"]


def test_repeated_fields_and_fields_that_are_none_are_refused(library: PluginLibrary) -> None:
    one = h.to_field("n_groups", 1)
    for fields, sentence in (
        ([one, one], "field n_groups is given twice"),
        ([Field(None, h.F_INT32, 1, b"1234")], "field number 0 has no name"),
        ([replace(one, data=None)], "field n_groups has no data"),
        (None, "the collection of fields is null"),
    ):
        assert library.create(fields, creator=CREATOR) is None
        assert library.errors() == [f"Mamba2: layer layers.0.moe: {sentence}"]


# ---------------------------------------------------------------- types, shapes, formats


@pytest.mark.parametrize("element", ELEMENTS)
def test_output_types_and_shapes(plugin: Plugin, element: int) -> None:
    tensors = replace(MambaTensors(), element=element)
    assert plugin.output_types([t.type for t in tensors.inputs()]) == [element, element, FLOAT]
    assert plugin.output_shapes(tensors.inputs()) == "0.0 32;10.0 3 96;11.0 4 16 8;"
    fixed = replace(tensors, tokens=7, sequences=3, slots=5)
    assert plugin.output_shapes(fixed.inputs()) == "7 32;5 3 96;5 4 16 8;"


def test_output_shapes_with_nothing_known_but_the_ranks(plugin: Plugin) -> None:
    inputs = [h.Tensor(t.type, (-1,) * len(t.shape)) for t in MambaTensors().inputs()]
    assert plugin.output_shapes(inputs) == "0.0 operation;10.0 10.1 10.2;11.0 11.1 11.2 11.3;"


@pytest.mark.parametrize("element", ELEMENTS)
def test_exactly_the_right_types_in_linear_format_are_supported(plugin: Plugin, element: int) -> None:
    tensors = replace(MambaTensors(), element=element)
    inputs, outputs = tensors.inputs(), tensors.outputs()
    for pos, tensor in enumerate([*inputs, *outputs]):
        assert plugin.supports(pos, inputs, outputs)
        right = tensor.type
        for wrong in {FLOAT, HALF, BF16, INT8, INT32, INT64, h.BOOL} - {right}:
            tensor.type = wrong
            # conv_input leads: any float type is right there, and the others must follow it.
            assert plugin.supports(pos, inputs, outputs) == (pos == 0 and wrong in ELEMENTS)
        tensor.type = right
        tensor.format = h.CHW32
        assert not plugin.supports(pos, inputs, outputs)
        tensor.format = h.LINEAR
    assert plugin.library.log() == []
    assert not plugin.supports(15, inputs, outputs)
    assert errors(plugin) == "was asked for the format of tensor 15 of 15"


def test_the_workspace_is_for_the_most_tokens(plugin: Plugin, recorder: Recorder) -> None:
    """The largest shapes of the inputs need not be those of one step."""
    tensors = MambaTensors(max_tokens=300)
    assert plugin.configure(tensors.inputs(), tensors.outputs()) == 0, plugin.library.log()
    assert plugin.workspace(tensors.inputs(), tensors.outputs()) == 2000 + 300
    assert recorder.read_mamba().shape["tokens"] == 300


# ---------------------------------------------------------------- the kernels


@pytest.mark.parametrize("through", ["itself", "clone", "context", "engine"])
def test_enqueue_hands_everything_to_its_place(library: PluginLibrary, recorder: Recorder, through: str) -> None:
    plugin = library.made(creator=CREATOR, **ATTRIBUTES)
    if through == "clone":
        running = plugin.clone()
    elif through == "context":
        running = plugin.attach()
    elif through == "engine":
        again = library.create(plugin.serialized(), creator=CREATOR, phase=h.RUNTIME_PHASE)
        assert again is not None
        running = again
    else:
        running = plugin
    inputs, outputs = STEP.inputs(), STEP.outputs()
    assert running.shape_change(inputs, outputs) == 0, library.log()
    before = recorder.launches()
    given, made = [0x1000 + 16 * i for i in range(12)], [0x9000, 0x10A0, 0x10B0]  # the states in place
    assert running.enqueue(inputs, outputs, given, made, workspace=0xA000, stream=0xB000) == 0
    assert recorder.launches() == before + 1
    found = recorder.read_mamba()
    assert found.shape == {
        "tokens": 7, "sequences": 3, "slots": 5, "heads": 4, "head_dim": 8, "state_size": 16, "taps": 4, "element": 0,
    }  # fmt: skip
    assert found.params == ATTRIBUTES
    assert found.pointers == dict(zip(Recorder.MAMBA_POINTERS, [*given, *made, 0xA000, 0xB000], strict=True))
    for each in {id(running): running, id(plugin): plugin}.values():
        each.destroy()


@pytest.mark.parametrize(("element", "value"), [(HALF, 0), (BF16, 1), (FLOAT, 2)])
def test_the_kernels_get_the_element_type(plugin: Plugin, recorder: Recorder, element: int, value: int) -> None:
    step = replace(STEP, element=element)
    assert plugin.shape_change(step.inputs(), step.outputs()) == 0
    assert recorder.read_mamba().shape["element"] == value


def test_a_change_that_nobody_announced_is_noticed(plugin: Plugin, recorder: Recorder) -> None:
    assert plugin.configure(MambaTensors().inputs(), MambaTensors().outputs()) == 0
    clone = plugin.clone()
    for step in (STEP, replace(STEP, tokens=1, sequences=1), replace(STEP, slots=1, sequences=0, tokens=0)):
        assert clone.enqueue(step.inputs(), step.outputs(), [16] * 12, [16] * 3) == 0
        shape = recorder.read_mamba().shape
        assert [shape[name] for name in ("tokens", "sequences", "slots")] == [step.tokens, step.sequences, step.slots]
    launches = recorder.launches()
    wrong = replace(STEP, replaced={4: h.Tensor(INT32, (2,))})
    assert clone.enqueue(wrong.inputs(), wrong.outputs(), [16] * 12, [16] * 3) != 0
    assert errors(plugin) == "input state_slots has shape [2] but must be [S = 3]"
    assert recorder.launches() == launches
    clone.destroy()


def test_nothing_runs_before_the_inputs_are_known(plugin: Plugin, recorder: Recorder) -> None:
    launches = recorder.launches()
    assert plugin.enqueue(STEP.inputs(), STEP.outputs(), [16] * 12, [16] * 3) != 0
    assert errors(plugin) == "was enqueued before its inputs were described and accepted"
    assert recorder.launches() == launches


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ({"refusal": "the kernels refuse"}, "the kernels refuse"),
        ({"throws": 1}, "the launcher threw"),
        ({"throws": 2}, "failed for a reason that it did not name"),
    ],
)
def test_what_the_kernels_refuse_is_refused_at_build_and_run_time(
    plugin: Plugin, recorder: Recorder, answer: dict[str, Any], sentence: str
) -> None:
    inputs, outputs = STEP.inputs(), STEP.outputs()
    recorder.answer(**answer)
    assert plugin.configure(inputs, outputs) != 0
    assert errors(plugin) == sentence
    assert plugin.workspace(inputs, outputs) == 0
    assert errors(plugin) == sentence
    assert plugin.shape_change(inputs, outputs) != 0
    assert errors(plugin) == sentence


def test_a_failed_launch_is_reported(plugin: Plugin, recorder: Recorder) -> None:
    assert plugin.shape_change(STEP.inputs(), STEP.outputs()) == 0
    recorder.answer(status=719)
    assert plugin.enqueue(STEP.inputs(), STEP.outputs(), [16] * 12, [16] * 3) != 0
    assert errors(plugin) == "its kernels were not launched (CUDA error 719)"


@pytest.mark.parametrize("count", [0, 11, 13])
def test_a_wrong_number_of_inputs_is_refused_everywhere(plugin: Plugin, count: int) -> None:
    inputs, outputs = (STEP.inputs() * 2)[:count], STEP.outputs()
    sentence = f"has {count} inputs but takes 12"
    for failed in (
        lambda: plugin.output_types([t.type for t in inputs]) is None,
        lambda: plugin.output_shapes(inputs) is None,
        lambda: not plugin.supports(0, inputs, outputs),
        lambda: plugin.configure(inputs, outputs) != 0,
        lambda: plugin.workspace(inputs, outputs) == 0,
        lambda: plugin.shape_change(inputs, outputs) != 0,
    ):
        assert failed()
        assert errors(plugin) == sentence


def test_a_wrong_number_of_outputs_is_refused(plugin: Plugin) -> None:
    assert plugin.configure(STEP.inputs(), STEP.outputs()[:2]) != 0
    assert errors(plugin) == "has 2 outputs but makes 3: y, present_conv_state and present_ssm_state"


def test_shape_inputs_are_refused(plugin: Plugin) -> None:
    assert plugin.output_shapes(STEP.inputs(), shape_inputs=1) is None
    assert errors(plugin) == "takes no shape inputs"


@pytest.mark.parametrize(
    ("index", "type_", "sentence"),
    [
        (0, INT32, "input conv_input has type int32 but must be float16, bfloat16 or float32"),
        (1, FLOAT, "input dt has type float32 but must be float16, as conv_input"),
        (2, INT64, "input subsequence_begins has type int64 but must be int32"),
        (5, HALF, "input conv_weight has type float16 but must be float32"),
        (7, HALF, "input A has type float16 but must be float32"),
        (10, FLOAT, "input conv_state has type float32 but must be float16, as conv_input"),
        (11, HALF, "input ssm_state has type float16 but must be float32"),
    ],
)
def test_a_wrong_type_is_named(plugin: Plugin, index: int, type_: int, sentence: str) -> None:
    inputs = STEP.inputs()
    inputs[index].type = type_
    assert plugin.output_types([t.type for t in inputs]) is None
    assert errors(plugin) == sentence
    assert plugin.configure(inputs, STEP.outputs()) != 0
    assert errors(plugin) == sentence


@pytest.mark.parametrize(
    ("index", "shape", "sentence"),
    [
        (0, (7,), "input conv_input has shape [7] but must be [T, channels]"),
        (1, (7, 5), "input A has shape [4] but must be [heads = 5]"),
        (5, (4, 95), "input conv_weight has shape [4, 95] but must be [K = 4, channels = 96]"),
        (10, (5, 2, 96), "input conv_state has shape [5, 2, 96] but must be [slots = 5, K - 1 = 3, channels = 96]"),
        (11, (5, 4, 16, 9), "input conv_input has 96 channels but heads * P + 2 * n_groups * N is 100"),
    ],
)
def test_a_wrong_shape_is_named(plugin: Plugin, index: int, shape: tuple[int, ...], sentence: str) -> None:
    step = replace(STEP, replaced={index: h.Tensor(STEP.inputs()[index].type, shape)})
    assert plugin.shape_change(step.inputs(), step.outputs()) != 0
    assert errors(plugin) == sentence


def test_fixed_sizes_must_be_known_when_the_engine_is_built(plugin: Plugin) -> None:
    inputs = MambaTensors().inputs()
    for i, tensor in enumerate(inputs):
        inputs[i] = replace(tensor, max=tuple(-1 for _ in tensor.shape))
    assert plugin.configure(inputs, MambaTensors().outputs()) != 0
    assert errors(plugin).endswith("must be known when the engine is built")


# ---------------------------------------------------------------- numbers


def aligned(array: Array) -> Array:
    """A copy at an address as the kernels need it."""
    memory = np.empty(array.nbytes + 256, np.uint8)
    skip = -memory.ctypes.data % 256
    copy = memory[skip : skip + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("element", ELEMENTS)
def test_steps_through_a_plugin_are_the_oracles(computing: PluginLibrary, element: int, in_place: bool) -> None:
    """Prefill, then a ragged step of decode and prefill, with the states where the first step left them."""
    dtype, tolerance = ELEMENTS[element], {FLOAT: 3e-6, HALF: 2e-3, BF16: 1.6e-2}[element]
    plugin = computing.made(creator=CREATOR, n_groups=2, dt_min=0.125)
    sizes: dict[str, Any] = {"heads": 4, "head_dim": 8, "state_size": 16, "n_groups": 2, "dt_min": 0.125}
    most = MambaTensors(max_tokens=64, element=element)
    assert plugin.configure(most.inputs(), most.outputs()) == 0
    workspace = aligned(np.zeros(plugin.workspace(most.inputs(), most.outputs()), np.uint8))
    running = plugin.attach()
    cases = [Case((40, 2), (0, 0), **sizes), Case((1, 5), (40, 2), **sizes)]
    states: list[Array] | None = None
    for number, case in enumerate(cases):
        arrays = make_inputs(case, number)
        arrays["conv_state"], arrays["ssm_state"] = arrays["conv_state"][:5], arrays["ssm_state"][:5]
        for name in ("conv_input", "dt", "conv_state"):
            arrays[name] = arrays[name].astype(dtype)
        arrays["state_slots"] = np.array([3, 1], np.int32)
        for name in ("conv_weight", "conv_bias", "a", "d", "dt_bias"):
            arrays[name] = make_inputs(cases[0], 0)[name]
        if states is not None:
            arrays["conv_state"], arrays["ssm_state"] = states
        exact = {n: x.astype(np.float32) if x.dtype.kind != "i" else x.copy() for n, x in arrays.items()}
        expected = oracle(case, exact)
        inputs = [aligned(array) for array in arrays.values()]
        step = MambaTensors(tokens=sum(case.lengths), sequences=2, slots=5, element=element)
        y = aligned(np.zeros((step.tokens, 32), dtype))
        made = [y, *(inputs[10:] if in_place else [aligned(np.zeros_like(x)) for x in inputs[10:]])]
        given = [x.ctypes.data for x in inputs]
        status = running.enqueue(
            step.inputs(), step.outputs(), given, [x.ctypes.data for x in made], workspace.ctypes.data
        )
        assert status == 0, computing.log()
        for found, value in zip(made, expected, strict=True):
            found = found.astype(np.float64)
            np.testing.assert_array_equal(np.isnan(found), np.isnan(value))
            assert np.nanmax(np.abs(found - value)) <= tolerance * np.nanmax(np.abs(value))
        states = [made[1].copy(), made[2].copy()]
    running.destroy()
    plugin.destroy()


def test_the_kernels_limits_are_refused_when_the_engine_is_built(computing: PluginLibrary) -> None:
    plugin = computing.made(creator=CREATOR, n_groups=2)
    tensors = MambaTensors(head_dim=12)
    assert plugin.configure(tensors.inputs(), tensors.outputs()) != 0
    assert errors(plugin) == "head_dim and state_size must be multiples of 8, for 16-byte loads"
    plugin.destroy()


# ---------------------------------------------------------------- a real TensorRT

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT for RTX is not installed"
)
CREATED = ["INFO", "Successfully created plugin: Mamba2"]


@needs_rtx
def test_the_registry_lists_the_creators_and_makes_a_plugin(eleven: PluginLibrary) -> None:  # noqa: F811
    told = encounter(eleven, namespace="adaptive_k", plugin="Mamba2", create=ATTRIBUTES)
    [creators] = all_of(told, "creators")
    assert ["Mamba2", "1", ""] in creators
    assert ["Mamba2", "1", "adaptive_k"] in creators
    assert all_of(told, "field names") == [list(ATTRIBUTES)]
    assert all_of(told, "plugin") == [["Mamba2", "1", "adaptive_k"]] * 2
    description = "n_groups=2 dt_min=0.25 dt_max=8"
    assert all_of(told, "build") == [[3, description, description]] * 2
    assert all_of(told, "ERROR") == []


def mamba_graph(tensors: MambaTensors, **attributes: Any) -> bytes:
    """An ONNX model of one node, as the lowering leaves it to the plugin."""
    types = onnx.TensorProto
    kinds = {INT32: types.INT32, FLOAT: types.FLOAT, HALF: types.FLOAT16, BF16: types.BFLOAT16}
    free = iter(f"size{i}" for i in range(100))

    def values(names: list[str], tensors: list[h.Tensor]) -> list[onnx.ValueInfoProto]:
        shapes = [[next(free) if size < 0 else size for size in t.shape] for t in tensors]
        return [
            onnx.helper.make_tensor_value_info(name, kinds[t.type], shape)
            for name, t, shape in zip(names, tensors, shapes, strict=True)
        ]

    node = onnx.helper.make_node("Mamba2", INPUTS, OUTPUTS, "layers.0.mamba", domain="adaptive_k", **attributes)
    inputs, outputs = values(INPUTS, tensors.inputs()), values(OUTPUTS, tensors.outputs())
    opsets = [onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid("adaptive_k", 1)]
    graph = onnx.helper.make_graph([node], "layer", inputs, outputs)
    return bytes(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString())


def mamba_model(path: Path, **attributes: Any) -> str:
    """Write such a model."""
    path.write_bytes(mamba_graph(MambaTensors(), **attributes))
    return str(path)


@needs_rtx
@pytest.mark.parametrize(
    "extra", [{}, {"plugin_namespace": "adaptive_k", "plugin_version": "1"}], ids=["domain-only", "named-namespace"]
)
def test_the_onnx_parser_resolves_the_node_to_the_plugin(
    eleven: PluginLibrary,  # noqa: F811
    extra: dict[str, str],
    tmp_path: Path,
) -> None:
    told = encounter(eleven, graph=mamba_model(tmp_path / "layer.onnx", **ATTRIBUTES, **extra))
    assert CREATED in told
    assert "Mamba2: layer layers.0.mamba: n_groups=2 dt_min=0.25 dt_max=8" in all_of(told, "VERBOSE")
    assert all_of(told, "ERROR") == []


@needs_rtx
def test_the_onnx_parser_reports_a_wrong_attribute(eleven: PluginLibrary, tmp_path: Path) -> None:  # noqa: F811
    told = encounter(eleven, graph=mamba_model(tmp_path / "layer.onnx", n_groups=2, dt_min=-1.0))
    assert all_of(told, "parsed") == [False]
    sentence = "Mamba2: layer layers.0.mamba: field dt_min and dt_max must rise from 0"
    assert any(logged.startswith(sentence) for logged in all_of(told, "ERROR"))


@needs_rtx
def test_a_models_lowered_graph_is_parsed_up_to_its_first_plugin(
    eleven: PluginLibrary,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The process ends where TensorRT for RTX would add the plugin to the network; everything before it was taken."""
    checkpoint = make_nemotron(tmp_path / "checkpoint", Nemotron("Mamba first", "*ME"))
    config = build(checkpoint, tmp_path / "engine", target="onnx", dtype="float16")
    path = tmp_path / "engine" / "model.onnx"
    onnx.save(for_plugin(lower_graph(path, config.pretrained_config, config.build_config)), path)
    onnx.save(onnx.load(path), path)  # with its weights inside
    told = encounter(eleven, graph=str(path))
    assert CREATED in told
    name = "backbone.layers.1.mixer.scanned"
    assert f"Mamba2: layer {name}: n_groups=3 dt_min=0.00999999978 dt_max=inf" in all_of(told, "VERBOSE")
    assert all_of(told, "ERROR") == []
