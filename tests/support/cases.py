# SPDX-License-Identifier: Apache-2.0
"""Random inputs of the operator for the tests."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from oracle import GATED

Array = npt.NDArray[Any]

# Rows of all kinds: fixed k, entropy, top-p, ratio and contribution.
POLICY_KIND = np.array([0, 0, 1, 2, 3], np.int32)
THRESHOLDS = np.array([[np.inf, np.inf], [0.6, 1.2], [0.7, 0.0], [0.3, 0.0], [0.8, 0.0]], np.float32)
K_VALUES = np.array([[2, 2, 2], [1, 2, 4], [1, 2, 4], [1, 2, 3], [1, 2, 4]], np.int32)


def policies(tokens: int, seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """policy_index with all rows in it, policy_kind, thresholds and k_values."""
    index = np.random.default_rng(seed).integers(0, len(POLICY_KIND), tokens).astype(np.int32)
    return index, POLICY_KIND, THRESHOLDS, K_VALUES


def fixed(tokens: int, k: int) -> tuple[Array, Array, Array, Array]:
    """The policy inputs for the same k at every token."""
    return np.zeros(tokens, np.int32), np.zeros(1, np.int32), np.zeros((1, 0), np.float32), np.array([[k]], np.int32)


def weights(
    experts: int, hidden: int, intermediate: int, activation: str, dtype: str = "float32"
) -> tuple[Array, Array]:
    """gate_up (or up) and down, scaled so that activations stay near 1."""
    rng = np.random.default_rng(7)
    rows = 2 * intermediate if activation in GATED else intermediate
    up = rng.standard_normal((experts, rows, hidden)) / np.sqrt(hidden)
    down = rng.standard_normal((experts, hidden, intermediate)) / np.sqrt(intermediate)
    kind = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    return up.astype(kind), down.astype(kind)


class Quantised(NamedTuple):
    """Weights as int8 or int4: up and down, the operator's other arguments, and the float32 that they stand for."""

    up: Array
    down: Array
    arguments: dict[str, Any]
    dense: tuple[Array, Array]


def quantised(experts: int, hidden: int, intermediate: int, activation: str, bits: int, group: int | None) -> Quantised:
    """The same weights in `bits` bits, with a scale for each `group` values along a row, or for each row."""
    packed = [
        quantise(weight, bits, weight.shape[-1] // (group or weight.shape[-1]), np.float32)
        for weight in weights(experts, hidden, intermediate, activation)
    ]
    (up, up_scales, dense_up), (down, down_scales, dense_down) = packed
    arguments = {"gate_up_scales": up_scales, "down_scales": down_scales, "weight_bits": bits}
    return Quantised(up, down, arguments, (dense_up, dense_down))


def quantise(weights: Array, bits: int, groups: int, dtype: Any) -> tuple[Array, Array, Array]:
    """Packed values, scales [E, N, groups], and what they stand for."""
    e, n, k = weights.shape
    grouped = weights.reshape(e, n, groups, k // groups)
    limit = 2 ** (bits - 1) - 1
    scales = (np.abs(grouped).max(-1, keepdims=True) / limit).astype(dtype)
    values = np.clip(np.round(grouped / scales.astype(np.float32)), -limit - 1, limit).astype(np.int8)
    dense = (values * scales.astype(np.float32)).reshape(e, n, k)
    values = values.reshape(e, n, k)
    if bits == 4:
        values = ((values[..., 0::2] & 15) | (values[..., 1::2] << 4)).astype(np.int8)
    return values, scales.reshape(e, n, groups), dense


def norms(experts: int) -> Array:
    """expert_norms, some of them equal and one 0."""
    found = np.random.default_rng(3).choice(np.array([0.5, 1, 1.25], np.float32), experts)
    found[experts // 2] = 0
    return found


def tokens(count: int, hidden: int, experts: int, seed: int = 0) -> tuple[Array, Array]:
    """hidden_states and router_logits."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, hidden)).astype(np.float32)
    return x, (2 * rng.standard_normal((count, experts))).astype(np.float32)
