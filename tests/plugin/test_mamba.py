# SPDX-License-Identifier: Apache-2.0
"""Mamba2 on NumPy arrays against the oracle written from its definition, and against the mixer of `transformers`."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adaptive_k_moe import plugin

from checkpoints import SUPPORT
from mamba_oracle import CASES, Array, Case, assert_close, copied, cut, make_inputs, oracle


def run(case: Case, inputs: dict[str, Array], **options: Any) -> Array:
    """The operator; the states in `inputs` are updated."""
    return plugin.mamba2(**inputs, n_groups=case.n_groups, dt_min=case.dt_min, dt_max=case.dt_max, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_states_are_the_oracles(case: Case) -> None:
    inputs = make_inputs(case)
    y, conv_state, ssm_state = oracle(case, inputs)
    assert_close(run(case, inputs), y)
    assert_close(inputs["conv_state"], conv_state)
    assert_close(inputs["ssm_state"], ssm_state)


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


def test_a_sequence_without_a_slot_gives_zeros_and_changes_no_state() -> None:
    case = Case((3, 1, 40, 2), (0, 6, 3, 0))
    inputs = make_inputs(case)
    inputs["state_slots"][[0, 2]] = -1
    before = copied(inputs)
    others = cut(inputs, [(3, 4), (44, 46)], [6, 0], list(inputs["state_slots"][[1, 3]]))
    expected = run(case, others := {**others, **{name: before[name].copy() for name in ("conv_state", "ssm_state")}})
    y = run(case, inputs)
    np.testing.assert_array_equal(y[[3, 44, 45]], expected)
    assert not y[:3].any()
    assert not y[4:44].any()
    for name in ("conv_state", "ssm_state"):
        np.testing.assert_array_equal(inputs[name], others[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state_slots": [0, 0]}, "state_slots has 0 twice"),
        ({"state_slots": [0, 9]}, "state_slots has 9 but there are 5 slots"),
        ({"state_slots": [-2, 0]}, "state_slots has -2"),
        ({"past_lens": [-1, 0]}, "past_lens has -1 for sequence 0"),
        ({"subsequence_begins": [0, 3, 6]}, "subsequence_begins must go from 0 to the 5 tokens"),
        ({"subsequence_begins": [0, 7, 5]}, "subsequence_begins falls after sequence 1"),
        (
            {"subsequence_begins": [0, 5]},
            r"past_lens has shape \[2\] but must be \[S\], where S = 1 by input subsequence_begins",
        ),
        (
            {"conv_bias": np.zeros(3, np.float32)},
            r"conv_bias has shape \[3\] but must be \[channels\], where channels = 72 by input conv_input",
        ),
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
    sentence = r"n_groups must be at least 1 and divide the heads \(n_groups=4 dt_min=0 dt_max=inf, 6 heads\)"
    with pytest.raises(ValueError, match=sentence):
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


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "amx"])
def test_every_instruction_set_is_the_oracles(isa: str) -> None:
    """In a process of its own: the choice is made once."""
    script = (
        "from adaptive_k_moe import plugin\n"
        "from mamba_oracle import CASES, assert_close, make_inputs, oracle\n"
        f"assert plugin.instruction_set() == {isa!r}\n"
        "for case in CASES:\n"
        "    inputs = make_inputs(case)\n"
        "    expected = oracle(case, inputs)\n"
        "    y = plugin.mamba2(**inputs, n_groups=case.n_groups, dt_min=case.dt_min, dt_max=case.dt_max)\n"
        "    for found, value in zip((y, inputs['conv_state'], inputs['ssm_state']), expected):\n"
        "        assert_close(found, value)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "ADAPTIVE_K_ISA": isa, "PYTHONPATH": str(SUPPORT)},
        capture_output=True,
        text=True,
    )
    if "which this machine or build does not have" in run.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert run.returncode == 0, run.stderr
