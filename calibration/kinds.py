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

OneNumber = Literal["top_p", "ratio", "contribution"]
"""Kinds whose rule is one number, and a smallest and a largest k."""

ONE_NUMBER: tuple[OneNumber, ...] = get_args(OneNumber)

PER_LAYER: dict[Kind, Kind] = {
    "entropy": "entropy_per_layer",
    "top_p": "top_p_per_layer",
    "ratio": "ratio_per_layer",
    "contribution": "contribution_per_layer",
}
"""The kinds with one rule for all layers, and those with one for each."""

CONTAINS: dict[Kind, tuple[Kind, ...]] = {
    "static_per_layer": ("static",),
    **dict.fromkeys(PER_LAYER, ("static",)),
    **{by_layer: (one, "static_per_layer") for one, by_layer in PER_LAYER.items()},
}
"""The kinds that a kind can say as well: what is found of it may never be worse than what is found of them."""
