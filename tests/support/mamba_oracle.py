# SPDX-License-Identifier: Apache-2.0
"""Mamba2 in NumPy float64, one token and one head at a time, and the cases that every binding of it is held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """Sizes of a layer, and the new and past tokens of each sequence of a step."""

    lengths: tuple[int, ...]
    pasts: tuple[int, ...]
    heads: int = 6
    head_dim: int = 5
    state_size: int = 7
    n_groups: int = 3
    taps: int = 4
    dt_min: float = 0.0
    dt_max: float = float("inf")

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim + 2 * self.n_groups * self.state_size


CASES = [
    Case((1,), (0,)),
    Case((1,), (9,)),
    Case((2,), (0,)),  # a prompt shorter than the convolution
    Case((2,), (1,)),  # whose past is shorter as well
    Case((37,), (0,)),
    Case((1, 5, 1, 0, 12, 3), (4, 0, 1, 3, 7, 2)),
    Case((3, 40), (0, 11), heads=4, head_dim=64, state_size=16, n_groups=1),
    Case((1, 1, 1), (5, 0, 2), heads=4, head_dim=80, state_size=128, n_groups=2),
    Case((9, 1), (0, 3), heads=8, head_dim=12, state_size=33, n_groups=8, taps=2),
    Case((20, 1), (2, 6), heads=3, head_dim=136, state_size=5, n_groups=1, taps=7),
    Case((13,), (1,), dt_min=0.4, dt_max=0.9),
    Case((1,), (1,), heads=1, head_dim=1, state_size=1, n_groups=1),
    Case((400,), (3,), heads=2, head_dim=8, state_size=4, n_groups=2),
]


def make_inputs(case: Case, seed: int = 0) -> dict[str, Array]:
    """Inputs whose unused slots, and those of sequences without a past, hold NaN."""
    rng = np.random.default_rng(seed)
    tokens, sequences = sum(case.lengths), len(case.lengths)
    slots = rng.permutation(sequences + 3)[:sequences].astype(np.int32)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    conv_state = np.full((sequences + 3, case.taps - 1, case.channels), np.nan, np.float32)
    ssm_state = np.full((sequences + 3, case.heads, case.state_size, case.head_dim), np.nan, np.float32)
    for slot, past in zip(slots, case.pasts, strict=True):
        if past:
            conv_state[slot] = normal(*conv_state.shape[1:])
            ssm_state[slot] = normal(*ssm_state.shape[1:])
    return {
        "conv_input": normal(tokens, case.channels),
        "dt": normal(tokens, case.heads),
        "subsequence_begins": np.cumsum((0, *case.lengths)).astype(np.int32),
        "past_lens": np.array(case.pasts, np.int32),
        "state_slots": slots,
        "conv_weight": normal(case.taps, case.channels) / 2,
        "conv_bias": normal(case.channels),
        "a": -rng.uniform(0.2, 8, case.heads).astype(np.float32),
        "d": normal(case.heads),
        "dt_bias": normal(case.heads),
        "conv_state": conv_state,
        "ssm_state": ssm_state,
    }


def oracle(case: Case, inputs: dict[str, Array]) -> tuple[Array, Array, Array]:
    """The definition in float64: one token, one head, one number at a time."""
    x = {name: value.astype(np.float64) if value.dtype == np.float32 else value for name, value in inputs.items()}
    conv_state, ssm_state = x["conv_state"].copy(), x["ssm_state"].copy()
    width, shared = case.heads * case.head_dim, case.n_groups * case.state_size
    y = np.zeros((len(x["conv_input"]), width))
    for s, slot in enumerate(x["state_slots"]):
        begin, end = x["subsequence_begins"][s : s + 2]
        if begin == end:
            continue
        fresh = x["past_lens"][s] == 0
        history = list(np.zeros_like(conv_state[slot]) if fresh else conv_state[slot])
        state = np.zeros_like(ssm_state[slot]) if fresh else ssm_state[slot]
        for t in range(begin, end):
            history.append(x["conv_input"][t])
            window = history[-case.taps :]
            mixed = x["conv_bias"] + sum(w * row for w, row in zip(x["conv_weight"], window, strict=True))
            mixed = mixed / (1 + np.exp(-mixed))
            b, c = mixed[width : width + shared], mixed[width + shared :]
            for h in range(case.heads):
                g = h // (case.heads // case.n_groups)
                dt = np.log1p(np.exp(x["dt"][t, h] + x["dt_bias"][h]))
                dt = min(max(dt, case.dt_min), case.dt_max)
                token = mixed[h * case.head_dim : (h + 1) * case.head_dim]
                taken = dt * np.outer(b[g * case.state_size :][: case.state_size], token)
                state[h] = np.exp(dt * x["a"][h]) * state[h] + taken
                out = c[g * case.state_size :][: case.state_size] @ state[h] + x["d"][h] * token
                y[t, h * case.head_dim : (h + 1) * case.head_dim] = out
        conv_state[slot] = np.array(history[-(case.taps - 1) :])
        ssm_state[slot] = state
    return y, conv_state, ssm_state


def copied(inputs: dict[str, Array]) -> dict[str, Array]:
    return {name: value.copy() for name, value in inputs.items()}


def assert_close(found: Array, expected: Array, tolerance: float = 3e-6) -> None:
    """Equal but for `tolerance` of the largest; NaN in the same places."""
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    largest = np.nanmax(np.abs(expected), initial=1e-30)
    assert np.nanmax(np.abs(found - expected), initial=0.0) <= tolerance * largest


def cut(
    inputs: dict[str, Array], pieces: list[tuple[int, int]], pasts: list[int], slots: list[int]
) -> dict[str, Array]:
    """The same layer and states for other rows: each piece (begin, end) is a sequence of the new step."""
    rows = np.concatenate([np.arange(*piece) for piece in pieces])
    return {
        **inputs,
        "conv_input": inputs["conv_input"][rows],
        "dt": inputs["dt"][rows],
        "subsequence_begins": np.cumsum([0, *(end - begin for begin, end in pieces)]).astype(np.int32),
        "past_lens": np.array(pasts, np.int32),
        "state_slots": np.array(slots, np.int32),
    }
