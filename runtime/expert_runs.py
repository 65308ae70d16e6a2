# SPDX-License-Identifier: Apache-2.0
"""How many experts ran, against the trained top-k."""

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
