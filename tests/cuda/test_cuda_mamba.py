# SPDX-License-Identifier: Apache-2.0
"""Mamba2's kernels in the interpreter, under random schedules: against the float64 oracle, the CPU kernels, and
themselves; and what their launcher promises apart from numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cuda_launcher import ELEMENTS, Interpreter
from cuda_mamba import CASES, POINTERS, SMALL, MambaLayer, MambaLibrary, check, expected_of, make, run
from hypothesis import given as draws
from hypothesis import settings
from hypothesis import strategies as st

from adaptive_k_moe import plugin

from mamba_oracle import Array, Case, copied, cut

GOOD = MambaLayer(4, 2, 3, 4, 64, 128, n_groups=2)


@pytest.mark.parametrize("slow", [False, True], ids=["short memory", "long memory"])
@pytest.mark.parametrize("element", list(ELEMENTS))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_states_are_the_oracles(interpreter: Interpreter, case: Case, element: str, slow: bool) -> None:
    given, exact = make(case, element, slow=slow)
    check(case, exact, element, run(interpreter, case, given, element, seed=1))


@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[7]], ids=str)
def test_states_that_are_not_in_place_come_out_whole(interpreter: Interpreter, case: Case) -> None:
    given, exact = make(case, "float16")
    apart = run(interpreter, case, given, "float16", in_place=False)
    check(case, exact, "float16", apart)
    for found, expected in zip(apart, run(interpreter, case, given, "float16"), strict=True):
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("element", list(ELEMENTS))
def test_results_do_not_depend_on_the_schedule(interpreter: Interpreter, element: str) -> None:
    case = CASES[7]
    given, _ = make(case, element)
    first = run(interpreter, case, given, element, seed=0)
    for seed in range(1, 6):
        for found, expected in zip(run(interpreter, case, given, element, seed=seed), first, strict=True):
            assert found.tobytes() == expected.tobytes()


def part_of(inputs: dict[str, Array], pieces: list[tuple[int, int]], pasts: list[int]) -> dict[str, Array]:
    """The same layer and states for other rows, as sequences in the first slots that `inputs` names."""
    return cut(copied(inputs), pieces, pasts, inputs["state_slots"][: len(pieces)].tolist())


@pytest.mark.parametrize("element", list(ELEMENTS))
def test_a_sequence_does_not_depend_on_the_others(interpreter: Interpreter, element: str) -> None:
    case = CASES[7]
    inputs, _ = make(case, element)
    y, conv_state, ssm_state = run(interpreter, case, inputs, element)
    for i, (length, past) in enumerate(zip(case.lengths, case.pasts, strict=True)):
        begin, slot = int(inputs["subsequence_begins"][i]), inputs["state_slots"][i]
        alone = {**part_of(inputs, [(begin, begin + length)], [past]), "state_slots": np.array([slot], np.int32)}
        own = run(interpreter, replace(case, lengths=(length,), pasts=(past,)), alone, element)
        assert own[0].tobytes() == y[begin : begin + length].tobytes()
        assert own[1][slot].tobytes() == conv_state[slot].tobytes()
        assert own[2][slot].tobytes() == ssm_state[slot].tobytes()


@pytest.mark.parametrize("element", list(ELEMENTS))
def test_a_prompt_in_pieces_and_then_decode_is_the_whole(interpreter: Interpreter, element: str) -> None:
    """Two sequences of 75 and 9 tokens, in steps that mix chunks, pieces shorter than one and single tokens."""
    case = Case((75, 9), (0, 0), **SMALL)
    inputs, exact = make(case, element, slow=True)
    y = expected_of(case, exact)[0]
    found = np.zeros_like(y)
    done = [0, 0]
    for lengths in ((40, 1), (3, 6), (29, 0), (1, 1), (2, 1)):
        pieces = [(75 * i + done[i], 75 * i + done[i] + n) for i, n in enumerate(lengths)]
        step = part_of(inputs, pieces, done)
        own = replace(case, lengths=lengths, pasts=tuple(done))
        out, inputs["conv_state"], inputs["ssm_state"] = run(interpreter, own, step, element)
        found[np.concatenate([np.arange(*piece) for piece in pieces])] = out
        done = [begin + n for begin, n in zip(done, lengths, strict=True)]
    assert done == [75, 9]
    tolerance = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 1.6e-2}[element]
    assert np.abs(found - y).max() <= tolerance * np.abs(y).max()


@pytest.mark.parametrize("element", list(ELEMENTS))
@pytest.mark.parametrize("slot", [-1, 9, 2**31 - 1, -(2**31)])
def test_a_sequence_without_a_slot_gives_zeros_and_changes_no_state(
    interpreter: Interpreter, slot: int, element: str
) -> None:
    case = Case((1, 40, 3, 34), (4, 0, 0, 2), **SMALL)
    given, exact = make(case, element)
    for arrays in (given, exact):
        arrays["state_slots"][[0, 1]] = slot
    found = run(interpreter, case, given, element)
    assert not found[0][:41].any()
    check(case, exact, element, found)


def test_equals_the_cpu_kernels(interpreter: Interpreter) -> None:
    for case in CASES:
        given, _ = make(case, "float32")
        y, conv_state, ssm_state = run(interpreter, case, given, "float32")
        expected = plugin.mamba2(**given, n_groups=case.n_groups, dt_min=case.dt_min, dt_max=case.dt_max)
        largest = np.abs(expected).max(initial=1e-30)
        assert np.abs(y - expected).max(initial=0.0) <= 3e-6 * largest
        np.testing.assert_array_equal(conv_state, given["conv_state"])
        np.testing.assert_allclose(ssm_state, given["ssm_state"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("element", ["float16", "float32"])
def test_nan_spoils_its_own_sequence_only(interpreter: Interpreter, element: str) -> None:
    case = Case((1, 40, 3, 1), (4, 0, 0, 2), **SMALL)
    given, _ = make(case, element)
    given["ssm_state"], given["conv_state"] = (np.nan_to_num(given[name]) for name in ("ssm_state", "conv_state"))
    given["conv_input"][5] = np.nan
    y, conv_state, ssm_state = run(interpreter, case, given, element)
    assert np.isnan(y[5:41]).any()
    assert not np.isnan(np.delete(y, np.arange(1, 41), 0)).any()
    others = given["state_slots"][[0, 2, 3]]
    assert not np.isnan(ssm_state[others]).any()
    assert not np.isnan(conv_state[others]).any()


@draws(
    sequences=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3), st.booleans()), min_size=1, max_size=6),
    groups=st.sampled_from([1, 2, 4]),
    taps=st.integers(2, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_any_ragged_batch(
    interpreter: Interpreter, sequences: list[tuple[int, int, bool]], groups: int, taps: int, seed: int
) -> None:
    lengths, pasts, idle = zip(*sequences, strict=True)
    case = Case(lengths, pasts, heads=4, head_dim=16, state_size=8, n_groups=groups, taps=taps)
    given, exact = make(case, "float16", seed, slow=seed % 2 == 0)
    for arrays in (given, exact):
        arrays["state_slots"][np.flatnonzero(idle)] = -1
    check(case, exact, "float16", run(interpreter, case, given, "float16", seed=seed, in_place=seed % 3 > 0))


def test_no_tokens_is_no_work_but_states_that_are_not_in_place(interpreter: Interpreter) -> None:
    case = Case((0, 0), (3, 0), **SMALL)
    given, _ = make(case, "float16")
    for in_place in (True, False):
        y, conv_state, ssm_state = run(interpreter, case, given, "float16", in_place=in_place)
        assert y.size == 0
        np.testing.assert_array_equal(conv_state, given["conv_state"])
        np.testing.assert_array_equal(ssm_state, given["ssm_state"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 0}, "must be positive"),
        ({"state_size": -8}, "must be positive"),
        ({"n_groups": 3}, "n_groups must be at least 1 and divide the heads"),
        ({"n_groups": 0}, "n_groups must be at least 1"),
        ({"dt_min": -1.0}, "must rise from 0"),
        ({"dt_min": 2.0, "dt_max": 1.0}, "must rise from 0"),
        ({"heads": 65536, "n_groups": 1}, "at most 65535 heads"),
        ({"head_dim": 60}, "multiples of 8"),
        ({"state_size": 12}, "multiples of 8"),
        ({"state_size": 264}, "at most 256"),
        ({"taps": 1}, "2 to 16 taps"),
        ({"taps": 17}, "2 to 16 taps"),
        ({"heads": 65535, "n_groups": 1, "head_dim": 1 << 20}, "channels must stay below 2^31"),
        ({"tokens": -1}, "must not be negative"),
        ({"slots": -1}, "must not be negative"),
        ({"tokens": 1 << 31}, "tokens must stay below 2^31"),
    ],
)
def test_wrong_shapes_are_refused_in_a_sentence(interpreter: Interpreter, change: dict[str, Any], words: str) -> None:
    library, wrong = MambaLibrary(interpreter), replace(GOOD, **change)
    assert words in (library.check(wrong) or "accepted")
    assert library.launch(wrong, dict.fromkeys(POINTERS, 1 << 20), 1 << 20) == 1  # cudaErrorInvalidValue


def test_good_shapes_are_accepted(interpreter: Interpreter) -> None:
    library = MambaLibrary(interpreter)
    for change in ({}, {"tokens": 0, "sequences": 0, "slots": 0}, {"state_size": 256, "taps": 16}, {"heads": 65532}):
        assert library.check(replace(GOOD, **change)) is None


@pytest.mark.parametrize("missing", [*POINTERS, "workspace"])
def test_a_missing_pointer_is_refused(interpreter: Interpreter, missing: str) -> None:
    # The states are in place, so that nothing is copied before all have been looked at.
    pointers: dict[str, int | None] = dict.fromkeys(POINTERS, 1 << 20)
    pointers[missing] = None
    pointers.pop("workspace", None)
    workspace = None if missing == "workspace" else 1 << 20
    assert MambaLibrary(interpreter).launch(GOOD, pointers, workspace) == 1


def test_the_workspace_never_shrinks_with_more_tokens(interpreter: Interpreter) -> None:
    library = MambaLibrary(interpreter)
    sizes = [library.workspace_size(replace(GOOD, tokens=tokens)) for tokens in range(40)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 0
