# SPDX-License-Identifier: Apache-2.0
"""Mamba2 against a NumPy oracle written from its definition, and against the mixer of `transformers`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from adaptive_k_moe import plugin

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


def run(case: Case, inputs: dict[str, Array], **options: Any) -> Array:
    """The operator; the states in `inputs` are updated."""
    return plugin.mamba2(**inputs, n_groups=case.n_groups, dt_min=case.dt_min, dt_max=case.dt_max, **options)


def copied(inputs: dict[str, Array]) -> dict[str, Array]:
    return {name: value.copy() for name, value in inputs.items()}


def assert_close(found: Array, expected: Array) -> None:
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    largest = np.nanmax(np.abs(expected), initial=1e-30)
    assert np.nanmax(np.abs(found - expected), initial=0.0) <= 3e-6 * largest


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_states_are_the_oracles(case: Case) -> None:
    inputs = make_inputs(case)
    y, conv_state, ssm_state = oracle(case, inputs)
    assert_close(run(case, inputs), y)
    assert_close(inputs["conv_state"], conv_state)
    assert_close(inputs["ssm_state"], ssm_state)


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


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", [replace(c, lengths=(29, 1, 14), pasts=(0, 6, 3)) for c in CASES[5:10]], ids=str)
def test_bits_do_not_depend_on_the_batch_or_on_how_a_prompt_is_cut(case: Case, threads: int) -> None:
    inputs = make_inputs(case)
    whole = copied(inputs)
    y = run(case, whole, num_threads=threads)
    parts = copied(inputs)
    outputs = []
    # Sequence 0 in pieces of several sizes beside the others' tokens, one by one and all at once.
    for pieces, pasts, order in (
        ([(0, 2), (29, 30)], [0, 6], [0, 1]),
        ([(30, 43), (2, 3)], [3, 2], [2, 0]),
        ([(3, 20)], [3], [0]),
        ([(43, 44), (20, 29)], [16, 20], [2, 0]),
    ):
        step = cut(parts, pieces, pasts, [int(inputs["state_slots"][i]) for i in order])
        outputs.append((pieces, run(case, step)))
    for pieces, found in outputs:
        np.testing.assert_array_equal(found, np.concatenate([y[begin:end] for begin, end in pieces]))
    np.testing.assert_array_equal(parts["conv_state"], whole["conv_state"])
    np.testing.assert_array_equal(parts["ssm_state"], whole["ssm_state"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state_slots": [0, 0]}, "state_slots has 0 twice"),
        ({"state_slots": [0, 9]}, "state_slots has 9 but there are 5 slots"),
        ({"state_slots": [-1, 0]}, "state_slots has -1"),
        ({"past_lens": [-1, 0]}, "past_lens has -1 for sequence 0"),
        ({"subsequence_begins": [0, 3, 6]}, "subsequence_begins must go from 0 to the 5 tokens"),
        ({"subsequence_begins": [0, 7, 5]}, "subsequence_begins falls after sequence 1"),
        ({"subsequence_begins": [0, 5]}, r"past_lens has shape \[2\] but must be \[S = 1\]"),
        ({"conv_bias": np.zeros(3, np.float32)}, r"conv_bias has shape \[3\] but must be \[channels = 72\]"),
    ],
)
def test_impossible_inputs_are_refused_by_name_and_change_nothing(change: dict[str, Any], message: str) -> None:
    case = Case((3, 2), (1, 0))
    inputs = make_inputs(case)
    before = copied(inputs)
    wrong = {name: np.asarray(value, inputs[name].dtype) for name, value in change.items()}
    with pytest.raises(ValueError, match=f"Mamba2: input {message}"):
        run(case, {**inputs, **wrong})
    np.testing.assert_array_equal(inputs["ssm_state"], before["ssm_state"])
    np.testing.assert_array_equal(inputs["conv_state"], before["conv_state"])


def test_groups_must_divide_the_heads() -> None:
    case = Case((3,), (0,))
    with pytest.raises(ValueError, match="n_groups is 4 but must divide the heads, which are 6"):
        plugin.mamba2(**make_inputs(case), n_groups=4)


@pytest.mark.parametrize(
    ("length", "sizes"),
    [
        (1, {}),
        (3, {}),
        (70, {}),  # of the reference's chunks of 32, more than two
        (40, {"n_groups": 1, "mamba_num_heads": 3, "mamba_head_dim": 20}),
        (40, {"time_step_min": 0.3, "use_conv_bias": False, "conv_kernel": 3}),
    ],
)
def test_the_mixer_of_transformers(length: int, sizes: dict[str, Any]) -> None:
    """The reference's own projections and norm around the operator."""
    import torch
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    torch.manual_seed(0)
    config = NemotronHConfig(
        **{
            "hidden_size": 24,
            "layers_block_type": ["linear_attention"],
            "mamba_num_heads": 6,
            "mamba_head_dim": 10,
            "ssm_state_size": 9,
            "n_groups": 2,
            "chunk_size": 32,
            **sizes,
        }
    )
    mixer = NemotronHMamba2Mixer(config, layer_idx=0).eval()
    with torch.no_grad():
        mixer.A_log.uniform_(-1, 2)
        mixer.dt_bias.normal_()
        mixer.D.normal_()
        hidden = torch.randn(1, length, 24)
        expected = mixer(hidden)[0]
        gate, conv_input, dt = mixer.in_proj(hidden)[0].split(
            [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], -1
        )
    channels, taps, heads = mixer.conv_dim, mixer.conv_kernel_size, mixer.num_heads

    def floats(tensor: Any) -> Array:
        return np.ascontiguousarray(tensor.detach().numpy())

    y = plugin.mamba2(
        floats(conv_input),
        floats(dt),
        np.array([0, length], np.int32),
        np.array([0], np.int32),
        np.array([0], np.int32),
        floats(mixer.conv1d.weight[:, 0].T),
        np.zeros(channels, np.float32) if mixer.conv1d.bias is None else floats(mixer.conv1d.bias),
        -np.exp(floats(mixer.A_log)),
        floats(mixer.D),
        floats(mixer.dt_bias),
        np.full((1, taps - 1, channels), np.nan, np.float32),
        np.full((1, heads, mixer.ssm_state_size, mixer.head_dim), np.nan, np.float32),
        n_groups=mixer.n_groups,
        dt_min=config.time_step_min,
    )
    with torch.no_grad():
        found = mixer.out_proj(mixer.norm(torch.from_numpy(y), gate))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
