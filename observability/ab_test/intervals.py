# SPDX-License-Identifier: Apache-2.0
"""Confidence sequences: intervals that may be looked at after every request, and acted on at any look.

An ordinary 95 % interval is wrong in more than 5 % of experiments if one looks until it excludes zero. These
are wrong at any of all looks together with probability `alpha` at most:

- `mean_difference` for quantities without known limits (logarithms of times, losses, k): the asymptotic
  confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit theory and
  asymptotic confidence sequences" (Annals of Statistics, 2024), for the average treatment effect of a
  randomised experiment. As the central limit theorem's, its promise is for many observations, the more the more
  skewed they are: it says nothing before each variant has `BURN_IN`, and `SKEWNESS_FACTOR` times the squared
  skewness.
- `rate_difference` for what is 0 or 1 (errors): the beta mixture of Robbins, "Statistical methods related to the
  law of the iterated logarithm" (Annals of Mathematical Statistics, 1970), one sequence for each variant. It is
  exact from the first observation, so it also holds for errors of which none was seen yet.

Everything takes arrays as well as numbers: many experiments at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.errors import ExperimentError
from adaptive_k_moe.observability.ab_test.moments import Moments

BURN_IN = 50
"""Observations that each variant needs before `mean_difference` says anything."""

SKEWNESS_FACTOR = 10.0
"""Likewise, times the square of the skewness; found by simulation (see the tests), after Cochran's rule of 25."""

TIGHTEST_AT = 1000
"""Observations, of both variants, at which `mean_difference` is tightest relative to an interval of fixed size."""

# Jeffreys' prior of the mixture of `rate_difference`.
_PRIOR = 0.5

# Weight of the prior of `share_mismatch` in requests: shares off by a few percent are found soonest.
_PRIOR_REQUESTS = 100.0

_Array = npt.NDArray[np.float64]


class ConfidenceInterval(NamedTuple):
    """An estimate and its confidence interval; the ends are infinite while nothing can be said."""

    estimate: Any
    low: Any
    high: Any


def mean_difference(treatment: Moments, control: Moments, alpha: float) -> ConfidenceInterval:
    """Difference of two variants' means, treatment less control, without limits on the quantity."""
    counts = np.minimum(treatment.count, control.count)
    total = np.add(treatment.count, control.count).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        # The variance of the influence function of the difference of means.
        variance = total * sum(
            np.divide(m.squares, np.multiply(m.count, np.subtract(m.count, 1.0))) for m in (treatment, control)
        )
        margin = np.sqrt(variance) * _margin(total, alpha)
    skewness = np.maximum(np.abs(_skewness(treatment)), np.abs(_skewness(control)))
    needed = np.maximum(BURN_IN, SKEWNESS_FACTOR * skewness**2)
    margin = np.where(counts < needed, np.inf, margin)
    return _around(np.subtract(treatment.mean, control.mean), margin, counts)


def rate_difference(treatment: Moments, control: Moments, alpha: float) -> ConfidenceInterval:
    """Difference of two variants' rates, treatment less control, of observations that are 0 or 1."""
    counts = np.minimum(treatment.count, control.count)
    low, high = _rate_limits(treatment, alpha / 2)
    control_low, control_high = _rate_limits(control, alpha / 2)
    estimate = np.where(np.asarray(counts) > 0, np.subtract(treatment.mean, control.mean), np.nan)
    return ConfidenceInterval(estimate[()], (low - control_high)[()], (high - control_low)[()])


def share_mismatch(counts: Sequence[int], weights: Sequence[float]) -> float:
    """p-value, valid at every look, of the variants' shares of requests being what their weights say.

    The Bayes factor of a Dirichlet prior around the weights against the weights themselves is a martingale if
    they are true (Lindon and Malek, "Anytime-valid inference for multinomial count data", 2022).

    Args:
        counts: requests of each variant.
        weights: of the variants.
    """
    total_weight = sum(weights)
    shares = [weight / total_weight for weight in weights]
    log_factor = math.lgamma(_PRIOR_REQUESTS) - math.lgamma(_PRIOR_REQUESTS + sum(counts))
    for count, share in zip(counts, shares, strict=True):
        prior = _PRIOR_REQUESTS * share
        log_factor += math.lgamma(prior + count) - math.lgamma(prior) - count * math.log(share)
    return min(1.0, math.exp(-max(log_factor, 0.0)))


def required_observations(
    effect: float, standard_deviation: float, *, alpha: float = 0.05, power: float = 0.8, share: float = 0.5
) -> int:
    """Observations, of both variants, by which `mean_difference` excludes zero with at least this power.

    Args:
        effect: true difference of the means.
        standard_deviation: of the quantity in either variant.
        alpha: of the interval.
        power: probability to find the difference.
        share: of the observations that are the treatment's.

    Raises:
        ExperimentError: there is no such number.
    """
    if not (effect and standard_deviation > 0 and 0 < share < 1 and 0 < power < 1):
        raise ExperimentError(
            "a number of observations needs an effect other than 0, a standard deviation above 0, and a share and a "
            "power between 0 and 1."
        )

    def found(total: int) -> bool:
        of_difference = standard_deviation / math.sqrt(total * share * (1 - share))
        margin = standard_deviation / math.sqrt(share * (1 - share)) * float(_margin(np.float64(total), alpha))
        return abs(effect) >= margin + NormalDist().inv_cdf(power) * of_difference

    low = math.ceil(BURN_IN / min(share, 1 - share))
    if found(low):
        return low
    high = 2 * low
    while not found(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high


def _skewness(moments: Moments) -> Any:
    """Of the observations; 0 while they are all alike."""
    with np.errstate(divide="ignore", invalid="ignore"):
        skewness = np.sqrt(moments.count) * moments.cubes / np.power(moments.squares, 1.5)
    return np.nan_to_num(skewness, nan=0.0, posinf=0.0, neginf=0.0)


def _margin(count: _Array | np.float64, alpha: float) -> Any:
    """Half the interval's width for a mean of observations of standard deviation 1."""
    log_term = -2 * math.log(alpha)
    rho2 = (log_term + math.log(log_term + 1)) / TIGHTEST_AT
    grown = count * rho2 + 1
    return np.sqrt(2 * grown / (count**2 * rho2) * np.log(np.sqrt(grown) / alpha))


def _rate_limits(moments: Moments, alpha: float) -> tuple[_Array, _Array]:
    """The rates that the mixture does not rule out: those whose likelihood ratio against it is below 1 / alpha."""
    ones = np.rint(np.multiply(moments.count, moments.mean))
    limits = np.vectorize(_limits_of_one_rate, otypes=[np.float64, np.float64])
    low, high = limits(ones, np.subtract(moments.count, ones), alpha)
    return np.asarray(low), np.asarray(high)


def _limits_of_one_rate(ones: float, zeros: float, alpha: float) -> tuple[float, float]:
    count = ones + zeros
    log_mixture = math.lgamma(ones + _PRIOR) + math.lgamma(zeros + _PRIOR) - math.lgamma(count + 2 * _PRIOR)
    least = log_mixture - (2 * math.lgamma(_PRIOR) - math.lgamma(2 * _PRIOR)) + math.log(alpha)

    def limit(inner: float, outer: float) -> float:
        """By bisection from a rate that is within towards 0 or 1, which may itself be within."""
        for _ in range(50):
            rate = (inner + outer) / 2
            log_likelihood = (ones * math.log(rate) if ones else 0.0) + (zeros * math.log1p(-rate) if zeros else 0.0)
            if log_likelihood >= least:
                inner = rate
            else:
                outer = rate
        return outer

    likeliest = ones / count if count else 0.5
    return limit(likeliest, 0.0), limit(likeliest, 1.0)


def _around(estimate: Any, margin: Any, counts: Any) -> ConfidenceInterval:
    estimate = np.where(np.asarray(counts) > 0, estimate, np.nan)
    low, high = estimate - margin, estimate + margin
    return ConfidenceInterval(
        estimate[()], np.where(np.isnan(low), -np.inf, low)[()], np.where(np.isnan(high), np.inf, high)[()]
    )
