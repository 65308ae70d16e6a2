# SPDX-License-Identifier: Apache-2.0
"""Rows whose tokens share what the step reads: against the oracle, and what they may never do to others."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from adaptive_k_moe.plugin import moe, route

import oracle

KINDS = [oracle.ENTROPY, oracle.SHARED_PRICE, oracle.SHARED_EXPERTS, oracle.SHARED_PRICE, oracle.RATIO]


def table(k: int, price: float, additions: int, k_min: int) -> tuple[Any, Any, Any]:
    """policy_kind, thresholds, k_values: full, price, a number of experts, half the price for fewer of them, ratio."""
    limits = np.array([[np.inf], [price], [additions], [price / 2], [0.5]], np.float32)
    ks = np.array([[k, k], [k_min, k], [k_min, k], [0, max(1, k - 1)], [1, k]], np.int32)
    return np.array(KINDS, np.int32), limits, ks


@pytest.mark.parametrize("attributes", [
    {},
    {"norm_topk_prob": False},
    {"scoring": "sigmoid", "routed_scaling_factor": 2.5},
    {"scoring": "sigmoid", "n_group": 4, "topk_group": 2},
], ids=["mixtral", "olmoe", "sigmoid", "groups"])  # fmt: skip
@given(
    st.integers(0, 2**31), st.sampled_from([1, 2, 5, 16, 64]), st.sampled_from([4, 8, 64, 512]), st.integers(0, 2),
    st.sampled_from([1e-6, 0.05, 0.3, 1.5, 50.0]), st.integers(0, 9), st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_step_is_the_oracles(
    attributes: dict[str, Any],
    seed: int,
    tokens: int,
    experts: int,
    k_min: int,
    price: float,
    additions: int,
    hostile: bool,
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((tokens, experts), np.float32) * 2
    if hostile:
        logits[rng.random(logits.shape) < 0.02] = rng.choice(np.array([np.nan, np.inf, -np.inf], np.float32))
    index = rng.integers(0, len(KINDS), tokens).astype(np.int32)
    rows = table(min(6, experts // 2), price, additions, k_min)
    close: list[float] = []
    expected = oracle.route_step(logits, index, *rows, close=close, **attributes)
    assume(min(close, default=1.0) > 1e-5)
    got = route(logits, index, *rows, **attributes)
    for t, want in enumerate(expected):
        assert got.experts[t, : got.k[t]].tolist() == want.experts
        assert got.k[t] == want.k
        np.testing.assert_allclose(got.weights[t, : want.k], want.weights, rtol=2e-6, atol=1e-12)
        assert (got.experts[t, want.k :] == -1).all()


@given(st.integers(0, 2**31), st.integers(1, 16), st.integers(1, 16))
@settings(max_examples=40, deadline=None)
def test_others_are_what_they_are_alone(seed: int, others: int, sharing: int) -> None:
    """Tokens of rows that do not share: the same bits, whoever shares beside them."""
    rng = np.random.default_rng(seed)
    x, logits = cases.tokens(others + sharing, 32, 8, seed=seed)
    index = np.array(rng.permutation([0, 4] * others + [1, 2, 3] * sharing)[: others + sharing], np.int32)
    rows = table(3, 0.1, 1, 1)
    up, down = cases.weights(8, 32, 16, "swiglu")
    output, k, _ = moe(x, logits, index, *rows, up, down)
    mine = np.isin(index, [0, 4])
    if mine.any():
        alone, alone_k, _ = moe(x[mine], logits[mine], index[mine], *rows, up, down)
        assert (output[mine] == alone).all()
        assert (k[mine] == alone_k).all()


def test_a_token_for_which_nothing_is_read_runs_nothing() -> None:
    x, logits = cases.tokens(3, 32, 8)
    up, down = cases.weights(8, 32, 16, "swiglu")
    rows = np.array([oracle.SHARED_PRICE], np.int32), np.array([[100]], np.float32), np.array([[0, 2]], np.int32)
    output, k, entropy = moe(x, logits, np.zeros(3, np.int32), *rows, up, down)
    assert (k == 0).all() and (output == 0).all() and (entropy > 0).all()


def test_a_price_of_nothing_is_the_whole_top_k_refilled_from_the_union() -> None:
    """Every expert that anybody's own top-k holds is read, so each token keeps its own."""
    _, logits = cases.tokens(16, 8, 64)
    rows = (
        np.array([0, oracle.SHARED_PRICE], np.int32),
        np.array([[np.inf], [1e-30]], np.float32),
        np.full((2, 2), 4, np.int32),
    )
    own, shared = (route(logits, np.full(16, row, np.int32), *rows) for row in (0, 1))
    assert (own.experts == shared.experts).all() and (own.weights == shared.weights).all()


def test_more_is_read_as_the_price_falls() -> None:
    _, logits = cases.tokens(32, 8, 64)
    reads = []
    for price in (10.0, 1.0, 0.3, 0.1, 0.01):
        rows = np.array([oracle.SHARED_PRICE], np.int32), np.array([[price]], np.float32), np.array([[1, 6]], np.int32)
        experts = route(logits, np.zeros(32, np.int32), *rows).experts
        reads.append(len(set(experts[experts >= 0].tolist())))
    assert reads == sorted(reads) and reads[0] < reads[-1]
