# SPDX-License-Identifier: Apache-2.0
"""Random inputs of the operator for the tests."""

from __future__ import annotations

from typing import Any

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
