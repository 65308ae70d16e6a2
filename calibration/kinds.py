# SPDX-License-Identifier: Apache-2.0
"""The kinds of policy that calibration finds. Imports nothing, so that commands can name them."""

from __future__ import annotations

from typing import Literal, get_args

AdaptiveKind = Literal[
    "entropy",
    "entropy_per_layer",
    "top_p",
    "top_p_per_layer",
    "ratio",
    "ratio_per_layer",
    "contribution",
    "contribution_per_layer",
]
StaticKind = Literal["static", "static_per_layer"]
Kind = AdaptiveKind | StaticKind | Literal["random"]

ADAPTIVE_KINDS: tuple[Kind, ...] = get_args(AdaptiveKind)
STATIC_KINDS: tuple[Kind, ...] = get_args(StaticKind)
