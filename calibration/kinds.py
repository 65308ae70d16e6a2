# SPDX-License-Identifier: Apache-2.0
"""The kinds of policy that calibration finds. Imports nothing heavy, so that commands can name them."""

from __future__ import annotations

from adaptive_k_moe.policy_kinds import KINDS, ONE_NUMBER

Kind = str
"""A kind with one rule for all layers, one with a rule for each (`PER_LAYER`), or `random`, the control."""

PER_LAYER: dict[Kind, Kind] = {
    name: f"{name}_per_layer"
    for name in ("static", *(name for name, kind in KINDS.items() if name != "fixed" and not kind.sees_step))
}
"""The kinds with one rule for all layers, and those with one for each; `static` is a fixed k. Texts are read window by
window, so kinds that see the whole step are not among them."""

STATIC_KINDS: tuple[Kind, ...] = ("static", PER_LAYER["static"])
ADAPTIVE_KINDS: tuple[Kind, ...] = tuple(
    kind for pair in PER_LAYER.items() for kind in pair if kind not in STATIC_KINDS
)
CURVE_KINDS: tuple[Kind, ...] = (*STATIC_KINDS, "random", *ADAPTIVE_KINDS)

ROUTER_KINDS = {name for name in ONE_NUMBER if KINDS[name].uses_norms} | {PER_LAYER[name] for name in ONE_NUMBER}
"""Kinds that are found with the routers' recording."""

CONTAINS: dict[Kind, tuple[Kind, ...]] = {
    **{one: ("static",) for one in PER_LAYER if one != "static"},
    **{by_layer: (one, PER_LAYER["static"]) for one, by_layer in PER_LAYER.items()},
    PER_LAYER["static"]: ("static",),
}
"""The kinds that a kind can say as well: what is found of it may never be worse than what is found of them."""
