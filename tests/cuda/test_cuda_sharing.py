# SPDX-License-Identifier: Apache-2.0
"""Rows whose tokens share what the step reads, in the kernels: against the oracle and the CPU face, and what they may
never do to others. Each number of tokens and experts takes its own launches (docs/cuda.md)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cuda_cases import Inputs, check_all, make_decided, make_inputs, make_unread
from cuda_launcher import Interpreter, Layer, Result

from adaptive_k_moe.plugin import route

import oracle

TOKENS = [1, 5, 32, 33, 128, 129, 300]
ATTRIBUTES: list[dict[str, Any]] = [
    {},
    {"norm_topk_prob": False},
    {"scoring": "sigmoid", "routed_scaling_factor": 2.5},
    {"scoring": "sigmoid", "n_group": 4, "topk_group": 2},
]
SHARING = (oracle.SHARED_PRICE, oracle.SHARED_EXPERTS)


def participants(inputs: Inputs, result: Result) -> np.ndarray[Any, np.dtype[np.bool_]]:
    kinds = inputs["policy_kind"]
    assert kinds is not None
    follows = np.isin(kinds[np.clip(inputs["policy_index"], 0, len(kinds) - 1)], SHARING)
    return follows & ~np.isnan(result.entropy)


@pytest.mark.parametrize("experts", [8, 64, 128, 512])
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_step_is_the_oracles(interpreter: Interpreter, tokens: int, experts: int) -> None:
    number = TOKENS.index(tokens) + experts // 8
    for logits, attributes in (("plain", ATTRIBUTES[number % 4]), ("special", ATTRIBUTES[(number + 2) % 4])):
        layer = Layer(tokens, 8, 8, experts, element="float32", max_k=6, **attributes)
        inputs, exact = make_decided(layer, number, logits=logits, bias=number % 2 == 0)
        check_all(layer, exact, interpreter.run(layer, inputs, seed=number))


@pytest.mark.parametrize("attributes", ATTRIBUTES)
def test_every_attribute(interpreter: Interpreter, attributes: dict[str, Any]) -> None:
    for tokens, experts in ((20, 64), (60, 64), (20, 256)):
        layer = Layer(tokens, 8, 8, experts, element="float32", **attributes)
        inputs, exact = make_decided(layer, 1)
        result = interpreter.run(layer, inputs)
        check_all(layer, exact, result)
        unshared = interpreter.run(layer, {**inputs, "policy_kind": np.minimum(inputs["policy_kind"], 3)})
        assert len(result.active) < len(unshared.active), "nothing was shared"


@pytest.mark.parametrize("logits", ["plain", "ties", "special"])
@pytest.mark.parametrize(("tokens", "experts"), [(32, 8), (100, 128), (40, 512), (300, 64)])
def test_experts_are_the_cpu_faces(interpreter: Interpreter, tokens: int, experts: int, logits: str) -> None:
    """Ties too, which the oracle leaves to rounding."""
    layer = Layer(tokens, 8, 8, experts, element="float32", max_k=8)
    inputs, _ = make_inputs(layer, 7, logits=logits, sharing=True)
    result = interpreter.run(layer, inputs)
    names = ("router_logits", "policy_index", "policy_kind", "thresholds", "k_values")
    expected = route(*(inputs[name] for name in names), expert_norms=inputs["expert_norms"], max_k=8)
    np.testing.assert_array_equal(result.k, expected.k)
    np.testing.assert_array_equal(result.experts, expected.experts)
    np.testing.assert_allclose(result.weights, expected.weights, rtol=1e-6)


@pytest.mark.parametrize(("tokens", "experts"), [(20, 64), (100, 64), (200, 64), (20, 200)])
def test_others_are_what_they_are_alone(interpreter: Interpreter, tokens: int, experts: int) -> None:
    """To the bit, whoever shares beside them."""
    layer = Layer(tokens, 16, 16, experts, path="decode", max_k=4)
    inputs, _ = make_inputs(layer, 3, logits="special", sharing=True)
    together = interpreter.run(layer, inputs)
    others = ~participants(inputs, together)
    assert 0 < others.sum() < tokens
    own = {name: inputs[name][others] for name in ("hidden_states", "router_logits", "policy_index")}
    alone = interpreter.run(replace(layer, tokens=int(others.sum())), {**inputs, **own})
    for name in ("output", "k", "entropy", "experts", "weights"):
        assert getattr(together, name)[others].tobytes() == getattr(alone, name).tobytes(), name


@pytest.mark.parametrize(("tokens", "experts"), [(3, 8), (40, 8), (140, 8), (3, 200)])
@pytest.mark.parametrize(
    ("path", "weights", "activation"),
    [("decode", "element", "swiglu"), ("decode", "int4", "relu2"), ("prefill", "element", "swiglu"),
     ("prefill", "element", "relu2"), ("prefill", "int8", "swiglu")],
)  # fmt: skip
def test_nothing_read_is_nothing_run(
    interpreter: Interpreter, path: str, weights: str, activation: str, tokens: int, experts: int
) -> None:
    """No token runs anything: zeros come out, and no weight is touched."""
    layer = Layer(tokens, 64, 64, experts, path=path, weights=weights, activation=activation, max_k=4)
    inputs = make_unread(layer)
    result = interpreter.run(layer, inputs)
    assert (result.k == 0).all() and (result.entropy > 0).all()
    assert len(result.active) == 0 and result.offsets[-1] == 0
    assert (result.output == 0).all()


@pytest.mark.parametrize(("tokens", "experts"), [(32, 64), (128, 64), (300, 16), (32, 256)])
def test_results_do_not_depend_on_the_schedule(interpreter: Interpreter, tokens: int, experts: int) -> None:
    layer = Layer(tokens, 16, 16, experts, max_k=4)
    inputs, _ = make_inputs(layer, 2, logits="ties", sharing=True)
    first = interpreter.run(layer, inputs, seed=1)
    for seed in (2, 3, 4):
        again = interpreter.run(layer, inputs, seed=seed)
        for name in ("output", "k", "entropy", "weights", "row_token"):
            assert getattr(first, name).tobytes() == getattr(again, name).tobytes(), name
