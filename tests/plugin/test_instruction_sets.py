# SPDX-License-Identifier: Apache-2.0
"""The loops for each instruction set give the same results, and the choice can be forced."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import policies, tokens, weights

import oracle
from checkpoints import SUPPORT

SCRIPT = """
import sys
import numpy as np
from cases import policies, quantised, tokens, weights
from adaptive_k_moe.plugin import instruction_set, moe
results = {}
def check(name, hidden, up, down, **arguments):
    x, logits = tokens(70, hidden, 4)
    index, *rows = policies(70)
    whole = moe(x, logits, index, *rows, up, down, **arguments)[0]
    for t in (0, 33, 69):
        one = slice(t, t + 1)
        alone = moe(x[one], logits[one], index[one], *rows, up, down, **arguments)[0]
        assert (alone[0] == whole[t]).all()
    results[name] = whole
    return whole
for activation in ("swiglu", "relu2"):
    for dtype in ("float32", "bfloat16"):
        check(dtype + activation, 1100, *weights(4, 1100, 90, activation, dtype), activation=activation)
    for bits, group in ((8, None), (8, 96), (4, 32), (4, 96)):
        up, down, arguments, dense = quantised(4, 1152, 96, activation, bits, group)
        found = check(f"{bits} {group} {activation}", 1152, up, down, activation=activation, **arguments)
        assert (found == check("", 1152, *dense, activation=activation)).all()
        name = f"rounded {bits} {group} {activation}"
        check(name, 1152, up, down, activation=activation, activation_format="int8", **arguments)
    up, down, arguments, _ = quantised(1, 1040, 304, activation, 8, None)
    x, logits = tokens(300, 1040, 1)
    index, *rows = policies(300)
    results["rounded crowd " + activation] = moe(
        x, logits, index, *rows, up, down, activation=activation, activation_format="int8", **arguments
    )[0]
np.savez(sys.argv[1], **results)
print(instruction_set())
"""


def run(isa: str, output: Path) -> Any:
    command = [sys.executable, "-c", SCRIPT, str(output)]
    environment = {**os.environ, "ADAPTIVE_K_ISA": isa, "PYTHONPATH": str(SUPPORT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script finds with each instruction set that this machine has."""
    directory, found = tmp_path_factory.mktemp("results"), {}
    for isa in ("portable", "avx2", "avx_vnni", "avx512", "avx512_vnni", "amx"):
        done = run(isa, directory / f"{isa}.npz")
        if "does not have" in done.stderr and isa != "portable":
            continue
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == isa
        found[isa] = np.load(directory / f"{isa}.npz")
    return found


def test_all_instruction_sets_agree(results: dict[str, Any]) -> None:
    if len(results) < 2:
        pytest.skip("this machine has the portable loops only")
    for isa in results:
        for name in results["portable"].files:
            want = results["portable"][name]
            # AMX rounds activations to bfloat16: 8 bits, here of the input and of the experts' hidden values.
            error = 2**-7 if isa == "amx" and name.startswith("bfloat16") else 2e-6
            if name.startswith("rounded"):
                error = 2e-3  # a last bit may decide which way a hidden value is rounded
            np.testing.assert_allclose(results[isa][name], want, rtol=0, atol=error * np.abs(want).max())


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_without_amx_activations_are_not_rounded(activation: str, results: dict[str, Any]) -> None:
    up, down = weights(4, 1100, 90, activation, "bfloat16")
    want = oracle.moe(*tokens(70, 1100, 4), *policies(70), up, down, activation=activation)[0]
    got = results["portable"]["bfloat16" + activation]
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_integer_products_have_the_same_bits_everywhere(results: dict[str, Any]) -> None:
    """Their sums are exact, and floats are added in one order; portable loops have no fused multiply-add."""
    vectors = [isa for isa in results if isa != "portable"]
    if len(vectors) < 2:
        pytest.skip("this machine has fewer than two sets of vector instructions")
    for name in results["portable"].files:
        if name.startswith("rounded"):
            for isa in vectors:
                assert (results[isa][name] == results[vectors[0]][name]).all(), (isa, name)


def test_of_floats_amx_is_for_bfloat16_alone(results: dict[str, Any]) -> None:
    if "amx" not in results:
        pytest.skip("this machine has no amx")
    for name in results["amx"].files:
        same = np.array_equal(results["amx"][name], results["avx512"][name])
        assert same != name.startswith("bfloat16"), name


def test_an_unknown_instruction_set_is_refused_by_name(tmp_path: Path) -> None:
    done = run("mmx", tmp_path / "x.npz")
    assert "ValueError: ADAPTIVE_K_ISA is 'mmx', which this machine or build does not have" in done.stderr
