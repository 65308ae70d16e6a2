# SPDX-License-Identifier: Apache-2.0
"""What the launcher promises apart from numbers: refusals in sentences, workspace sizes, empty calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cuda_cases import make_inputs
from cuda_launcher import POINTERS, Interpreter, Layer

OPTIONAL = ("correction_bias", "expert_norms", "up_scales", "down_scales", "expert_load")
GOOD = Layer(4, 64, 64, 8, max_k=4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"experts": 0}, "at least one expert"),
        ({"experts": 513}, "at most 512 experts"),
        ({"max_k": -1}, "max_k must be 0"),
        ({"experts": 64, "max_k": 33}, "at most 32"),
        ({"n_group": 3}, "n_group must divide"),
        ({"topk_group": 2}, "topk_group must be between"),
        ({"policies": 0}, "policy_kind needs"),
        ({"choices": 0}, "k_values needs"),
        ({"hidden": 0}, "must be positive"),
        ({"hidden": 60}, "multiples of 8"),
        ({"intermediate": 4}, "multiples of 8"),
        ({"weights": "int8", "hidden": 72}, "multiples of 16"),
        ({"weights": "int4", "hidden": 80}, "multiples of 32"),
        ({"weights": "int8", "group_size": 16}, "multiple of 32"),
        ({"weights": "int4", "group_size": 16}, "multiple of 32"),
        ({"weights": "int8", "group_size": 96}, "must divide"),
        ({"element": "float32", "weights": "int8", "path": "prefill"}, "float16 and bfloat16 only"),
        ({"first_expert": -2}, "first_expert must be -1"),
        ({"first_expert": 8, "local_experts": 1}, "less than the number of experts"),
        ({"first_expert": 0}, "must be a range of the experts"),
        ({"first_expert": 5, "local_experts": 4}, "must be a range of the experts"),
        ({"weights": "int8", "hidden": 1 << 20}, "at most 524288"),
        ({"tokens": -1}, "must not be negative"),
        ({"tokens": 1 << 30}, "below 2^31"),
        ({"tokens": 1 << 25, "hidden": 1024, "path": "decode"}, "too large for the decode path"),
        ({"tokens": 1 << 24, "intermediate": 512, "path": "decode"}, "too large for the decode path"),
    ],
)
def test_wrong_shapes_are_refused_in_a_sentence(interpreter: Interpreter, change: dict[str, Any], words: str) -> None:
    wrong = replace(GOOD, **change)
    assert words in (interpreter.check(wrong) or "accepted")
    assert interpreter.launch(wrong, dict.fromkeys(POINTERS, 1 << 20), 1 << 20) == 1  # cudaErrorInvalidValue


def test_good_shapes_are_accepted(interpreter: Interpreter) -> None:
    assert interpreter.check(GOOD) is None
    assert interpreter.check(replace(GOOD, tokens=0)) is None
    assert interpreter.check(replace(GOOD, first_expert=5, local_experts=3)) is None
    assert interpreter.check(replace(GOOD, experts=512, max_k=32)) is None
    assert interpreter.check(replace(GOOD, tokens=1 << 25, hidden=1024)) is None  # prefill counts in 64 bits


@pytest.mark.parametrize("missing", [name for name in POINTERS if name not in OPTIONAL])
def test_a_missing_pointer_is_refused(interpreter: Interpreter, missing: str) -> None:
    pointers = dict.fromkeys(POINTERS, 1 << 20)
    pointers[missing] = None
    layer = replace(GOOD, choices=2)
    assert interpreter.launch(layer, pointers, 1 << 20) == 1


def test_quantised_weights_need_scales(interpreter: Interpreter) -> None:
    for missing in ("up_scales", "down_scales"):
        pointers = dict.fromkeys(POINTERS, 1 << 20)
        pointers[missing] = None
        assert interpreter.launch(replace(GOOD, weights="int8"), pointers, 1 << 20) == 1


def test_no_tokens_is_no_work(interpreter: Interpreter) -> None:
    layer = replace(GOOD, tokens=0)
    inputs, _ = make_inputs(layer, 0)
    assert interpreter.run(layer, inputs).output.shape == (0, 64)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"experts": 128},
        {"weights": "int8"},
        {"weights": "int4", "experts": 128},
        {"element": "float32"},
        {"path": "decode"},
        {"path": "prefill"},
        {"activation": "relu2"},
    ],
)
def test_the_workspace_never_shrinks_with_more_tokens(interpreter: Interpreter, change: dict[str, Any]) -> None:
    sizes = [interpreter.workspace_size(replace(GOOD, tokens=tokens, **change)) for tokens in range(400)]
    assert all(np.diff(sizes) >= 0)
    assert sizes[0] > 0
