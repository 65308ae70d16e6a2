# SPDX-License-Identifier: Apache-2.0
"""Step 3 of the method in ``search.py``: the member of a family that uses a budget up, by measurement."""

from __future__ import annotations

from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.calibration.evaluator import Scores
from adaptive_k_moe.calibration.families import Family
from adaptive_k_moe.calibration.laboratory import Budget, Laboratory, Measured


def solve(
    laboratory: Laboratory, family: Family, budget: Budget, *, tolerance: float = 1e-3, passes: int = 12
) -> Measured:
    """The member of a family that uses the budget up.

    By regula falsi on the measured figure, with bisection whenever that is slow to close in. A family need
    not be exactly monotone, so the best member seen that keeps the budget is taken, not the last one.

    Args:
        laboratory: measures.
        family: policies from 0 (nothing saved) to 1.
        budget: the target.
        tolerance: how far the average k may lie above its target, as a share of the trained top-k; twice that
            below ends the search. For perplexity: of the full model's perplexity.
        passes: most candidates to measure.

    Raises:
        CalibrationError: even the family's last member uses more than the budget.
    """
    full_k = laboratory.evaluator.full_k
    full_perplexity = laboratory.full().scores.perplexity

    def excess(scores: Scores) -> float:
        """Above 0: more may be saved (average k), or more may be lost (perplexity)."""
        if budget.avg_k is not None:
            return (scores.avg_k - budget.avg_k) / full_k
        assert budget.perplexity_increase is not None
        return budget.perplexity_increase - (scores.perplexity / full_perplexity - 1)

    def keeps(value: float) -> bool:
        return value <= tolerance if budget.avg_k is not None else value >= 0

    low, high = 0.0, 1.0
    at_low, last = excess(laboratory.full().scores), laboratory.measure(family(1.0))
    at_high = excess(last.scores)
    if budget.avg_k is not None and not keeps(at_high):
        raise CalibrationError(
            f"an average k of {budget.avg_k:g} cannot be reached: the lowest of this kind is {last.scores.avg_k:.3f}."
        )
    kept = [(value, found) for value, found in ((at_low, laboratory.full()), (at_high, last)) if keeps(value)]
    # The full model may be within the budget already, or all that can be saved; then there is nothing to find.
    turns = range(passes if at_low > 0 > at_high else 0)
    for turn in turns:
        share = at_low / (at_low - at_high) if turn % 3 < 2 else 0.5
        x = low + (high - low) * min(max(share, 0.02), 0.98)
        found = laboratory.measure(family(x))
        value = excess(found.scores)
        if keeps(value):
            kept.append((value, found))
            if abs(value) <= 2 * tolerance:
                break
        if value > 0:
            low, at_low = x, value
        else:
            high, at_high = x, value
    if budget.avg_k is not None:
        return min(kept, key=lambda item: abs(item[0]))[1]
    return min(kept, key=lambda item: item[1].scores.avg_k)[1]
