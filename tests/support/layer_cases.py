# SPDX-License-Identifier: Apache-2.0
"""Layers with data and what the oracle says of them, for every way that the plugin computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import plugin_harness as h
from cases import quantise
from plugin_harness import Layer

from oracle import CONTRIBUTION, ENTROPY, RATIO, TOP_P, moe

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
        norms = self.inputs[-1] if self.layer.norms else None
        self.expected = moe(
            x.astype(np.float64), logits, index, kind, thresholds, k_values, *self.dense,
            correction_bias=bias, expert_norms=norms, **self.oracle,
        )  # fmt: skip


def make_case(seed: int, layer: Layer, **attributes: Any) -> Case:
    rng = np.random.default_rng(seed)
    t, hidden, inner, e = layer.tokens, layer.hidden, layer.intermediate, layer.experts
    dtype = DTYPES[layer.element]

    def normal(*shape: int, scale: float = 1.0) -> Array:
        return (rng.standard_normal(shape) * scale).astype(np.float32).astype(dtype)

    rows = 2 * inner if layer.gated else inner
    here = e if layer.given is None else layer.given
    up = normal(here, rows, hidden, scale=hidden**-0.5)
    down = normal(here, hidden, inner, scale=inner**-0.5)
    kinds = np.array([ENTROPY, TOP_P, RATIO, CONTRIBUTION], np.int32)
    inputs = [
        normal(t, hidden),
        (rng.standard_normal((t, e)) * rng.uniform(0.2, 3, (t, 1))).astype(np.float32),
        rng.integers(0, 4, t).astype(np.int32),
        kinds,
        np.array([[0.8, 1.2], [0.7, 0], [0.4, 0], [0.75, 0]], np.float32),
        np.array([[1, 2, 3], [1, 1, 3], [1, 1, 2], [1, 1, 4]], np.int32),
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
    if layer.norms:
        inputs.append(rng.uniform(0.3, 2, e).astype(np.float32))
        attributes["has_expert_norms"] = 1
    oracle = {k: v for k, v in attributes.items() if k not in ("weight_format", "has_expert_norms")}
    if "norm_topk_prob" in oracle:
        oracle["norm_topk_prob"] = bool(oracle["norm_topk_prob"])
    if layer.weights:
        attributes["weight_format"] = layer.weights
    return Case(layer, attributes, [aligned(a) for a in inputs], (dense_up, dense_down), oracle)


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
ROWS: dict[str, Any] = {"policies": 4, "choices": 3}
CASES: dict[str, tuple[Layer, dict[str, Any]]] = {
    **{
        f"{name}-{tokens}": (
            Layer(tokens, hidden=32, intermediate=16, experts=6, element=element, norms=tokens > 1, **ROWS),
            SOFTMAX,
        )
        for name, element in (("float32", h.FLOAT), ("float16", h.HALF), ("bfloat16", h.BF16))
        for tokens in (1, 5, 40)
    },
    "sigmoid-groups-bias": (
        Layer(9, hidden=16, intermediate=24, experts=8, element=h.FLOAT, gated=False, bias=True, norms=True, **ROWS),
        SIGMOID,
    ),
    "unnormalised": (
        Layer(3, hidden=16, intermediate=8, experts=5, element=h.FLOAT, **ROWS),
        {**SOFTMAX, "activation": "geglu", "norm_topk_prob": 0, "routed_scaling_factor": 0.5},
    ),
    "capped-at-one": (
        Layer(6, hidden=16, intermediate=8, experts=5, element=h.FLOAT, **ROWS),
        {**SOFTMAX, "max_k": 1},
    ),
    "three-of-six": (
        Layer(40, hidden=32, intermediate=16, experts=6, given=3, **ROWS),
        {**SOFTMAX, "first_expert": 2},
    ),
    "int8-row": (Layer(4, hidden=32, intermediate=32, element=h.FLOAT, weights="int8", **ROWS), SOFTMAX),
    "int8-groups-bias": (
        Layer(4, hidden=64, intermediate=32, element=h.HALF, weights="int8", groups=(2, 1), bias=True, **ROWS),
        {**SOFTMAX, "scoring": "sigmoid"},
    ),
    "int4-groups": (
        Layer(4, hidden=64, intermediate=32, element=h.BF16, weights="int4", groups=(2, 1), norms=True, **ROWS),
        SOFTMAX,
    ),
    "int4-row": (
        Layer(2, hidden=64, intermediate=32, element=h.HALF, weights="int4", gated=False, **ROWS),
        {**SOFTMAX, "activation": "gelu_tanh"},
    ),
}
