# SPDX-License-Identifier: Apache-2.0
"""How many experts ran, against the trained top-k, and how many were read for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class ExpertRuns:
    """The experts that some tokens ran. A token makes one choice of k in each MoE layer that it passes.

    Attributes:
        full_k: the trained top-k.
        runs: experts run, over all choices.
        choices: tokens times MoE layers.
    """

    full_k: int
    runs: int = 0
    choices: int = 0

    @classmethod
    def of(cls, full_k: int, k: npt.NDArray[np.integer[Any]]) -> ExpertRuns:
        """The runs of an array that has an entry for each choice."""
        return cls(full_k, int(k.sum()), k.size)

    def __add__(self, other: ExpertRuns) -> ExpertRuns:
        return ExpertRuns(self.full_k, self.runs + other.runs, self.choices + other.choices)

    @property
    def avg_k(self) -> float:
        """Mean number of experts run for a token in a layer; NaN before any."""
        return self.runs / self.choices if self.choices else float("nan")

    @property
    def compute_saved_ratio(self) -> float:
        """Share of expert runs left out against the trained top-k; a count, not a time; NaN before any."""
        return 1.0 - self.avg_k / self.full_k


@dataclass(slots=True)
class ExpertReads:
    """The experts that steps read of the weights, and the part of it that falls on some of their tokens.

    A step reads an expert of a layer once, however many of its tokens run it. The part of a token is what its step read
    over the step's tokens, whoever wanted it: with no other token in the step it is the token's own k, and never more.

    Attributes:
        steps: steps counted.
        experts: experts read in them, summed over the steps; a step's are the mean over the MoE layers.
        tokens: the tokens in question.
        shares: sum of their parts.
    """

    steps: int = 0
    experts: float = 0.0
    tokens: int = 0
    shares: float = 0.0

    def add(self, experts: float, tokens: int, step_tokens: int) -> None:
        """Count a step that read `experts` a layer for `step_tokens` tokens, `tokens` of them in question."""
        self.steps += 1
        self.experts += experts
        self.tokens += tokens
        self.shares += experts * tokens / step_tokens

    @property
    def avg_reads(self) -> float:
        """Mean experts that a step read in a MoE layer; NaN before any."""
        return self.experts / self.steps if self.steps else float("nan")

    @property
    def reads_per_token(self) -> float:
        """Mean part of a token: experts read a MoE layer; NaN before any."""
        return self.shares / self.tokens if self.tokens else float("nan")
