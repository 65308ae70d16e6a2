# SPDX-License-Identifier: Apache-2.0
"""The plugin object at build and at run time: types, shapes, formats, workspace, and the hand-over to the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import plugin_harness as h
import pytest
from plugin_harness import BF16, FLOAT, HALF, INT8, INT32, INT64, Layer, Plugin, PluginLibrary, Recorder, Tensor

from adaptive_k_moe.plugin.description import MOE

ELEMENTS = [FLOAT, HALF, BF16]


@pytest.fixture
def plugin(library: PluginLibrary) -> Iterator[Plugin]:
    """A plugin with the default attributes (swiglu)."""
    made = library.made()
    yield made
    made.destroy()


@pytest.fixture
def make(library: PluginLibrary) -> Iterator[Callable[..., Plugin]]:
    """A maker of plugins that are destroyed at the end."""
    plugins = []

    def maker(**attributes: Any) -> Plugin:
        plugins.append(library.made(**attributes))
        return plugins[-1]

    yield maker
    for each in plugins:
        each.destroy()


def types(layer: Layer) -> list[int]:
    return [t.type for t in layer.inputs()]


LAYERS = [
    (Layer(), {}),
    (Layer(bias=True, gated=False), {"activation": "relu2"}),
    (Layer(weights="int8"), {"weight_format": "int8"}),
    (Layer(weights="int8", bias=True, groups=(2, 1)), {"weight_format": "int8"}),
    (Layer(weights="int4", groups=(4, 2), gated=False, bias=True), {"weight_format": "int4", "activation": "gelu"}),
    (Layer(choices=1), {}),
    (Layer(tokens=5), {}),
    (Layer(norms=True), {"has_expert_norms": 1}),
    (Layer(weights="int8", bias=True, norms=True), {"weight_format": "int8", "has_expert_norms": 1}),
]
LAYER_IDS = ["plain", "bias", "int8", "int8-bias-groups", "int4", "one-choice", "fixed-tokens", "norms", "all-inputs"]
over_layers = pytest.mark.parametrize(("layer", "attributes"), LAYERS, ids=LAYER_IDS)


@over_layers
@pytest.mark.parametrize("element", ELEMENTS)
def test_output_types_follow_hidden_states(
    make: Callable[..., Plugin], layer: Layer, attributes: dict[str, Any], element: int
) -> None:
    plugin = make(**attributes)
    assert plugin.output_types(types(replace(layer, element=element))) == [element, INT32, FLOAT, INT32]


@over_layers
def test_output_shapes_are_those_of_the_tokens(
    make: Callable[..., Plugin], layer: Layer, attributes: dict[str, Any]
) -> None:
    plugin = make(**attributes)
    tokens = "0.0" if layer.tokens < 0 else str(layer.tokens)
    assert plugin.output_shapes(layer.inputs()) == f"{tokens} 16;{tokens};{tokens};{layer.experts};"


def test_output_shapes_with_nothing_known_but_the_ranks(plugin: Plugin) -> None:
    inputs = [Tensor(t.type, (-1,) * len(t.shape)) for t in Layer().inputs()]
    assert plugin.output_shapes(inputs) == "0.0 0.1;0.0;0.0;1.1;"


@over_layers
@pytest.mark.parametrize("element", ELEMENTS)
def test_exactly_the_right_types_in_linear_format_are_supported(
    make: Callable[..., Plugin], layer: Layer, attributes: dict[str, Any], element: int
) -> None:
    plugin = make(**attributes)
    layer = replace(layer, element=element)
    inputs, outputs = layer.inputs(), layer.outputs()
    for pos, tensor in enumerate([*inputs, *outputs]):
        assert plugin.supports(pos, inputs, outputs)
        right = tensor.type
        for wrong in {FLOAT, HALF, BF16, INT8, INT32, INT64, h.BOOL} - {right}:
            tensor.type = wrong
            supported = plugin.supports(pos, inputs, outputs)
            # hidden_states leads: any float type is right there, and the others must follow it.
            assert supported == (pos == 0 and wrong in ELEMENTS)
        tensor.type = right
        tensor.format = h.CHW32
        assert not plugin.supports(pos, inputs, outputs)
        tensor.format = h.LINEAR
    assert plugin.library.log() == []


@pytest.mark.parametrize(("word", "element"), [("float32", FLOAT), ("float16", HALF), ("bfloat16", BF16)])
def test_a_named_weight_format_fixes_the_type(make: Callable[..., Plugin], word: str, element: int) -> None:
    plugin = make(weight_format=word)
    for other in ELEMENTS:
        layer = Layer(element=other)
        fits = other == element
        assert plugin.supports(0, layer.inputs(), layer.outputs()) == fits
        assert (plugin.output_types(types(layer)) is not None) == fits
        if not fits:
            [sentence] = plugin.library.errors()
            assert sentence.endswith(f"but must be {word}, by weight_format")


def test_the_workspace_is_for_the_most_tokens(plugin: Plugin, recorder: Recorder) -> None:
    layer = Layer(max_tokens=300)
    assert plugin.configure(layer.inputs(), layer.outputs()) == 0
    assert plugin.workspace(layer.inputs(), layer.outputs()) == 1000 + 300
    assert recorder.read().shape["tokens"] == 300


@over_layers
def test_the_kernels_get_the_shape_of_the_layer(
    make: Callable[..., Plugin], recorder: Recorder, layer: Layer, attributes: dict[str, Any]
) -> None:
    plugin = make(**attributes)
    layer = replace(layer, tokens=7)
    assert plugin.shape_change(layer.inputs(), layer.outputs()) == 0, plugin.library.log()
    group_size = 0 if layer.groups == (1, 1) else layer.hidden // layer.groups[0]
    assert recorder.read().shape == {
        "tokens": 7,
        "hidden": 16,
        "intermediate": 8,
        "experts": 4,
        "policies": 2,
        "choices": layer.choices,
        "element": 0,
        "group_size": group_size,
    }
    weight_format = next(attribute for attribute in MOE.attributes if attribute.name == "weight_format")
    assert recorder.read().params["weight_format"] == weight_format.words.index(layer.weights)


@pytest.mark.parametrize(("element", "value"), [(HALF, 0), (BF16, 1), (FLOAT, 2)])
def test_the_kernels_get_the_element_type(plugin: Plugin, recorder: Recorder, element: int, value: int) -> None:
    layer = Layer(tokens=1, element=element)
    assert plugin.shape_change(layer.inputs(), layer.outputs()) == 0
    assert recorder.read().shape["element"] == value


def test_the_kernels_get_the_attributes(make: Callable[..., Plugin], recorder: Recorder) -> None:
    attributes = {
        "activation": "relu2", "scoring": "sigmoid", "norm_topk_prob": 0, "routed_scaling_factor": 2.5,
        "n_group": 2, "topk_group": 1, "max_k": 2,
    }  # fmt: skip
    plugin = make(**attributes)
    layer = Layer(tokens=3, gated=False)
    assert plugin.shape_change(layer.inputs(), layer.outputs()) == 0
    assert recorder.read().params == {**attributes, "activation": 6, "scoring": 1, "weight_format": 0}


@over_layers
@pytest.mark.parametrize("through", ["itself", "clone", "context", "engine"])
def test_enqueue_hands_every_pointer_to_its_place(
    make: Callable[..., Plugin],
    recorder: Recorder,
    layer: Layer,
    attributes: dict[str, Any],
    through: str,
) -> None:
    plugin = make(**attributes)
    library = plugin.library
    if through == "clone":
        running = plugin.clone()
    elif through == "context":
        running = plugin.attach()
    elif through == "engine":
        again = library.create(plugin.serialized(), phase=h.RUNTIME_PHASE)
        assert again is not None
        running = again
    else:
        running = plugin
    layer = replace(layer, tokens=7)
    inputs, outputs = layer.inputs(), layer.outputs()
    assert running.shape_change(inputs, outputs) == 0
    before = recorder.launches()
    given, made = [0x1000 + 16 * i for i in range(len(inputs))], [0x9000, 0x9010, 0x9020, 0x9030]
    assert running.enqueue(inputs, outputs, given, made, workspace=0xA000, stream=0xB000) == 0
    assert recorder.launches() == before + 1

    names = ["hidden_states", "router_logits", "policy_index", "policy_kind", "thresholds", "k_values", "up", "down"]
    names += ["correction_bias"] * layer.bias
    names += ["up_scales", "down_scales"] * bool(layer.weights)
    names += ["expert_norms"] * layer.norms
    expected: dict[str, int | None] = dict.fromkeys(Recorder.POINTERS)
    expected.update(zip(names, given, strict=True))
    expected.update(
        zip(["output", "k", "entropy", "expert_load", "workspace", "stream"], [*made, 0xA000, 0xB000], strict=True)
    )
    assert recorder.read().pointers == expected
    if running is not plugin:
        running.destroy()


def test_a_clone_is_ready_with_the_shapes_of_its_original(plugin: Plugin, recorder: Recorder) -> None:
    layer = Layer(tokens=4)
    inputs, outputs = layer.inputs(), layer.outputs()
    assert plugin.shape_change(inputs, outputs) == 0
    clone = plugin.clone()
    assert clone.text() == plugin.text()
    assert clone.serialized() == plugin.serialized()
    assert clone.enqueue(inputs, outputs, [16] * 8, [16] * 4) == 0
    # Each goes its own way from here.
    other = Layer(tokens=9)
    assert clone.shape_change(other.inputs(), other.outputs()) == 0
    assert plugin.enqueue(inputs, outputs, [16] * 8, [16] * 4) == 0
    assert recorder.read().shape["tokens"] == 4
    clone.destroy()


def test_a_configured_plugin_runs_without_word_of_the_shapes(plugin: Plugin, recorder: Recorder) -> None:
    """The builder may time a plugin with nothing between configurePlugin and enqueue."""
    layer = Layer(max_tokens=32)
    assert plugin.configure(layer.inputs(), layer.outputs()) == 0
    clone = plugin.clone()
    for tokens in (32, 5):
        step = Layer(tokens=tokens)
        assert clone.enqueue(step.inputs(), step.outputs(), [16] * 8, [16] * 4) == 0
        assert recorder.read().shape["tokens"] == tokens
    clone.destroy()


@pytest.mark.parametrize("change", [{"tokens": 9}, {"policies": 5}, {"choices": 1}])
def test_a_change_that_nobody_announced_is_noticed(plugin: Plugin, recorder: Recorder, change: dict[str, int]) -> None:
    first = Layer(tokens=4)
    assert plugin.shape_change(first.inputs(), first.outputs()) == 0
    second = replace(first, **change)  # type: ignore[arg-type]
    assert plugin.enqueue(second.inputs(), second.outputs(), [16] * 8, [16] * 4) == 0
    shape = recorder.read().shape
    assert {name: shape[name] for name in change} == change
    launches = recorder.launches()
    wrong = second.inputs()
    wrong[0] = Tensor(HALF, (3, 16))
    assert plugin.enqueue(wrong, second.outputs(), [16] * 8, [16] * 4) != 0
    assert errors(plugin).startswith("input router_logits has shape")
    assert recorder.launches() == launches


def test_no_tokens_is_a_step_like_any_other(plugin: Plugin, recorder: Recorder) -> None:
    layer = Layer(tokens=0)
    assert plugin.shape_change(layer.inputs(), layer.outputs()) == 0
    assert plugin.enqueue(layer.inputs(), layer.outputs(), [16] * 8, [16] * 4) == 0
    assert recorder.read().shape["tokens"] == 0


def test_there_are_three_outputs_and_no_tactics_of_its_own(plugin: Plugin) -> None:
    assert plugin.num_outputs == 4
    assert plugin.lib.plugin_num_tactics(plugin.pointer) == 0


# ---------------------------------------------------------------- what is refused


def errors(plugin: Plugin) -> str:
    """The one sentence that was logged."""
    [sentence] = plugin.library.errors()
    assert sentence.startswith("AdaptiveKMoe: ")
    assert "\n" not in sentence
    return sentence.removeprefix("AdaptiveKMoe: ")


@pytest.mark.parametrize(
    ("attributes", "count", "sentence"),
    [
        ({}, 7, "has 7 inputs but takes 8, or 9 with correction_bias"),
        ({}, 10, "has 10 inputs but takes 8, or 9 with correction_bias"),
        ({}, 0, "has 0 inputs but takes 8, or 9 with correction_bias"),
        ({"weight_format": "int8"}, 9, "has 9 inputs but takes 10, or 11 with correction_bias (weight_format int8)"),
        ({"has_expert_norms": 1}, 8, "has 8 inputs but takes 9, or 10 with correction_bias (has_expert_norms)"),
    ],
)
def test_a_wrong_number_of_inputs_is_refused_everywhere(
    make: Callable[..., Plugin], attributes: dict[str, Any], count: int, sentence: str
) -> None:
    plugin = make(**attributes)
    layer = Layer(tokens=2, bias=True)
    inputs, outputs = (layer.inputs() + layer.inputs())[:count], layer.outputs()
    assert plugin.output_types([t.type for t in inputs]) is None
    assert errors(plugin) == sentence
    assert plugin.output_shapes(inputs) is None
    assert errors(plugin) == sentence
    assert not plugin.supports(0, inputs, outputs)
    assert errors(plugin) == sentence
    assert plugin.configure(inputs, outputs) != 0
    assert errors(plugin) == sentence
    assert plugin.workspace(inputs, outputs) == 0
    assert errors(plugin) == sentence
    assert plugin.shape_change(inputs, outputs) != 0
    assert errors(plugin) == sentence


@pytest.mark.parametrize("count", [0, 3, 5])
def test_a_wrong_number_of_outputs_is_refused_everywhere(plugin: Plugin, count: int) -> None:
    layer = Layer(tokens=2)
    inputs, outputs = layer.inputs(), (layer.outputs() * 2)[:count]
    sentence = f"has {count} outputs but makes 4: output, k, entropy and expert_load"
    assert plugin.output_types(types(layer), count) is None
    assert errors(plugin) == sentence
    assert plugin.output_shapes(inputs, num_outputs=count) is None
    assert errors(plugin) == sentence
    assert not plugin.supports(0, inputs, outputs)
    assert errors(plugin) == sentence
    assert plugin.configure(inputs, outputs) != 0
    assert errors(plugin) == sentence
    assert plugin.shape_change(inputs, outputs) != 0
    assert errors(plugin) == sentence


@pytest.mark.parametrize("pos", [-1, 12, 1000])
def test_a_tensor_that_is_not_there_has_no_format(plugin: Plugin, pos: int) -> None:
    layer = Layer()
    assert not plugin.supports(pos, layer.inputs(), layer.outputs())
    assert errors(plugin) == f"was asked for the format of tensor {pos} of 12"


def test_shape_inputs_are_refused(plugin: Plugin) -> None:
    assert plugin.output_shapes(Layer().inputs(), shape_inputs=1) is None
    assert errors(plugin) == "takes no shape inputs"


WRONG_TYPES: list[tuple[Layer, dict[str, Any], int, int, str]] = [
    (Layer(), {}, 0, INT32, "input hidden_states has type int32 but must be float16, bfloat16 or float32"),
    (Layer(), {}, 1, HALF, "input router_logits has type float16 but must be float32"),
    (Layer(), {}, 2, INT64, "input policy_index has type int64 but must be int32"),
    (Layer(), {}, 3, INT64, "input policy_kind has type int64 but must be int32"),
    (Layer(), {}, 4, HALF, "input thresholds has type float16 but must be float32"),
    (Layer(), {}, 5, INT64, "input k_values has type int64 but must be int32"),
    (Layer(), {}, 6, BF16, "input gate_up has type bfloat16 but must be float16, as hidden_states"),
    (
        Layer(gated=False),
        {"activation": "silu"},
        6,
        INT8,
        "input up has type int8 but must be float16, as hidden_states",
    ),
    (Layer(), {}, 7, FLOAT, "input down has type float32 but must be float16, as hidden_states"),
    (Layer(bias=True), {}, 8, HALF, "input correction_bias has type float16 but must be float32"),
    (Layer(norms=True), {"has_expert_norms": 1}, 8, HALF, "input expert_norms has type float16 but must be float32"),
    (Layer(weights="int8"), {"weight_format": "int8"}, 6, HALF, "input gate_up has type float16 but must be int8"),
    (
        Layer(weights="int8"),
        {"weight_format": "int8"},
        8,
        FLOAT,
        "input gate_up_scales has type float32 but must be float16, as hidden_states",
    ),
    (
        Layer(weights="int4", bias=True),
        {"weight_format": "int4"},
        10,
        BF16,
        "input down_scales has type bfloat16 but must be float16, as hidden_states",
    ),
    (Layer(), {}, 1, 99, "input router_logits has type another type but must be float32"),
]


@pytest.mark.parametrize(("layer", "attributes", "index", "wrong", "sentence"), WRONG_TYPES)
def test_a_wrong_type_is_refused_by_name(
    make: Callable[..., Plugin], layer: Layer, attributes: dict[str, Any], index: int, wrong: int, sentence: str
) -> None:
    plugin = make(**attributes)
    layer = replace(layer, tokens=2)
    inputs, outputs = layer.inputs(), layer.outputs()
    inputs[index].type = wrong
    assert plugin.output_types([t.type for t in inputs]) is None
    assert errors(plugin) == sentence
    assert plugin.configure(inputs, outputs) != 0
    assert errors(plugin) == sentence
    assert plugin.shape_change(inputs, outputs) != 0
    assert errors(plugin) == sentence


WRONG_SHAPES: list[tuple[Layer, dict[str, Any], int, tuple[int, ...], str]] = [
    (Layer(), {}, 0, (2, 16, 1), "input hidden_states has shape [2, 16, 1] but must be [T, H]"),
    (
        Layer(),
        {},
        1,
        (3, 4),
        "input router_logits has shape [3, 4] but must be [T, E], where T = 2 by input hidden_states",
    ),
    (Layer(), {}, 2, (3,), "input policy_index has shape [3] but must be [T], where T = 2 by input hidden_states"),
    (Layer(), {}, 2, (), "input policy_index has shape [] but must be [T]"),
    (Layer(), {}, 4, (2, 3), "input thresholds has shape [2, 3] but must be [P, C-1], where C = 3 by input k_values"),
    (Layer(), {}, 5, (3, 3), "input k_values has shape [3, 3] but must be [P, C], where P = 2 by input policy_kind"),
    (
        Layer(),
        {},
        6,
        (4, 15, 16),
        "input gate_up has shape [4, 15, 16] but must be [E, 2I, H], so dimension 1 must be even",
    ),
    (
        Layer(),
        {},
        6,
        (5, 16, 16),
        "input gate_up has shape [5, 16, 16] but must be [E, 2I, H], where E = 4 by input router_logits",
    ),
    (Layer(), {}, 7, (4, 16, 9), "input down has shape [4, 16, 9] but must be [E, H, I], where I = 8 by input gate_up"),
    (
        Layer(bias=True),
        {},
        8,
        (5,),
        "input correction_bias has shape [5] but must be [E], where E = 4 by input router_logits",
    ),
    (
        Layer(bias=True, norms=True),
        {"has_expert_norms": 1},
        9,
        (3,),
        "input expert_norms has shape [3] but must be [E], where E = 4 by input router_logits",
    ),
    (Layer(), {"n_group": 3, "topk_group": 1}, 0, (2, 16), "attribute n_group must divide the number of experts"),
    (
        Layer(weights="int8"),
        {"weight_format": "int8"},
        8,
        (4, 16, 3),
        "input gate_up_scales has shape [4, 16, 3] but must be [E, N, groups] beside gate_up [E, N, K] = [4, 16, 16], "
        "where groups divides K",
    ),
    (
        Layer(weights="int8"),
        {"weight_format": "int8"},
        9,
        (4, 8, 1),
        "input down_scales has shape [4, 8, 1] but must be [E, N, groups] beside down [E, N, K] = [4, 16, 8]",
    ),
    (
        Layer(weights="int8"),
        {"weight_format": "int8"},
        9,
        (4, 16),
        "input down_scales has shape [4, 16] but must be [E, N, groups] beside down [E, N, K] = [4, 16, 8]",
    ),
    (
        Layer(weights="int4", groups=(4, 4)),
        {"weight_format": "int4"},
        0,
        (2, 16),
        "inputs gate_up_scales and down_scales make groups of 4 and 2 values but must make groups of one size, or have "
        "one scale a row each",
    ),
    (
        Layer(weights="int4"),
        {"weight_format": "int4"},
        6,
        (4, 16, 7),
        "input gate_up has shape [4, 16, 14] but must be [E, 2I, H], where H = 16 by input hidden_states",
    ),
]


@pytest.mark.parametrize(("layer", "attributes", "index", "wrong", "sentence"), WRONG_SHAPES)
def test_a_wrong_shape_is_refused_by_name(
    make: Callable[..., Plugin],
    layer: Layer,
    attributes: dict[str, Any],
    index: int,
    wrong: tuple[int, ...],
    sentence: str,
) -> None:
    plugin = make(**attributes)
    layer = replace(layer, tokens=2)
    inputs, outputs = layer.inputs(), layer.outputs()
    inputs[index] = Tensor(inputs[index].type, wrong)
    assert plugin.output_shapes(inputs) is None
    assert errors(plugin).startswith(sentence)
    assert plugin.configure(inputs, outputs) != 0
    assert errors(plugin).startswith(sentence)
    assert plugin.shape_change(inputs, outputs) != 0
    assert errors(plugin).startswith(sentence)
    assert plugin.enqueue(inputs, outputs, [16] * len(inputs), [16] * 4) != 0
    assert errors(plugin) == "was enqueued before its inputs were described and accepted"


def test_after_refused_shapes_nothing_runs(plugin: Plugin, recorder: Recorder) -> None:
    layer = Layer(tokens=2)
    inputs, outputs = layer.inputs(), layer.outputs()
    for refused_by in (plugin.shape_change, plugin.configure):
        assert plugin.shape_change(inputs, outputs) == 0
        before = recorder.launches()
        wrong = layer.inputs()
        wrong[7] = Tensor(HALF, (4, 16, 9))
        assert refused_by(wrong, outputs) != 0
        plugin.library.log()
        assert plugin.enqueue(inputs, outputs, [16] * 8, [16] * 4) != 0
        assert errors(plugin) == "was enqueued before its inputs were described and accepted"
        assert recorder.launches() == before


def test_a_profile_that_contradicts_itself_is_refused(plugin: Plugin) -> None:
    layer = Layer()
    inputs = layer.inputs()
    inputs[1].max = (63, 4)
    assert plugin.configure(inputs, layer.outputs()) != 0
    assert "where T = 64 by input hidden_states" in errors(plugin)


@pytest.mark.parametrize("index", [6, 7])
def test_weights_of_unknown_size_are_refused(plugin: Plugin, index: int) -> None:
    layer = Layer()
    inputs = layer.inputs()
    for i in (0, 6, 7):
        inputs[i] = Tensor(inputs[i].type, (-1,) * len(inputs[i].shape), (-1,) * len(inputs[i].shape))
    assert plugin.configure(inputs, layer.outputs()) != 0
    assert errors(plugin) == (
        "the hidden size, the intermediate size and the number of experts must be known when the engine is built"
    )


@pytest.mark.parametrize("rank", [-1, 9])
def test_a_rank_out_of_bounds_is_refused(plugin: Plugin, rank: int) -> None:
    layer = Layer(tokens=2)
    inputs = layer.inputs()
    broken = h.tensor_array([*inputs, *layer.outputs()])
    broken[0].rank = rank
    assert plugin.lib.plugin_shape_change(plugin.pointer, broken, len(inputs), 4) != 0
    assert "input hidden_states has shape" in errors(plugin)


def test_a_layer_that_the_kernels_refuse_is_refused_with_their_sentence(plugin: Plugin, recorder: Recorder) -> None:
    layer = Layer(tokens=2)
    inputs, outputs = layer.inputs(), layer.outputs()
    recorder.answer(refusal="too many experts")
    assert plugin.configure(inputs, outputs) != 0
    assert errors(plugin) == "too many experts"
    assert plugin.workspace(inputs, outputs) == 0
    assert errors(plugin) == "too many experts"
    assert plugin.shape_change(inputs, outputs) != 0
    assert errors(plugin) == "too many experts"


def test_a_launch_that_fails_is_a_status_and_a_sentence(plugin: Plugin, recorder: Recorder) -> None:
    layer = Layer(tokens=2)
    assert plugin.shape_change(layer.inputs(), layer.outputs()) == 0
    recorder.answer(status=719)
    assert plugin.enqueue(layer.inputs(), layer.outputs(), [16] * 8, [16] * 4) != 0
    assert errors(plugin) == "its kernels were not launched (CUDA error 719)"


def test_enqueue_wants_its_inputs_described(plugin: Plugin, recorder: Recorder) -> None:
    layer = Layer(tokens=2)
    before = recorder.launches()
    assert plugin.enqueue(layer.inputs(), layer.outputs(), [16] * 8, [16] * 4) != 0
    assert errors(plugin) == "was enqueued before its inputs were described and accepted"
    assert recorder.launches() == before


@pytest.mark.parametrize(
    ("throws", "sentence"), [(1, "the launcher threw"), (2, "failed for a reason that it did not name")]
)
def test_no_exception_reaches_tensorrt(plugin: Plugin, recorder: Recorder, throws: int, sentence: str) -> None:
    layer = Layer(tokens=2)
    inputs, outputs = layer.inputs(), layer.outputs()
    assert plugin.shape_change(inputs, outputs) == 0
    recorder.answer(throws=throws)
    assert plugin.enqueue(inputs, outputs, [16] * 8, [16] * 4) != 0
    assert errors(plugin) == sentence
    assert plugin.configure(inputs, outputs) != 0
    assert errors(plugin) == sentence
    assert plugin.workspace(inputs, outputs) == 0
    assert errors(plugin) == sentence
    assert plugin.shape_change(inputs, outputs) != 0
    assert errors(plugin) == sentence
