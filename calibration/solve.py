# SPDX-License-Identifier: Apache-2.0
"""Step 3 of the method in ``search.py``: the member of a family that uses a budget up, by measurement."""

from __future__ import annotations

from collections.abc import Sequence

from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.calibration.families import Family
from adaptive_k_moe.calibration.laboratory import Budget, Laboratory, Measured
from adaptive_k_moe.policy import rules_of
from adaptive_k_moe.policy_kinds import KINDS

SAME_AVG_K = 3e-4
"""Average k closer than this, as a share of the trained top-k, count as the same; so far above a target one may lie."""

CLOSE = 2e-3
"""A budget with this little left is used up: of the trained top-k, or of the full model's perplexity."""


def excess(laboratory: Laboratory, found: Measured, budget: Budget) -> float:
    """Above 0: more may be saved (average k, reads or time, as a share of full's), or more may be lost.

    What may be lost is perplexity as a share of full's, or KL divergence as a tenth of the budget.
    """
    scores = found.scores
    if budget.avg_k is not None:
        return (scores.avg_k - budget.avg_k) / laboratory.evaluator.full_k
    if budget.reads is not None:
        return scores.avg_reads / laboratory.full().scores.avg_reads - budget.reads
    if budget.time is not None:
        return time_share(laboratory, found) - budget.time
    if budget.kl is not None:
        return (1 - scores.mean_kl / budget.kl) / 10
    assert budget.perplexity_increase is not None
    return budget.perplexity_increase - (scores.perplexity / laboratory.full().scores.perplexity - 1)


def time_share(laboratory: Laboratory, found: Measured) -> float:
    """Expected time of a decode step as a share of full's, in a laboratory that knows it."""
    assert laboratory.step_time is not None
    sharing = any(KINDS[rule.kind].sees_step for rule in rules_of(found.candidate.policy, {}))
    return laboratory.step_time.share(found.scores.avg_reads, found.scores.avg_k, sharing=sharing)


def keeps(laboratory: Laboratory, found: Measured, budget: Budget) -> bool:
    """Whether a policy keeps a budget."""
    value = excess(laboratory, found, budget)
    return value >= 0 if budget.bounds_damage else value <= SAME_AVG_K


def solve(laboratory: Laboratory, family: Family, budget: Budget, *, passes: int = 12) -> Measured:
    """The member of a family that uses the budget up.

    By regula falsi on the measured figure until the budget is used up. A family need not be exactly monotone, so the
    best member seen that keeps the budget is taken, not the last one.

    Args:
        laboratory: measures.
        family: policies from 0 (nothing saved) to 1.
        budget: the target.
        passes: most candidates to measure.

    Raises:
        CalibrationError: even the family's last member uses more than the budget.
    """
    full, last = laboratory.full(), laboratory.measure(family(1.0))
    if budget.avg_k is not None and not keeps(laboratory, last, budget):
        raise CalibrationError(
            f"an average k of {budget.avg_k:g} cannot be reached: the lowest of this kind is {last.scores.avg_k:.3f}."
        )
    low, high = 0.0, 1.0
    at_low, at_high = (excess(laboratory, end, budget) for end in (full, last))
    kept = [(value, end) for value, end in ((at_low, full), (at_high, last)) if keeps(laboratory, end, budget)]
    # The full model may be within the budget already, or all that can be saved; then there is nothing to find.
    turns = range(passes if at_low > 0 > at_high else 0)
    moved_low: bool | None = None
    for _ in turns:
        share = at_low / (at_low - at_high)
        x = low + (high - low) * min(max(share, 0.02), 0.98)
        found = laboratory.measure(family(x))
        value = excess(laboratory, found, budget)
        if keeps(laboratory, found, budget):
            kept.append((value, found))
            if abs(value) <= CLOSE:
                break
        # An end that stays twice counts half (the Illinois rule), or a bend between the ends would keep it for long.
        if value > 0:
            low, at_low, at_high = x, value, at_high / (2 if moved_low is True else 1)
        else:
            high, at_high, at_low = x, value, at_low / (2 if moved_low is False else 1)
        moved_low = value > 0
    if budget.avg_k is not None:
        return min(kept, key=lambda item: abs(item[0]))[1]
    return min(kept, key=lambda item: item[1].scores.avg_k)[1]


def best_of(found: Sequence[Measured], budget: Budget) -> Measured:
    """Least damage at given experts or time; fewest experts (reads, or run) at given damage. The first among equals."""
    if not budget.bounds_damage:
        return min(found, key=lambda item: item.scores.mean_kl)
    return min(found, key=lambda item: item.scores.avg_k if item.scores.reads is None else item.scores.avg_reads)
