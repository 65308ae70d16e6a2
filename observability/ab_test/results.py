# SPDX-License-Identifier: Apache-2.0
"""What an A/B test has shown so far: differences of each variant from the control, with their intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from adaptive_k_moe.observability.ab_test.experiment import QUANTITIES, Experiment, Guardrail, Quantity, Variant
from adaptive_k_moe.observability.ab_test.intervals import (
    ConfidenceInterval,
    mean_difference,
    rate_difference,
    share_mismatch,
)
from adaptive_k_moe.observability.ab_test.moments import Moments
from adaptive_k_moe.observability.ab_test.store import StoredExperiment

# What the one-line summary names, with the sign that makes more a gain or a loss as the word says.
_SUMMARY = ("latency", "quality")

SUSPICIOUS = 0.01
"""A `share_mismatch` below this says that requests are not assigned or recorded as they should be."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One quantity of a variant against the control's.

    Attributes:
        metric: the quantity.
        count: observations of the variant.
        control_count: observations of the control.
        value: the variant's mean; geometric for a "ratio".
        control_value: the control's.
        estimate: the difference of the means, or for a "ratio" the relative difference (-0.32 is 32 % less);
            NaN without observations.
        low, high: its confidence interval; infinite while nothing can be said.
    """

    metric: Quantity
    count: int
    control_count: int
    value: float
    control_value: float
    estimate: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether the interval says anything yet."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def sure_harm(self) -> float:
        """The harm that there is at least; -inf while nothing is known, and where neither more nor less is harm."""
        return {1: self.low, -1: -self.high, 0: -math.inf}[self.metric.harm]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: None for what is not known."""
        return {
            "count": self.count,
            "control_count": self.control_count,
            "value": self.value if self.count else None,
            "control_value": self.control_value if self.control_count else None,
            **_finite(self.estimate, self.low, self.high),
        }


@dataclass(frozen=True, slots=True)
class VariantResults:
    """A variant and how it differs from the control.

    Attributes:
        variant: the variant.
        num_requests: its requests.
        comparisons: of each quantity, by name; those of the control are empty. For a variant that was stopped
            they are of that moment.
    """

    variant: Variant
    num_requests: int
    comparisons: dict[str, Comparison]

    def __str__(self) -> str:
        """Such as "Latency: -32% (-35% to -29%), Quality: -0.1% (-0.4% to +0.1%)"."""
        return ", ".join(_sentence(self.comparisons[name]) for name in _SUMMARY)

    @property
    def time_saved(self) -> tuple[float, float, float]:
        """Share of the time a generated token that the variant needs less: estimate, low and high."""
        comparison = self.comparisons["time_per_token"]
        return -comparison.estimate, -comparison.high, -comparison.low


@dataclass(frozen=True, slots=True)
class Results:
    """All about an experiment.

    Attributes:
        experiment: what it is.
        variants: all of them, the control first.
        share_mismatch: p-value of the shares of requests being what the weights say (see `SUSPICIOUS`).
    """

    experiment: Experiment
    variants: tuple[VariantResults, ...]
    share_mismatch: float

    @property
    def treatments(self) -> tuple[VariantResults, ...]:
        """All but the control."""
        return self.variants[1:]

    def __str__(self) -> str:
        """One line a variant; with its name where there are several."""
        if len(self.treatments) == 1:
            return str(self.treatments[0])
        return "\n".join(f"{result.variant.name}: {result}" for result in self.treatments)

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        experiment = self.experiment
        return {
            "experiment": experiment.name,
            "running": experiment.stopped_at is None,
            "started_at": experiment.started_at,
            "stopped_at": experiment.stopped_at,
            "alpha": experiment.alpha,
            "score_share": experiment.score_share,
            "guardrails": [str(guardrail) for guardrail in experiment.guardrails],
            "share_mismatch": self.share_mismatch,
            "variants": [
                {
                    "name": result.variant.name,
                    "policy": result.variant.policy,
                    "weight": result.variant.weight,
                    "control": not result.comparisons,
                    "num_requests": result.num_requests,
                    "stopped_at": result.variant.stopped_at,
                    "stop_reason": result.variant.stop_reason,
                    "time_saved": _finite(*result.time_saved) if result.comparisons else None,
                    "comparisons": {name: found.to_dict() for name, found in result.comparisons.items()},
                }
                for result in self.variants
            ],
        }


def _finite(estimate: float, low: float, high: float) -> dict[str, float | None]:
    figures = {"estimate": estimate, "low": low, "high": high}
    return {name: figure if math.isfinite(figure) else None for name, figure in figures.items()}


def compute(stored: StoredExperiment) -> Results:
    """The results of an experiment as it stands."""
    experiment = stored.experiment
    found = [VariantResults(experiment.control, stored.num_requests[experiment.control.name], {})]
    for variant in experiment.treatments:
        frozen = stored.stop_results.get(variant.name)
        comparisons = _comparisons(stored, variant, experiment.alpha) if frozen is None else _thawed(frozen)
        found.append(VariantResults(variant, stored.num_requests[variant.name], comparisons))
    return Results(experiment, tuple(found), _share_mismatch(stored))


def violations(stored: StoredExperiment) -> list[tuple[Variant, str, dict[str, Any]]]:
    """The running variants that a guardrail stops: each with the sentence, and the results that show it.

    The intervals looked at here share `alpha` among all variants and guardrails, so that the probability that
    any variant without a harm beyond its margins is ever stopped is `alpha` at most.
    """
    experiment = stored.experiment
    num_looked_at = len(experiment.treatments) * len(experiment.guardrails)
    found = []
    for variant in experiment.treatments:
        if variant.stopped_at is not None or not num_looked_at:
            continue
        sums, control = stored.sums[variant.name], stored.sums[experiment.control.name]
        for guardrail in experiment.guardrails:
            name = guardrail.metric
            comparison = compare(QUANTITIES[name], sums[name], control[name], experiment.alpha / num_looked_at)
            if comparison.sure_harm > guardrail.margin:
                reported = _comparisons(stored, variant, experiment.alpha)
                figures = {name: one.to_dict() for name, one in reported.items()}
                found.append((variant, _stop_sentence(guardrail, comparison), figures))
                break
    return found


def compare(metric: Quantity, treatment: Moments, control: Moments, alpha: float) -> Comparison:
    """One quantity of a variant against the control's."""
    interval = (rate_difference if metric.kind == "rate" else mean_difference)(treatment, control, alpha)
    value, control_value = treatment.mean, control.mean
    if metric.kind == "ratio":
        value, control_value = math.exp(value), math.exp(control_value)
        interval = ConfidenceInterval(*(_expm1(float(end)) for end in interval))
    counts = int(treatment.count), int(control.count)
    return Comparison(metric, *counts, float(value), float(control_value), *(float(end) for end in interval))


def _comparisons(stored: StoredExperiment, variant: Variant, alpha: float) -> dict[str, Comparison]:
    treatment, control = stored.sums[variant.name], stored.sums[stored.experiment.control.name]
    return {name: compare(metric, treatment[name], control[name], alpha) for name, metric in QUANTITIES.items()}


def _thawed(figures: dict[str, Any]) -> dict[str, Comparison]:
    return {name: _comparison(metric, figures[name]) for name, metric in QUANTITIES.items() if name in figures}


def _comparison(metric: Quantity, figures: dict[str, Any]) -> Comparison:
    """What `Comparison.to_dict` was made of."""

    def known(name: str, otherwise: float = math.nan) -> float:
        return otherwise if figures[name] is None else float(figures[name])

    return Comparison(
        metric,
        figures["count"],
        figures["control_count"],
        known("value"),
        known("control_value"),
        known("estimate"),
        known("low", -math.inf),
        known("high", math.inf),
    )


def _share_mismatch(stored: StoredExperiment) -> float:
    """Over the variants that no guardrail stopped: they are assigned requests all along."""
    running = [variant for variant in stored.experiment.variants if variant.stopped_at is None]
    counts = [stored.sums[variant.name]["cancelled_rate"].count for variant in running]
    return share_mismatch(counts, [variant.weight for variant in running])


def _stop_sentence(guardrail: Guardrail, comparison: Comparison) -> str:
    metric = comparison.metric
    sign = metric.harm or 1
    scale, unit = (100, "%") if metric.percent or metric.kind == "ratio" else (1, "")
    return (
        f"{metric.name} ({metric.label}) is worse than the control's by at least "
        f"{comparison.sure_harm * scale:.3g}{unit} ({sign * comparison.estimate * scale:.3g}{unit} measured on "
        f"{comparison.count} requests), which is more than {guardrail.margin * scale:.3g}{unit}."
    )


def _sentence(comparison: Comparison) -> str:
    label = comparison.metric.name.capitalize()
    estimate, low, high = comparison.estimate, comparison.low, comparison.high
    if comparison.metric.name == "quality":  # by so much the answer's tokens are less likely under full
        estimate, low, high = _expm1(-estimate), _expm1(-high), _expm1(-low)
    if not comparison.count or not comparison.control_count:
        return f"{label}: not measured yet"
    if not comparison.known:
        return f"{label}: {100 * estimate:+.3g}% (too few requests yet)"
    return f"{label}: {100 * estimate:+.3g}% ({100 * low:+.3g}% to {100 * high:+.3g}%)"


def _expm1(value: float) -> float:
    return math.inf if value > 700 else math.expm1(value)
