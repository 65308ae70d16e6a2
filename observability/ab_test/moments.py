# SPDX-License-Identifier: Apache-2.0
"""What is kept of many observations of one quantity, so that results need no observation again."""

from __future__ import annotations

from typing import Any, NamedTuple


class Moments(NamedTuple):
    """Sums over a variant's observations of one quantity; numbers, or arrays of them.

    Attributes:
        count: how many observations there are.
        mean: their mean.
        squares: sum of squared deviations from the mean.
        cubes: sum of cubed deviations from the mean.
    """

    count: Any
    mean: Any
    squares: Any
    cubes: Any

    def add(self, value: float) -> Moments:
        """These moments with one more observation."""
        count = self.count + 1
        deviation = value - self.mean
        step = deviation / count
        growth = deviation * step * self.count
        return Moments(
            count,
            self.mean + step,
            self.squares + growth,
            self.cubes + growth * step * (count - 2) - 3 * step * self.squares,
        )


NO_MOMENTS = Moments(0, 0.0, 0.0, 0.0)
