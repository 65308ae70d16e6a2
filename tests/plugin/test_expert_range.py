# SPDX-License-Identifier: Apache-2.0
"""A range of the experts: what calls that share out the experts compute adds up to the whole."""

from __future__ import annotations

import itertools
from typing import Any

import cases
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_k_moe.plugin import moe

import oracle

Array = cases.Array

HIDDEN, INTERMEDIATE = 64, 32
FORMATS = ["float32", "bfloat16", "int8", "int4", "int8 A8", "int4 A8"]
ROUTERS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "olmoe": {"norm_topk_prob": False},
    "nemotron": {"scoring": "sigmoid", "routed_scaling_factor": 2.5, "activation": "relu2"},
    "groups": {"scoring": "sigmoid", "n_group": 2, "topk_group": 1},
}
# Every kind of row; those that share see the whole step.
KINDS = np.array([0, 1, 2, 3, oracle.SHARED_PRICE, oracle.SHARED_EXPERTS], np.int32)
LIMITS = np.array([[0.6, 1.2], [0.7, 0], [0.3, 0], [0.8, 0], [0.1, 0], [1, 0]], np.float32)
K_VALUES = np.array([[1, 2, 4], [1, 2, 4], [1, 2, 3], [1, 2, 4], [0, 1, 4], [1, 2, 4]], np.int32)


def make(form: str, experts: int, activation: str) -> tuple[Array, Array, dict[str, Any]]:
    """Weights, and the arguments that say how they are stored."""
    if not form.startswith("int"):
        return *cases.weights(experts, HIDDEN, INTERMEDIATE, activation, form), {}
    made = cases.quantised(experts, HIDDEN, INTERMEDIATE, activation, int(form[3]), 32)
    return made.up, made.down, made.arguments | ({"activation_format": "int8"} if form.endswith("A8") else {})


def part_of(weights: tuple[Array, Array, dict[str, Any]], first: int, end: int) -> tuple[Array, Array, dict[str, Any]]:
    """A range's weights."""
    up, down, arguments = weights
    part = {name: value[first:end] if name.endswith("_scales") else value for name, value in arguments.items()}
    return up[first:end], down[first:end], part


def without_others(
    weights: tuple[Array, Array, dict[str, Any]], first: int, end: int
) -> tuple[Array, Array, dict[str, Any]]:
    """All experts' weights, of which those outside of the range give nothing."""
    up, down, arguments = weights
    zeroed = np.zeros_like(down)
    zeroed[first:end] = down[first:end]
    return up, zeroed, arguments


def run(step: tuple[Array, ...], weights: tuple[Array, Array, dict[str, Any]], **attributes: Any) -> tuple[Array, ...]:
    up, down, arguments = weights
    return moe(*step, up, down, **arguments, **attributes)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("router", ROUTERS)
@given(
    st.integers(0, 2**31), st.sampled_from([1, 2, 7, 40]), st.sampled_from([2, 6, 16]),
    st.lists(st.integers(1, 15), max_size=4), st.booleans(),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_the_parts_of_any_division_add_up_to_the_whole(
    router: str, form: str, seed: int, tokens: int, experts: int, cuts: list[int], normed: bool
) -> None:
    """The sum to rounding; k, entropy and each part to the bit, a part being the whole where others give nothing."""
    rng = np.random.default_rng(seed)
    attributes = {**ROUTERS[router], "max_k": min(4, experts)}
    x, logits = cases.tokens(tokens, HIDDEN, experts, seed=seed)
    step = (x, logits, rng.integers(0, len(KINDS), tokens).astype(np.int32), KINDS, LIMITS, K_VALUES)
    if normed:
        attributes["expert_norms"] = cases.norms(experts)
    if "scoring" in attributes:
        attributes["correction_bias"] = (rng.standard_normal(experts) * 0.1).astype(np.float32)
    weights = make(form, experts, attributes.get("activation", "swiglu"))
    whole, k, entropy = run(step, weights, **attributes)
    edges = sorted({0, experts, *(cut for cut in cuts if cut < experts)})
    total = np.zeros_like(whole)
    for first, end in itertools.pairwise(edges):
        output, *decided = run(step, part_of(weights, first, end), first_expert=first, **attributes)
        np.testing.assert_array_equal(decided[0], k)
        np.testing.assert_array_equal(decided[1], entropy)
        np.testing.assert_array_equal(output, run(step, without_others(weights, first, end), **attributes)[0])
        total += output
    np.testing.assert_allclose(total, whole, rtol=0, atol=2e-6 * max(np.abs(whole).max(), 1e-30))


def test_a_token_without_a_softmax_is_undefined_in_the_sum() -> None:
    """Some rank runs an expert for it."""
    x, logits = cases.tokens(3, HIDDEN, 6)
    logits[1, 2] = np.nan
    step = (x, logits, *cases.fixed(3, 2))
    weights = make("float32", 6, "swiglu")
    parts = [run(step, part_of(weights, first, first + 2), first_expert=first)[0] for first in (0, 2, 4)]
    assert np.isnan(sum(parts)).all(1).tolist() == [False, True, False]


def test_who_runs_none_of_a_ranges_experts_has_no_part_in_it() -> None:
    x, logits = cases.tokens(5, HIDDEN, 6)
    logits[:4, :3] += 100
    weights = make("bfloat16", 6, "swiglu")
    output, k, _ = run((x, logits, *cases.fixed(5, 3)), part_of(weights, 3, 6), first_expert=3)
    assert not output[:4].any() and output[4].any() and (k == 3).all()


@pytest.mark.parametrize(
    ("first", "count", "sentence"),
    [
        (-2, 4, r"attribute first_expert must be -1 \(the weights of all experts\) or the index of an expert"),
        (6, 1, "attribute first_expert must be less than the number of experts"),
        (
            3,
            4,
            "attribute first_expert is 3, from where on the weights of 4 experts are given, but there are 6 by input "
            "router_logits",
        ),
        (3, 0, "input down has no experts; with first_expert there must be at least one"),
        (-1, 3, r"input gate_up has shape \[3, 64, 64\] but must be \[E, 2I, H\], where E = 6 by input router_logits"),
    ],
)
def test_a_range_that_there_is_not_is_a_sentence(first: int, count: int, sentence: str) -> None:
    x, logits = cases.tokens(3, HIDDEN, 6)
    up, down, _ = make("float32", count, "swiglu") if count else (np.empty((0, 64, 64), np.float32),) * 3
    down = down if count else np.empty((0, HIDDEN, INTERMEDIATE), np.float32)
    with pytest.raises(ValueError, match=sentence):
        moe(x, logits, *cases.fixed(3, 2), up, down, first_expert=first)


def test_both_weights_are_of_the_same_experts() -> None:
    x, logits = cases.tokens(3, HIDDEN, 6)
    up, down, _ = make("float32", 3, "swiglu")
    with pytest.raises(ValueError, match=r"input down has shape \[2, 64, 32\] but must be \[W, H, I\], where W = 3"):
        moe(x, logits, *cases.fixed(3, 2), up, down[:2], first_expert=0)
