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

DEVICE_H = Path(__file__).resolve().parents[2] / "plugin" / "cuda" / "device.h"
FAULTS = re.findall(r"^  (kFault\w+),", DEVICE_H.read_text(), re.MULTILINE)
NUMBER = {name: number for number, name in enumerate(FAULTS, start=1)}

SMALL = dict(tokens=6, hidden=16, intermediate=16, experts=4, element="float32", max_k=3)
MANY = {**SMALL, "tokens": 40, "experts": 3}
QUANTISED = {**SMALL, "hidden": 64, "intermediate": 64, "weights": "int8", "group_size": 32}
MIXED = {**QUANTISED, "element": "float16", "hidden": 320, "path": "prefill"}

# Each fault: the layer that meets it, the kind of logits, and the check that must fail.
CASES: dict[str, tuple[dict[str, Any], str, Callable[..., None]]] = {
    "kFaultRouteEntropy": (SMALL, "plain", check_routing),
    "kFaultRouteTie": (SMALL, "ties", check_routing),
    "kFaultRouteWeight": (SMALL, "plain", check_routing),
    "kFaultRouteBarrier": ({**SMALL, "experts": 200}, "plain", check_routing),
    "kFaultRouteNorm": (MANY, "plain", check_routing),
    "kFaultRouteContributionBarrier": (MANY, "plain", check_routing),
    "kFaultPlanRank": (MANY, "plain", check_plan),
    "kFaultPlanBase": ({**MANY, "tokens": 300, "hidden": 8, "intermediate": 8, "path": "prefill"}, "plain", check_plan),
    "kFaultPlanStartBarrier": (SMALL, "plain", check_plan),
    "kFaultPlanBarrier": (MANY, "plain", check_plan),
    "kFaultDecodeRow": ({**MANY, "path": "decode"}, "plain", check_output),
    "kFaultDecodeTail": ({**SMALL, "path": "decode"}, "plain", check_output),
    "kFaultDecodeScale": ({**QUANTISED, "path": "decode"}, "plain", check_output),
    "kFaultDecodeBarrier": ({**SMALL, "path": "decode"}, "plain", check_output),
    "kFaultDecodeReuseBarrier": ({**MANY, "path": "decode"}, "plain", check_output),
    "kFaultMixedScale": (MIXED, "plain", check_output),
    "kFaultMixedWait": (MIXED, "plain", check_output),
    "kFaultMixedBarrier": (MIXED, "plain", check_output),
    "kFaultUpActivation": ({**SMALL, "path": "decode"}, "plain", check_output),
    "kFaultGatherRow": ({**MANY, "path": "prefill"}, "plain", check_output),
    "kFaultActivation": ({**SMALL, "path": "prefill"}, "plain", check_output),
    "kFaultGroupedOffset": ({**SMALL, "path": "prefill"}, "plain", check_output),
    "kFaultCombineOrder": (SMALL, "plain", check_output),
}


def failures(interpreter: Interpreter, name: str, fault: int, seeds: range) -> int:
    """In how many runs the check fails, or the interpreter itself objects."""
    shape, logits, check = CASES[name]
    layer = Layer(**shape)
    inputs, exact = make_inputs(layer, 0, logits=logits)
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


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_step_is_caught(interpreter: Interpreter, name: str) -> None:
    seeds = range(8 if "Barrier" in name or "Wait" in name else 1)
    assert failures(interpreter, name, 0, seeds) == 0, "fails without any fault"
    caught = failures(interpreter, name, NUMBER[name], seeds)
    # A random schedule shows a missing barrier in most runs, not in all.
    assert caught > len(seeds) / 2, f"caught in {caught} of {len(seeds)} runs"


def test_every_fault_has_a_test() -> None:
    assert set(CASES) == set(FAULTS)
