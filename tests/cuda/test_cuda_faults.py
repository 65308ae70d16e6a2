# SPDX-License-Identifier: Apache-2.0
"""Tests of the tests: a wrong step put into a kernel, or a barrier taken out, must be seen, and by the check
that it concerns. The switches exist in the interpreter's build alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_cases import check_output, check_plan, check_routing, make_inputs
from cuda_launcher import Interpreter, Layer
from cuda_mamba import SMALL as MAMBA
from cuda_mamba import check as check_mamba
from cuda_mamba import make as make_mamba
from cuda_mamba import run as run_mamba

from mamba_oracle import Case

DEVICE_H = Path(__file__).resolve().parents[2] / "plugin" / "cuda" / "device.h"
FAULTS = re.findall(r"^  (kFault\w+),", DEVICE_H.read_text(), re.MULTILINE)
NUMBER = {name: number for number, name in enumerate(FAULTS, start=1)}

SMALL = dict(tokens=6, hidden=16, intermediate=16, experts=4, element="float32", max_k=3)
MANY = {**SMALL, "tokens": 40, "experts": 3}
PART = {"first_expert": 0, "local_experts": 2}
QUANTISED = {**SMALL, "hidden": 64, "intermediate": 64, "weights": "int8", "group_size": 32}
INTEGERS = {**QUANTISED, "weights": "int4", "element": "float16", "hidden": 256, "path": "decode"}
MIXED = {**QUANTISED, "element": "float16", "hidden": 320, "path": "prefill"}

# Each fault: the layer that meets it, the kind of logits, and the check that must fail.
CASES: dict[str, tuple[dict[str, Any], str, Callable[..., None]]] = {
    "kFaultRouteEntropy": (SMALL, "plain", check_routing),
    "kFaultRouteTie": (SMALL, "ties", check_routing),
    "kFaultRouteWeight": (SMALL, "plain", check_routing),
    "kFaultRouteBarrier": ({**SMALL, "experts": 200}, "plain", check_routing),
    "kFaultRouteNorm": ({**MANY, "experts": 16, "max_k": 8}, "plain", check_routing),
    "kFaultShareMask": ({**MANY, "experts": 16}, "plain", check_routing),
    "kFaultShareStartBarrier": ({**MANY, "tokens": 12, "experts": 16}, "plain", check_routing),
    "kFaultShareBarrier": ({**MANY, "tokens": 32, "experts": 128}, "plain", check_routing),
    "kFaultShareWorthBarrier": ({**MANY, "experts": 128}, "plain", check_routing),
    "kFaultShareChunkBarrier": ({**MANY, "tokens": 300, "experts": 64}, "plain", check_routing),
    "kFaultPlanRank": (MANY, "plain", check_plan),
    "kFaultPlanBase": ({**MANY, "tokens": 300, "hidden": 8, "intermediate": 8, "path": "prefill"}, "plain", check_plan),
    "kFaultPlanStartBarrier": (SMALL, "plain", check_plan),
    "kFaultPlanBarrier": (MANY, "plain", check_plan),
    "kFaultPlanRange": ({**MANY, **PART, "path": "decode"}, "plain", check_output),
    "kFaultDecodeRow": ({**MANY, "path": "decode"}, "plain", check_output),
    "kFaultDecodeTail": ({**SMALL, "path": "decode"}, "plain", check_output),
    "kFaultDecodeScale": ({**QUANTISED, "path": "decode"}, "plain", check_output),
    "kFaultDecodeColumns": ({**INTEGERS, "group_size": 32}, "plain", check_output),
    "kFaultDecodeBarrier": ({**SMALL, "path": "decode"}, "plain", check_output),
    "kFaultDecodeReuseBarrier": ({**MANY, "path": "decode"}, "plain", check_output),
    "kFaultMixedScale": (MIXED, "plain", check_output),
    "kFaultMixedWait": (MIXED, "plain", check_output),
    "kFaultMixedBarrier": (MIXED, "plain", check_output),
    "kFaultUpActivation": ({**SMALL, "path": "decode"}, "plain", check_output),
    "kFaultGatherRow": ({**MANY, "path": "prefill"}, "plain", check_output),
    "kFaultActivation": ({**SMALL, "path": "prefill"}, "plain", check_output),
    "kFaultGroupedOffset": ({**SMALL, "path": "prefill"}, "plain", check_output),
    "kFaultCombineRange": ({**MANY, **PART, "path": "prefill"}, "plain", check_output),
    "kFaultCombineOrder": (SMALL, "plain", check_output),
}

# Faults that decode's kernel for integers has too.
MANY_INTEGERS = {**INTEGERS, "tokens": 40, "experts": 3, "hidden": 64}
INTEGER_CASES: dict[str, dict[str, Any]] = {
    "kFaultDecodeRow": MANY_INTEGERS,
    "kFaultDecodeTail": INTEGERS,
    "kFaultDecodeScale": INTEGERS,
    "kFaultDecodeBarrier": INTEGERS,
    "kFaultDecodeReuseBarrier": MANY_INTEGERS,
    "kFaultUpActivation": INTEGERS,
}


# The same for Mamba2: the step that meets the fault, and its element type.
RECURRENCE = (Case((1, 2), (0, 3), **MAMBA), "float32")
CHUNKS = (Case((70,), (3,), **MAMBA), "float16")
MAMBA_CASES: dict[str, tuple[Case, str]] = {
    "kFaultMambaGroup": RECURRENCE,
    "kFaultMambaFreshConv": RECURRENCE,
    "kFaultMambaFresh": RECURRENCE,
    "kFaultMambaConvOrder": RECURRENCE,
    "kFaultMambaDecay": RECURRENCE,
    "kFaultMambaRecurBarrier": RECURRENCE,
    "kFaultMambaSumBarrier": RECURRENCE,
    "kFaultMambaCausal": CHUNKS,
    "kFaultMambaPassState": CHUNKS,
    "kFaultMambaTail": (Case((39, 6), (3, 0), **MAMBA), "float16"),
    "kFaultMambaStateDecay": CHUNKS,
    "kFaultMambaWait": CHUNKS,
    "kFaultMambaChunkBarrier": CHUNKS,
    "kFaultMambaHalvesBarrier": CHUNKS,
}


def mamba_failures(interpreter: Interpreter, name: str, fault: int, seeds: range) -> int:
    """As `failures`."""
    case, element = MAMBA_CASES[name]
    given, exact = make_mamba(case, element, slow=True)
    failed = 0
    for seed in seeds:
        try:
            found = run_mamba(interpreter, case, given, element, seed=seed, fault=fault)
            with np.errstate(all="ignore"):
                check_mamba(case, exact, element, found)
        except (AssertionError, RuntimeError):
            failed += 1
    return failed


def integer_failures(interpreter: Interpreter, name: str, fault: int, seeds: range) -> int:
    """As `failures`."""
    return failures(interpreter, name, fault, seeds, (INTEGER_CASES[name], "plain", check_output))


def failures(
    interpreter: Interpreter,
    name: str,
    fault: int,
    seeds: range,
    case: tuple[dict[str, Any], str, Callable[..., None]] | None = None,
) -> int:
    """In how many runs the check fails, or the interpreter itself objects."""
    shape, logits, check = case or CASES[name]
    layer = Layer(**shape)
    inputs, exact = make_inputs(layer, 0, logits=logits, sharing="Share" in name)
    failed = 0
    for seed in seeds:
        try:
            # Zeros where a wrong step leaves memory unwritten: a valid index, so that the run goes on to its check.
            result = interpreter.run(layer, inputs, seed=seed, fault=fault, garbage=0)
            with np.errstate(all="ignore"):
                check(layer, exact, result)
        except (AssertionError, RuntimeError):
            failed += 1
    return failed


@pytest.mark.parametrize(
    ("name", "failures_of"),
    [
        *((name, failures) for name in CASES),
        *((name, integer_failures) for name in INTEGER_CASES),
        *((name, mamba_failures) for name in MAMBA_CASES),
    ],
)
def test_a_wrong_step_is_caught(interpreter: Interpreter, name: str, failures_of: Callable[..., int]) -> None:
    seeds = range(8 if "Barrier" in name or "Wait" in name else 1)
    assert failures_of(interpreter, name, 0, seeds) == 0, "fails without any fault"
    caught = failures_of(interpreter, name, NUMBER[name], seeds)
    # A random schedule shows a missing barrier in most runs, not in all.
    assert caught > len(seeds) / 2, f"caught in {caught} of {len(seeds)} runs"


def test_every_fault_has_a_test() -> None:
    assert {*CASES, *MAMBA_CASES} == set(FAULTS)
