# SPDX-License-Identifier: Apache-2.0
"""Histograms that take observations one at a time, or thousands at once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class HistogramValue:
    """A histogram at one moment. B buckets, the last without a limit.

    Attributes:
        limits: upper limits of all buckets but the last; a value at a limit is in its bucket.
        counts: [B] observations in each bucket, not summed up.
        sum: of the observations.
    """

    limits: tuple[float, ...]
    counts: Counts
    sum: float

    @property
    def count(self) -> int:
        """Observations."""
        return int(self.counts.sum())

    def cumulative(self) -> list[tuple[float, int]]:
        """Each limit, and the observations up to it; the last limit is infinite."""
        totals = np.cumsum(self.counts).tolist()
        return list(zip((*self.limits, float("inf")), totals, strict=True))


class Histograms:
    """R histograms of the same limits, numbered from 0; R can grow. Not thread-safe.

    Args:
        limits: upper limits of all buckets but the last, rising.
        rows: how many histograms there are at first.
    """

    def __init__(self, limits: Sequence[float], rows: int = 1) -> None:
        self.limits = tuple(limits)
        self._edges = np.array(limits, np.float64)
        self._counts: Counts = np.zeros((rows, len(limits) + 1), np.int64)
        self._sums: Floats = np.zeros(rows)

    def __len__(self) -> int:
        return len(self._sums)

    def grow(self, rows: int) -> None:
        """Have so many histograms at least."""
        missing = rows - len(self)
        if missing > 0:
            self._counts = np.pad(self._counts, ((0, missing), (0, 0)))
            self._sums = np.pad(self._sums, (0, missing))

    def observe(self, value: float, row: int = 0) -> None:
        """Take one observation."""
        self._counts[row, bisect_left(self.limits, value)] += 1
        self._sums[row] += value

    def observe_many(self, values: Floats | npt.NDArray[np.float32], rows: Counts) -> None:
        """Take observations [n], each for the histogram in its place of `rows` [n].

        NaN counts as beyond the last limit and adds nothing to the sum.
        """
        buckets = np.searchsorted(self._edges, values)
        width = self._counts.shape[1]
        cells = np.bincount(rows * width + buckets, minlength=self._counts.size)
        self._counts += cells.reshape(self._counts.shape)
        self._sums += np.bincount(rows, np.where(np.isnan(values), 0.0, values), minlength=len(self))

    def value(self, row: int = 0) -> HistogramValue:
        """One histogram at this moment."""
        return HistogramValue(self.limits, self._counts[row].copy(), float(self._sums[row]))
