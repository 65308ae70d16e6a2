# SPDX-License-Identifier: Apache-2.0
"""The kinds of policy, in one table. Imports nothing heavy, so that commands can name them.

A kind is an entry here, its class in `policy` (what a policy file says), its rule in the operator, and, where its rule
is one number, the value at which calibration sees it drop an expert (`DROPPED_AT` in ``calibration/families.py``).
"""

from __future__ import annotations

from typing import NamedTuple


class PolicyKind(NamedTuple):
    """What is to know of a kind.

    Attributes:
        number: the operator's `policy_kind` of its rows.
        label: its name in reports.
        colours: in figures, with one rule for all layers and with rules by layer.
        parameter: name of its one number; None where its rule is a list of k.
        meaning: of that number.
        keeps_all: value of that number at which no expert is dropped: 1 of a share to reach, 0 of a ratio to have.
        uses_norms: it weighs experts by the norms of their outputs.
        sees_step: what a token runs depends on the other tokens of the step.
    """

    number: int
    label: str
    colours: tuple[str, str]
    parameter: str | None = None
    meaning: str = ""
    keeps_all: float = 1.0
    uses_norms: bool = False
    sees_step: bool = False


KINDS = {
    "fixed": PolicyKind(0, "fixed k", ("#000000", "#7f7f7f")),
    "entropy": PolicyKind(0, "entropy", ("#9ecae1", "#1f77b4")),
    "top_p": PolicyKind(1, "top-p", ("#2ca02c", "#98df8a"), "p", "probability mass"),
    "ratio": PolicyKind(2, "ratio", ("#d62728", "#ff9896"), "ratio", "share of the best expert's score", keeps_all=0.0),
    "contribution": PolicyKind(
        3, "contribution", ("#9467bd", "#c5b0d5"), "p", "share of the best experts' contribution", uses_norms=True
    ),
    "shared": PolicyKind(4, "shared", ("#17becf", "#9edae5"), sees_step=True),
}
"""The kinds by name; a fixed k is an entropy row with one choice."""

ONE_NUMBER = tuple(name for name, kind in KINDS.items() if kind.parameter is not None)
"""Kinds whose rule is one number, and a smallest and a largest k."""

PARAMETERS = tuple(dict.fromkeys(kind.parameter for kind in KINDS.values() if kind.parameter is not None))
"""Names of their numbers."""
