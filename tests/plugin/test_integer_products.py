# SPDX-License-Identifier: Apache-2.0
"""Integer weights times activations rounded to int8 (`activation_format`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cases import policies, quantised, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_k_moe.plugin import moe

import oracle

Array = npt.NDArray[Any]

FORMATS = [(8, None), (8, 32), (8, 96), (8, 128), (8, 160), (4, None), (4, 32), (4, 64), (4, 128), (4, 160)]


def sizes(group: int | None) -> tuple[int, int]:
    """Hidden and intermediate size: neither is a whole number of blocks where the format allows that."""
    return (1056, 96) if group is None else (group * 9, group * 2)


def run(
    x: Array, logits: Array, weights: Any, activation: str, *, rounded: bool = True, index: Array | None = None
) -> Array:
    up, down, arguments, _ = weights
    count = len(x)
    rows = policies(count)
    return moe(
        x,
        logits,
        rows[0] if index is None else index,
        *rows[1:],
        up,
        down,
        activation=activation,
        activation_format="int8" if rounded else "",
        **arguments,
    )[0]


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize("count", [1, 3, 40])
def test_it_equals_the_oracle_with_activations_rounded(
    count: int, bits: int, group: int | None, activation: str
) -> None:
    hidden, intermediate = sizes(group)
    weights = quantised(4, hidden, intermediate, activation, bits, group)
    x, logits = tokens(count, hidden, 4)
    found = run(x, logits, weights, activation)
    dense = weights[3]

    def rounds(row: Array) -> Array:
        return oracle.in_int8(row, group)

    want = oracle.moe(x, logits, *policies(count), *dense, activation=activation, activations_in=rounds)[0]
    largest = np.abs(want).max()
    # Where float32's last bit decides which way a hidden value is rounded, one step of it shows; elsewhere nothing.
    assert np.abs(found - want).max() < 4e-3 * largest
    assert np.median(np.abs(found - want)) < 2e-5 * largest
    exact = run(x, logits, weights, activation, rounded=False)
    assert 1e-3 < np.abs(found - exact).max() / largest < 0.06


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_tokens_bits_do_not_depend_on_its_company(data: st.DataObject) -> None:
    bits, group = data.draw(st.sampled_from(FORMATS))
    experts = data.draw(st.integers(1, 5))
    count = data.draw(st.sampled_from([2, 4, 5, 8, 17, 33, 70, 300]))
    hidden, intermediate = sizes(group)
    weights = quantised(experts, hidden, intermediate, "swiglu", bits, group)
    x, logits = tokens(count, hidden, experts, seed=data.draw(st.integers(0, 99)))
    index = policies(count)[0]
    together = run(x, logits, weights, "swiglu", index=index)
    begin = data.draw(st.integers(0, count - 1))
    end = data.draw(st.integers(begin + 1, min(count, begin + 40)))
    part = slice(begin, end)
    apart = run(x[part], logits[part], weights, "swiglu", index=index[part])
    assert (apart == together[part]).all()


@pytest.mark.parametrize("count", [2, 30])
def test_rows_of_nothing_and_rows_that_are_not_finite(count: int) -> None:
    weights = quantised(2, 256, 128, "swiglu", 8, None)
    x, logits = tokens(count, 256, 2)
    plain = run(x, logits, weights, "swiglu")
    for value, expected in ((0.0, 0.0), (1e-42, 0.0), (np.nan, np.nan), (np.inf, np.nan), (1e-30, None)):
        changed = x.copy()
        changed[1] = value
        found = run(changed, logits, weights, "swiglu")
        others = np.arange(count) != 1
        assert (found[others] == plain[others]).all()
        if expected is not None:
            np.testing.assert_array_equal(found[1], np.full(256, expected, np.float32))
        else:
            assert not np.isnan(found[1]).all()


def test_a_row_that_is_partly_not_finite_shows() -> None:
    weights = quantised(1, 256, 128, "swiglu", 4, 128)
    x, logits = tokens(3, 256, 1)
    x[1, 200] = np.nan
    found = run(x, logits, weights, "swiglu")
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()


def test_the_most_negative_integers() -> None:
    """-128 times 127, summed as unsigned and signed bytes of 16 bits might overflow."""
    up = np.full((1, 256, 256), -128, np.int8)
    down = np.full((1, 256, 128), -128, np.int8)
    ones = {"gate_up_scales": np.full((1, 256, 1), 1e-3, np.float32), "down_scales": np.ones((1, 256, 1), np.float32)}
    for sign in (1, -1):
        x = np.full((5, 256), sign, np.float32)
        index, *rows = policies(5)
        found = moe(x, np.zeros((5, 1), np.float32), index, *rows, up, down, activation_format="int8", **ones)[0]
        gate = -128 * 256 * 1e-3 * sign
        hidden = gate / (1 + np.exp(-gate)) * gate
        np.testing.assert_allclose(found, hidden * -128 * 128, rtol=1e-5)


def test_what_cannot_be_is_refused_by_name() -> None:
    x, logits = tokens(2, 64, 2)
    index, *rows = policies(2)
    dense = [np.zeros((2, 64, 64), np.float32), np.zeros((2, 64, 32), np.float32)]
    with pytest.raises(ValueError, match="activation_format must be empty unless weight_format is int8 or int4"):
        moe(x, logits, index, *rows, *dense, activation_format="int8")
    up, down, arguments, _ = quantised(2, 64, 32, "swiglu", 8, None)
    with pytest.raises(ValueError, match="activation_format is 'int4' but must be one of int8"):
        moe(x, logits, index, *rows, up, down, activation_format="int4", **arguments)
