# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding tables: cosines and sines for every position an engine can reach."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.errors import BuildError
from adaptive_k_moe.model_config import RopeConfig

FloatArray = npt.NDArray[np.float32]


def rope_tables(rope: RopeConfig, head_dim: int, max_seq_len: int, max_position_embeddings: int) -> Any:
    """Cosines and sines, each [max_seq_len, head_dim / 2] float32, scaled as the rope type says.

    The formulas are those of Hugging Face's ``modeling_rope_utils``: "linear" divides the frequencies,
    "llama3" divides the low ones and blends the middle (Llama 3.1), "yarn" blends interpolation and
    extrapolation and scales the result (Peng et al., 2023). "dynamic" equals "default" up to the
    trained length.

    Raises:
        BuildError: a "dynamic" rope would have to change with the sequence's length.
    """
    inv_freq, scale = _inverse_frequencies(rope, head_dim)
    if rope.rope_type == "dynamic" and max_seq_len > max_position_embeddings:
        raise BuildError(
            f"a 'dynamic' rope changes beyond {max_position_embeddings} tokens, which an engine with fixed tables "
            f"cannot follow: build with --max_seq_len {max_position_embeddings} or less."
        )
    # float32 throughout, as the reference has it: the product rounds before cos and sin.
    angles = np.arange(max_seq_len, dtype=np.float32)[:, None] * inv_freq[None, :].astype(np.float32)
    return (np.cos(angles) * np.float32(scale)).astype(np.float32), (np.sin(angles) * np.float32(scale)).astype(
        np.float32
    )


def _inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[FloatArray, float]:
    """[head_dim / 2] inverse frequencies and the factor on cosines and sines."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (np.float32(1.0) / np.float32(rope.rope_theta) ** exponents).astype(np.float32)
    match rope.rope_type:
        case "default" | "dynamic":
            return plain, 1.0
        case "linear":
            return (plain / np.float32(rope.factor)).astype(np.float32), 1.0
        case "llama3":
            return _llama3(rope, plain), 1.0
        case "yarn":
            return _yarn(rope, plain, head_dim)
    raise AssertionError(rope.rope_type)


def _llama3(rope: RopeConfig, plain: FloatArray) -> FloatArray:
    original, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    assert original is not None and low is not None and high is not None  # checked when the config was read
    wavelength = 2 * math.pi / plain
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * plain / rope.factor + smooth * plain
    scaled = np.where(wavelength > original / low, plain / rope.factor, blended)
    return np.where(wavelength < original / high, plain, scaled).astype(np.float32)


def _yarn(rope: RopeConfig, plain: FloatArray, head_dim: int) -> tuple[FloatArray, float]:
    original = rope.original_max_position_embeddings
    assert original is not None  # filled in when the config was read

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    scale = rope.attention_factor
    if scale is None:
        both = rope.mscale and rope.mscale_all_dim
        scale = mscale(rope.mscale or 1) / mscale(rope.mscale_all_dim or 1) if both else mscale(1)

    def dimension(rotations: float) -> float:
        """Dimension whose wave turns `rotations` times over the original context."""
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = dimension(rope.beta_fast or 32), dimension(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return (plain / rope.factor * ramp + plain * (1 - ramp)).astype(np.float32), scale
