# SPDX-License-Identifier: Apache-2.0
"""Inputs that do not fit are refused in one sentence that names them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import fixed, tokens, weights

from adaptive_k_moe.plugin import moe, route


def arguments() -> dict[str, Any]:
    x, logits = tokens(3, 16, 4)
    up, down = weights(4, 16, 8, "swiglu")
    index, kind, thresholds, ks = fixed(3, 2)
    return dict(
        hidden_states=x,
        router_logits=logits,
        policy_index=index,
        policy_kind=kind,
        thresholds=thresholds,
        k_values=ks,
        gate_up=up,
        down=down,
    )


def integers(hidden: int, intermediate: int, groups: int = 1, weight_bits: int = 8) -> dict[str, Any]:
    """Weights of integers, with so many scales in a row."""
    packed = 8 // weight_bits if weight_bits in (4, 8) else 1
    return dict(
        hidden_states=np.zeros((3, hidden), np.float32),
        gate_up=np.zeros((4, 2 * intermediate, hidden // packed), np.int8),
        down=np.zeros((4, hidden, intermediate // packed), np.int8),
        gate_up_scales=np.ones((4, 2 * intermediate, groups), np.float32),
        down_scales=np.ones((4, hidden, groups), np.float32),
        weight_bits=weight_bits,
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_states": np.zeros((3, 16))}, "input hidden_states is float64 but must be float32"),
        ({"hidden_states": np.zeros(3, np.float32)}, r"input hidden_states has shape \[3\] but must be \[T, H\]"),
        (
            {"router_logits": np.zeros((2, 4), np.float32)},
            r"input router_logits has shape \[2, 4\] but must be \[T, E\], where T = 3 by input hidden_states",
        ),
        ({"policy_index": np.zeros(3, np.int64)}, "input policy_index is int64 but must be int32"),
        ({"policy_index": np.zeros(4, np.int32)}, r"input policy_index has shape \[4\] but must be \[T\]"),
        (
            {"policy_kind": np.zeros(2, np.int32)},
            r"input k_values has shape \[1, 1\] but must be \[P, C\], where P = 2",
        ),
        (
            {"thresholds": np.zeros((1, 1), np.float32)},
            r"input thresholds has shape \[1, 1\] but must be \[P, C-1\], where C = 1 by input k_values",
        ),
        ({"k_values": np.zeros((1, 0), np.int32)}, "must be"),
        (
            {"gate_up": np.zeros((4, 15, 16), np.float32)},
            r"input gate_up has shape \[4, 15, 16\] but must be \[E, 2I, H\], so dimension 1 must be even",
        ),
        ({"gate_up": np.zeros((4, 16, 17), np.float32)}, "input gate_up has shape"),
        ({"gate_up": np.zeros((4, 16, 16))}, "input gate_up is float64 but must be float32, bfloat16"),
        ({"gate_up": np.zeros((4, 16, 32), np.float32)[..., ::2]}, "input gate_up must be a C-contiguous NumPy array"),
        ({"down": np.zeros((4, 16, 8), np.uint16)}, "input down is bfloat16 but gate_up is float32"),
        (
            {"down": np.zeros((5, 16, 8), np.float32)},
            r"input down has shape \[5, 16, 8\] but must be \[E, H, I\], where E = 4 by input router_logits",
        ),
        (
            {"gate_up": np.zeros((4, 16, 16), np.int8), "down": np.zeros((4, 16, 8), np.int8)},
            "input gate_up is int8 but must be float32, bfloat16 .* or, with scales, int8",
        ),
        ({"gate_up_scales": np.ones((4, 16, 1), np.float32)}, "gate_up_scales and down_scales must be given both"),
        (integers(16, 16, weight_bits=3), "weight_bits is 3 but must be 4 or 8"),
        ({**integers(16, 16), "weight_bits": "8"}, "weight_bits is '8' but must be 4 or 8"),
        ({**integers(16, 16), "gate_up": np.zeros((4, 32, 16), np.float32)}, "gate_up is float32 but must be int8"),
        (integers(16, 8), "intermediate size must be multiples of 16 for int8 weights, but one is 8"),
        (integers(32, 16, weight_bits=4), "intermediate size must be multiples of 32 for int4 weights, but one is 16"),
        (
            integers(64, 64, groups=4),
            "the scales make groups of 16 values but must make groups of a multiple of 32, or of whole rows",
        ),
        (
            integers(64, 32, groups=2),
            "inputs gate_up_scales and down_scales make groups of 32 and 16 values but must make groups of one size",
        ),
        (
            {**integers(16, 16), "down_scales": np.ones((4, 16, 3), np.float32)},
            r"input down_scales has shape \[4, 16, 3\] but must be .* beside down .*, where groups divides K",
        ),
        (
            {**integers(16, 16), "gate_up_scales": np.ones((4, 16, 1), np.float32)},
            r"input gate_up_scales has shape \[4, 16, 1\] but must be \[E, N, groups\] beside gate_up",
        ),
        ({"correction_bias": np.zeros(3, np.float32)}, r"input correction_bias has shape \[3\] but must be \[E\]"),
        ({"expert_norms": np.zeros(3, np.float32)}, r"input expert_norms has shape \[3\] but must be \[E\]"),
        ({"expert_norms": np.zeros(8)}, "input expert_norms is float64 but must be float32"),
        ({"activation": "tanh"}, "attribute activation is 'tanh' but must be one of swiglu, geglu"),
        ({"scoring": "topk"}, "attribute scoring is 'topk' but must be one of softmax, sigmoid"),
        ({"n_group": 3}, "attribute n_group must divide the number of experts"),
        ({"n_group": 2, "topk_group": 3}, "attribute topk_group must be between 1 and n_group"),
        ({"max_k": -1}, "attribute max_k must be 0"),
        ({"num_threads": 0}, "num_threads is 0 but must be at least 1"),
    ],
)
def test_moe_names_what_does_not_fit(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        moe(**{**arguments(), **changes})


def test_route_names_what_does_not_fit() -> None:
    logits = np.zeros((3, 4), np.float32)
    index, kind, thresholds, ks = fixed(3, 2)
    with pytest.raises(
        ValueError, match=r"AdaptiveKMoe: input policy_index has shape \[2\] but must be \[T\], where T = 3"
    ):
        route(logits, index[:2], kind, thresholds, ks)
    with pytest.raises(ValueError, match="input policy_kind has no rows"):
        route(logits, index, kind[:0], thresholds[:0], ks[:0])
