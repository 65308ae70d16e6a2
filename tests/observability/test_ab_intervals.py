# SPDX-License-Identifier: Apache-2.0
"""Intervals looked at after each batch: how often they are wrong, how often they find a difference, and oracles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import integrate, optimize, special, stats

from adaptive_k_moe.errors import ExperimentError
from adaptive_k_moe.observability.ab_test.intervals import (
    BURN_IN,
    TIGHTEST_AT,
    ConfidenceInterval,
    mean_difference,
    rate_difference,
    required_observations,
    share_mismatch,
)
from adaptive_k_moe.observability.ab_test.moments import NO_MOMENTS, Moments

Array = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, int], npt.NDArray[np.bool_]], Array]

EXPERIMENTS = 1000
ALPHA = 0.05
BATCH = 50

# Quantities without a difference: logarithms of latencies (normal for log-normal latencies, exponential for
# Pareto's, whose mean need not exist), losses with rare large values, and skewed ones.
NO_DIFFERENCE: dict[str, Draw] = {
    "log-normal latency": lambda random, shape, _: random.normal(-1, 0.6, shape),
    "Pareto latency": lambda random, shape, _: random.exponential(1.0, shape),
    "Student's t with 3 degrees": lambda random, shape, _: random.standard_t(3, shape),
    "log-normal loss": lambda random, shape, _: random.lognormal(-3, 1.0, shape),
    "squared exponential": lambda random, shape, _: random.exponential(1.0, shape) ** 2,
    "mostly zero": lambda random, shape, _: (random.random(shape) < 0.05) * random.exponential(1.0, shape),
}


def moments_at_looks(values: Array, chosen: npt.NDArray[np.bool_]) -> Moments:
    """Moments [experiments, looks] of the chosen values after each batch."""
    powers = [chosen.astype(np.float64)]
    for _ in range(3):
        powers.append(powers[-1] * values)
    count, total, squares, cubes = (x.reshape(len(values), -1, BATCH).sum(2).cumsum(1) for x in powers)
    mean = total / np.maximum(count, 1)
    return Moments(
        count,
        mean,
        np.maximum(squares - count * mean**2, 0),
        cubes - 3 * mean * squares + 2 * count * mean**3,
    )


def peek(
    draw: Draw,
    *,
    requests: int,
    share: float = 0.5,
    difference: Callable[..., ConfidenceInterval] = mean_difference,
    alpha: float = ALPHA,
    experiments: int = EXPERIMENTS,
    seed: int = 0,
) -> ConfidenceInterval:
    """The intervals [experiments, looks] of many experiments, each looked at after every batch of requests."""
    random = np.random.default_rng(seed)
    shape = (experiments, requests // BATCH * BATCH)
    treated = random.random(shape) < share
    values = draw(random, shape, treated)
    return difference(moments_at_looks(values, treated), moments_at_looks(values, ~treated), alpha)


def excludes(interval: ConfidenceInterval, truth: float = 0.0) -> float:
    """Share of experiments in which any look's interval excludes a value."""
    return float(((interval.low > truth) | (interval.high < truth)).any(axis=1).mean())


@pytest.mark.parametrize("share", [0.5, 0.1])
@pytest.mark.parametrize("name", list(NO_DIFFERENCE))
def test_no_difference_is_reported_where_there_is_none(name: str, share: float) -> None:
    assert excludes(peek(NO_DIFFERENCE[name], requests=4000, share=share)) <= ALPHA


def test_an_interval_of_fixed_size_would_be_wrong_far_more_often() -> None:
    def fixed(treatment: Moments, control: Moments, alpha: float) -> ConfidenceInterval:
        variance = sum(m.squares / np.maximum(m.count - 1, 1) / np.maximum(m.count, 1) for m in (treatment, control))
        margin = stats.norm.ppf(1 - alpha / 2) * np.sqrt(variance)
        estimate = treatment.mean - control.mean
        return ConfidenceInterval(estimate, estimate - margin, estimate + margin)

    draw = NO_DIFFERENCE["log-normal latency"]
    assert excludes(peek(draw, requests=4000, difference=fixed)) > 4 * ALPHA


@pytest.mark.parametrize(("rate", "share"), [(0.0, 0.5), (0.002, 0.5), (0.05, 0.1), (0.5, 0.5), (0.99, 0.9)])
def test_rates_without_a_difference(rate: float, share: float) -> None:
    interval = peek(
        lambda random, shape, _: (random.random(shape) < rate) * 1.0,
        requests=2000,
        share=share,
        difference=rate_difference,
        experiments=300,
    )
    assert excludes(interval) <= ALPHA
    assert np.isfinite(interval.low).all() and (interval.low >= -1).all() and (interval.high <= 1).all()


@pytest.mark.parametrize(
    ("effect", "deviation", "share"),
    [(math.log(0.9), 0.6, 0.5), (math.log(0.68), 0.6, 0.5), (0.02, 0.1, 0.2), (0.3, 1.0, 0.5)],
)
def test_a_difference_is_found_with_the_stated_power_by_the_stated_number_of_requests(
    effect: float, deviation: float, share: float
) -> None:
    requests = required_observations(effect, deviation, alpha=ALPHA, power=0.8, share=share)
    requests = -(-requests // BATCH) * BATCH

    def draw(random: np.random.Generator, shape: tuple[int, int], treated: Any) -> Array:
        return np.asarray(random.normal(0, deviation, shape) + effect * treated)

    interval = peek(draw, requests=requests, share=share)
    found = (interval.low > 0) if effect > 0 else (interval.high < 0)
    assert found.any(axis=1).mean() >= 0.8
    wrong = (interval.high < 0) if effect > 0 else (interval.low > 0)
    assert wrong.any(axis=1).mean() <= 0.01
    assert excludes(interval, effect) <= ALPHA


def test_a_loss_of_one_variant_alone_is_covered_and_found() -> None:
    def draw(random: np.random.Generator, shape: tuple[int, int], treated: Any) -> Array:
        return np.asarray(treated * random.gamma(0.5, 0.1, shape))  # the control has full's own answers: no loss

    interval = peek(draw, requests=2000)
    assert excludes(interval, 0.05) <= ALPHA
    assert (interval.low[:, -1] > 0).mean() > 0.99


def test_a_variant_at_its_margin_is_stopped_no_more_often_than_promised() -> None:
    margin = 0.05

    def draw(random: np.random.Generator, shape: tuple[int, int], treated: Any) -> Array:
        return np.asarray(treated * random.gamma(1.0, margin, shape))

    assert (peek(draw, requests=4000).low > margin).any(axis=1).mean() <= ALPHA


def test_requests_needed_grow_as_the_effect_shrinks() -> None:
    needed = [required_observations(effect, 1.0) for effect in (1.0, 0.5, 0.1, 0.05)]
    assert needed == sorted(needed) and needed[0] >= 2 * BURN_IN
    assert required_observations(0.1, 1.0, power=0.9) > needed[2]
    assert required_observations(0.1, 1.0, share=0.1) > needed[2]
    assert required_observations(-0.1, 1.0) == needed[2]
    for impossible in ({"effect": 0.0}, {"standard_deviation": 0.0}, {"share": 1.0}, {"power": 1.0}):
        with pytest.raises(ExperimentError, match="a number of observations needs"):
            required_observations(**({"effect": 0.1, "standard_deviation": 1.0} | impossible))


@pytest.mark.parametrize("count", [100, 1000, 50_000])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_the_margin_is_where_the_normal_mixture_reaches_one_over_alpha(count: int, alpha: float) -> None:
    half = count // 2
    of_variance_one = Moments(half, 0.0, half - 1.0, 0.0)
    interval = mean_difference(of_variance_one, of_variance_one, alpha)
    sum_of_influence = count * interval.high / math.sqrt(4.0)  # of observations of variance 1
    log_term = -2 * math.log(alpha)
    rho2 = (log_term + math.log(log_term + 1)) / TIGHTEST_AT
    # The integrand's own peak and width, for the integrator to look there.
    peak = sum_of_influence * rho2 / (1 + count * rho2)
    width = 40 * math.sqrt(rho2 / (1 + count * rho2))
    mixture, _ = integrate.quad(
        lambda x: math.exp(x * sum_of_influence - x * x * count / 2) * stats.norm.pdf(x, 0, math.sqrt(rho2)),
        peak - width,
        peak + width,
        points=[peak],
        limit=200,
    )
    assert mixture == pytest.approx(1 / alpha, rel=1e-4)


def test_the_variance_is_that_of_the_influence_function() -> None:
    random = np.random.default_rng(3)
    treated = random.random(5000) < 0.3
    values = random.normal(0, 1 + treated, 5000) + 0.2 * treated
    moments = [_moments(values[treated]), _moments(values[~treated])]
    interval = mean_difference(*moments, ALPHA)
    share = treated.mean()
    means = np.where(treated, values[treated].mean(), values[~treated].mean())
    influence = np.where(treated, 1 / share, -1 / (1 - share)) * (values - means)
    unit = mean_difference(Moments(2500, 0.0, 2499.0, 0.0), Moments(2500, 0.0, 2499.0, 0.0), ALPHA)
    assert (interval.high - interval.low) / 2 == pytest.approx(unit.high * influence.std() / 2, rel=1e-3)
    assert interval.estimate == pytest.approx(values[treated].mean() - values[~treated].mean())


@pytest.mark.parametrize(("count", "ones"), [(1, 0), (1, 1), (10, 3), (500, 0), (500, 500), (20_000, 37)])
def test_rates_are_limited_where_the_beta_mixture_reaches_one_over_alpha(count: int, ones: int) -> None:
    def log_ratio(rate: float) -> float:
        mixture = special.betaln(ones + 0.5, count - ones + 0.5) - special.betaln(0.5, 0.5)
        return float(mixture - special.xlogy(ones, rate) - special.xlog1py(count - ones, -rate) - math.log(2 / ALPHA))

    rate = ones / count
    low = 0.0 if ones == 0 else optimize.brentq(log_ratio, 1e-300, rate)
    high = 1.0 if ones == count else optimize.brentq(log_ratio, rate, 1 - 1e-16)
    interval = rate_difference(Moments(count, rate, 0.0, 0.0), NO_MOMENTS, ALPHA)
    assert interval.low == pytest.approx(low - 1, abs=1e-9) and interval.high == pytest.approx(high, abs=1e-9)


def test_shares_that_are_what_the_weights_say_are_not_suspected() -> None:
    random = np.random.default_rng(1)
    suspected = 0
    for _ in range(300):
        counts = np.zeros(3, np.int64)
        least = 1.0
        for _ in range(40):
            counts += random.multinomial(50, [0.2, 0.3, 0.5])
            least = min(least, share_mismatch(counts.tolist(), [2, 3, 5]))
        suspected += least < 0.05
    assert suspected <= 0.05 * 300
    assert share_mismatch([2300, 1700], [1, 1]) < 1e-6
    assert share_mismatch([0, 0], [1, 1]) == 1.0


def test_moments_grow_by_one_observation_at_a_time() -> None:
    values = np.random.default_rng(2).exponential(size=400)
    grown = _moments(values)
    deviations = values - values.mean()
    expected = (400, values.mean(), (deviations**2).sum(), (deviations**3).sum())
    assert grown == pytest.approx(expected)
    assert mean_difference(NO_MOMENTS, grown, ALPHA).low == -math.inf


def test_nothing_is_said_of_few_or_very_skewed_observations() -> None:
    few, enough = _moments(np.arange(BURN_IN - 1)), _moments(np.arange(BURN_IN))
    assert mean_difference(few, enough, ALPHA)[1:] == (-math.inf, math.inf)
    assert math.isfinite(mean_difference(enough, enough, ALPHA).low)
    skewed = _moments(np.append(np.zeros(99), 1.0))
    assert mean_difference(skewed, enough, ALPHA)[1:] == (-math.inf, math.inf)
    alike = _moments(np.full(100, 0.1))
    assert mean_difference(alike, alike, ALPHA) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)


def _moments(values: npt.NDArray[Any]) -> Moments:
    moments = NO_MOMENTS
    for value in values.tolist():
        moments = moments.add(value)
    return moments
