# SPDX-License-Identifier: Apache-2.0
"""The plugin computes: enqueue runs the kernels, in the interpreter, on layers that an oracle checks.

The kernels have their own tests; these are about the plugin's way to them: every type, weight storage and
attribute arrives as what it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import plugin_harness as h
import pytest
from plugin_harness import Layer, Plugin, PluginLibrary

from oracle import ENTROPY, RATIO, TOP_P, moe

Array = npt.NDArray[Any]
DTYPES: dict[int, Any] = {h.FLOAT: np.float32, h.HALF: np.float16, h.BF16: ml_dtypes.bfloat16}
TOLERANCES = {h.FLOAT: 1e-5, h.HALF: 4e-3, h.BF16: 3e-2}


def aligned(array: Array) -> Array:
    """A copy whose address is a multiple of 256, as device memory is."""
    raw = np.zeros(array.nbytes + 256, np.uint8)
    start = -raw.ctypes.data % 256
    view = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


@dataclass
class Case:
    """A layer's data; `dense` is what its weights stand for."""

    layer: Layer
    attributes: dict[str, Any]
    inputs: list[Array]
    dense: tuple[Array, Array]
    oracle: dict[str, Any]
    expected: tuple[Array, Array, Array] = field(init=False)

    def __post_init__(self) -> None:
        x, logits, index, kind, thresholds, k_values, *_ = self.inputs
        bias = self.inputs[8] if self.layer.bias else None
        self.expected = moe(
            x.astype(np.float64), logits, index, kind, thresholds, k_values, *self.dense,
            correction_bias=bias, **self.oracle,
        )  # fmt: skip


def quantise(weights: Array, bits: int, groups: int, dtype: Any) -> tuple[Array, Array, Array]:
    """Packed values, scales, and what they stand for."""
    e, n, k = weights.shape
    grouped = weights.reshape(e, n, groups, k // groups)
    limit = 2 ** (bits - 1) - 1
    scales = (np.abs(grouped).max(-1, keepdims=True) / limit).astype(dtype)
    values = np.clip(np.round(grouped / scales.astype(np.float32)), -limit - 1, limit).astype(np.int8)
    dense = (values * scales.astype(np.float32)).reshape(e, n, k)
    values = values.reshape(e, n, k)
    if bits == 4:
        values = ((values[..., 0::2] & 15) | (values[..., 1::2] << 4)).astype(np.int8)
    return values, scales.reshape(e, n, groups), dense


def make_case(seed: int, layer: Layer, **attributes: Any) -> Case:
    rng = np.random.default_rng(seed)
    t, hidden, inner, e = layer.tokens, layer.hidden, layer.intermediate, layer.experts
    dtype = DTYPES[layer.element]

    def normal(*shape: int, scale: float = 1.0) -> Array:
        return (rng.standard_normal(shape) * scale).astype(np.float32).astype(dtype)

    rows = 2 * inner if layer.gated else inner
    up = normal(e, rows, hidden, scale=hidden**-0.5)
    down = normal(e, hidden, inner, scale=inner**-0.5)
    kinds = np.array([ENTROPY, TOP_P, RATIO], np.int32)
    inputs = [
        normal(t, hidden),
        (rng.standard_normal((t, e)) * rng.uniform(0.2, 3, (t, 1))).astype(np.float32),
        rng.integers(0, 3, t).astype(np.int32),
        kinds,
        np.array([[0.8, 1.2], [0.7, 0], [0.4, 0]], np.float32),
        np.array([[1, 2, 3], [1, 1, 3], [1, 1, 2]], np.int32),
    ]
    if layer.weights in ("int8", "int4"):
        bits = int(layer.weights.removeprefix("int"))
        up, up_scales, dense_up = quantise(up.astype(np.float32), bits, layer.groups[0], dtype)
        down, down_scales, dense_down = quantise(down.astype(np.float32), bits, layer.groups[1], dtype)
    else:
        dense_up, dense_down = up, down
    inputs += [up, down]
    if layer.bias:
        inputs.append((rng.standard_normal(e) * 0.3).astype(np.float32))
    if layer.weights in ("int8", "int4"):
        inputs += [up_scales, down_scales]
    oracle = {k: v for k, v in attributes.items() if k != "weight_format"}
    if "norm_topk_prob" in oracle:
        oracle["norm_topk_prob"] = bool(oracle["norm_topk_prob"])
    if layer.weights:
        attributes["weight_format"] = layer.weights
    return Case(layer, attributes, [aligned(a) for a in inputs], (dense_up, dense_down), oracle)


def run(plugin: Plugin, case: Case) -> tuple[Array, Array, Array]:
    layer = case.layer
    tensors, outputs = layer.inputs(), layer.outputs()
    assert [a.shape for a in case.inputs] == [t.shape for t in tensors]
    made = [
        aligned(np.full((layer.tokens, layer.hidden), -7, DTYPES[layer.element])),
        aligned(np.full(layer.tokens, -7, np.int32)),
        aligned(np.full(layer.tokens, -7, np.float32)),
    ]
    assert plugin.configure(tensors, outputs) == 0, plugin.library.log()
    workspace = aligned(np.full(max(plugin.workspace(tensors, outputs), 1), 255, np.uint8))
    assert plugin.shape_change(tensors, outputs) == 0, plugin.library.log()
    pointers = [a.ctypes.data for a in case.inputs]
    status = plugin.enqueue(tensors, outputs, pointers, [m.ctypes.data for m in made], workspace.ctypes.data)
    assert status == 0, plugin.library.log()
    return made[0], made[1], made[2]


def check(case: Case, made: tuple[Array, Array, Array]) -> None:
    output, k, entropy = case.expected
    np.testing.assert_array_equal(made[1], k)
    np.testing.assert_allclose(made[2], entropy, atol=1e-5)
    largest = np.abs(output).max()
    np.testing.assert_allclose(made[0].astype(np.float64), output, atol=TOLERANCES[case.layer.element] * largest)


SOFTMAX: dict[str, Any] = {"activation": "swiglu", "scoring": "softmax", "max_k": 4}
SIGMOID: dict[str, Any] = {
    "activation": "relu2",
    "scoring": "sigmoid",
    "norm_topk_prob": 1,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
    "max_k": 6,
}
P3 = {"policies": 3, "choices": 3}
CASES: dict[str, tuple[Layer, dict[str, Any]]] = {
    **{
        f"{name}-{tokens}": (Layer(tokens, hidden=32, intermediate=16, experts=6, element=element, **P3), SOFTMAX)
        for name, element in (("float32", h.FLOAT), ("float16", h.HALF), ("bfloat16", h.BF16))
        for tokens in (1, 5, 40)
    },
    "sigmoid-groups-bias": (
        Layer(9, hidden=16, intermediate=24, experts=8, element=h.FLOAT, gated=False, bias=True, **P3),
        SIGMOID,
    ),
    "unnormalised": (
        Layer(3, hidden=16, intermediate=8, experts=5, element=h.FLOAT, **P3),
        {**SOFTMAX, "activation": "geglu", "norm_topk_prob": 0, "routed_scaling_factor": 0.5},
    ),
    "capped-at-one": (
        Layer(6, hidden=16, intermediate=8, experts=5, element=h.FLOAT, **P3),
        {**SOFTMAX, "max_k": 1},
    ),
    "int8-row": (Layer(4, hidden=32, intermediate=32, element=h.FLOAT, weights="int8", **P3), SOFTMAX),
    "int8-groups-bias": (
        Layer(4, hidden=64, intermediate=32, element=h.HALF, weights="int8", groups=(2, 1), bias=True, **P3),
        {**SOFTMAX, "scoring": "sigmoid"},
    ),
    "int4-groups": (
        Layer(4, hidden=64, intermediate=32, element=h.BF16, weights="int4", groups=(2, 1), **P3),
        SOFTMAX,
    ),
    "int4-row": (
        Layer(2, hidden=64, intermediate=32, element=h.HALF, weights="int4", gated=False, **P3),
        {**SOFTMAX, "activation": "gelu_tanh"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_plugin_computes_the_operator(computing: PluginLibrary, name: str) -> None:
    layer, attributes = CASES[name]
    case = make_case(sorted(CASES).index(name), layer, **attributes)
    plugin = computing.made(**case.attributes)
    check(case, run(plugin, case))
    plugin.destroy()


@pytest.mark.parametrize("name", ["float16-5", "sigmoid-groups-bias", "int4-groups"])
def test_an_engines_plugin_computes_the_same_bits(computing: PluginLibrary, name: str) -> None:
    layer, attributes = CASES[name]
    case = make_case(3, layer, **attributes)
    original = computing.made(**case.attributes)
    fields = original.serialized()
    before = [a.tobytes() for a in run(original, case)]
    original.destroy()
    engine = computing.create(fields, phase=h.RUNTIME_PHASE)
    assert engine is not None
    context = engine.attach()
    assert [a.tobytes() for a in run(context, case)] == before
    context.destroy()
    engine.destroy()


def test_steps_of_different_sizes_run_in_the_workspace_of_the_largest(computing: PluginLibrary) -> None:
    attributes = SOFTMAX
    plugin = computing.made(**attributes)
    most = Layer(40, hidden=32, intermediate=16, experts=6, **P3)
    workspace = aligned(np.zeros(plugin.workspace(most.inputs(), most.outputs()), np.uint8))
    for tokens in (40, 1, 17, 0, 2):
        layer = Layer(tokens, hidden=32, intermediate=16, experts=6, **P3)
        assert plugin.workspace(layer.inputs(), layer.outputs()) <= workspace.size
        if tokens == 0:
            assert plugin.shape_change(layer.inputs(), layer.outputs()) == 0
            assert plugin.enqueue(layer.inputs(), layer.outputs(), [0] * 8, [0] * 3) == 0
        else:
            case = make_case(tokens, layer, **attributes)
            check(case, run(plugin, case))
    plugin.destroy()


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (Layer(2, experts=513), "there may be at most 512 experts"),
        (Layer(2, hidden=12), "hidden and intermediate size must be multiples of 8, for 16-byte loads"),
        (Layer(2, choices=0), "input k_values"),
    ],
)
def test_what_the_kernels_cannot_run_is_refused_when_the_engine_is_built(
    computing: PluginLibrary, layer: Layer, sentence: str
) -> None:
    plugin = computing.made()
    assert plugin.configure(layer.inputs(), layer.outputs()) != 0
    [error] = computing.errors()
    assert sentence in error
    plugin.destroy()


def test_a_missing_pointer_is_a_status_and_a_sentence(computing: PluginLibrary) -> None:
    layer, attributes = CASES["float32-1"]
    plugin = computing.made(**attributes)
    assert plugin.shape_change(layer.inputs(), layer.outputs()) == 0
    assert plugin.enqueue(layer.inputs(), layer.outputs(), [0] * 8, [0] * 3) != 0
    assert computing.errors() == ["AdaptiveKMoe: its kernels were not launched (CUDA error 1)"]
    plugin.destroy()
