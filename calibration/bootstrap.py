# SPDX-License-Identifier: Apache-2.0
"""Bootstrap intervals over windows: the window is the unit, since tokens of one window depend on each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate and its 95 % percentile interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """By name."""
        return dict(self._asdict())


def interval(
    statistic: Callable[..., Float64Array], *columns: Float64Array, draws: int = 2000, seed: int = 0
) -> Interval:
    """Bootstrap a statistic of the means of some columns.

    Windows are resampled with all their columns together, so a difference between policies is paired.

    Args:
        statistic: from the columns' means (arrays, one entry a resample) to the statistic.
        columns: [W] a quantity of each window.
        draws: resamples.
        seed: of the resampling; equal seeds resample the same windows.
    """
    table = np.stack(columns)
    count = table.shape[1]
    picks = np.random.default_rng(seed).integers(count, size=(draws, count))
    resampled = statistic(*table[:, picks].mean(axis=-1))
    value = float(np.asarray(statistic(*table.mean(axis=-1)[:, None])).ravel()[0])
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def mean(column: Float64Array) -> Interval:
    """Interval of a mean."""
    return interval(lambda average: average, column)


def difference(left: Float64Array, right: Float64Array) -> Interval:
    """Interval of mean(left) - mean(right), paired by window."""
    return mean(left - right)


def perplexity_change(nll: Float64Array, full_nll: Float64Array) -> Interval:
    """Interval of perplexity / full perplexity - 1, paired by window."""
    return interval(lambda gap: np.expm1(gap), nll - full_nll)
