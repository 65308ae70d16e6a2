# SPDX-License-Identifier: Apache-2.0
"""Rules of single layers: what dropping costs in each, the order in which layers give experts up, and refining.

Steps 1, 2 and 4 of the method in ``search.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.calibration.families import Family, OneNumberRules, Quantiles, choices_at
from adaptive_k_moe.calibration.laboratory import DECIMALS, Budget, Candidate, Laboratory, Measured
from adaptive_k_moe.calibration.solve import solve
from adaptive_k_moe.policy import EntropyChoices, EntropyPolicy

LEVELS = (0.25, 0.5, 0.75, 1.0)
"""Shares of a layer's droppable expert runs at which a kind with one number is measured."""


@dataclass(frozen=True, eq=False)
class Damage:
    """What was measured by layer and entropy band. L layers, B bands, C values of k below the full.

    Attributes:
        edges: [L, B - 1] nats, between the bands.
        kl: [L, B, C] damage with one band of one layer at a lower k.
        saved: [L, B, C] average k saved by it.
    """

    edges: npt.NDArray[np.float64]
    kl: npt.NDArray[np.float64]
    saved: npt.NDArray[np.float64]


def measure_damage(
    laboratory: Laboratory, entropy: npt.NDArray[np.float32], k_values: Sequence[int], num_bands: int
) -> Damage:
    """Step 1: one pass for each layer, band and lower k.

    Args:
        laboratory: measures.
        entropy: [W, n, L] the full model's, nats.
        k_values: rising, the trained top-k last.
        num_bands: bands of equal size in each layer.
    """
    num_layers, full_k = entropy.shape[-1], k_values[-1]
    shape = (num_layers, num_bands, len(k_values) - 1)
    edges = np.empty((num_layers, num_bands - 1))
    kl, saved = np.empty(shape), np.empty(shape)
    for layer, band, choice in np.ndindex(shape):
        values = np.asarray(entropy[..., layer])
        limits = np.quantile(values, np.arange(1, num_bands) / num_bands)
        edges[layer] = np.round(limits, DECIMALS)
        thresholds = [round(float(limit), DECIMALS) for limit in limits[max(0, band - 1) : band + 1]]
        k = [full_k] * (len(thresholds) + 1)
        k[min(band, 1)] = k_values[choice]
        if len(set(thresholds)) < len(thresholds):
            kl[layer, band, choice] = saved[layer, band, choice] = 0.0  # a band between equal edges is empty
            continue
        rules = {layer: EntropyChoices(thresholds=thresholds, k=k)}
        scores = laboratory.measure(Candidate("entropy_per_layer", EntropyPolicy(kind="entropy", layers=rules))).scores
        kl[layer, band, choice] = scores.mean_kl
        saved[layer, band, choice] = full_k - scores.avg_k
    return Damage(edges, kl, saved)


class _Segment(NamedTuple):
    slope: float
    layer: int
    start: Quantiles
    end: Quantiles
    saved: float
    damage: float


Option = tuple[float, float, Quantiles]
"""Average k saved, damage, and the layer's thresholds."""


class LayerPlan:
    """Step 2: the order in which layers give experts up.

    Args:
        options: of each layer, without that of saving nothing.
        make: turns the thresholds of all layers into a policy.
    """

    def __init__(self, options: Sequence[Sequence[Option]], make: Callable[[Sequence[Quantiles]], Candidate]) -> None:
        self.num_layers = len(options)
        self._make = make
        self._nothing: Quantiles = (0.0,) * len(options[0][0][2])
        self.segments = sorted(
            (segment for layer in range(self.num_layers) for segment in _hull_segments(options[layer], layer)),
            key=lambda segment: (segment.slope, segment.layer),
        )
        self._total = sum(segment.saved for segment in self.segments)
        self._made: dict[str, list[Quantiles]] = {}

    def quantiles(self, x: float) -> list[Quantiles]:
        """Each layer's thresholds when a share x of all that can be saved is taken."""
        at: list[Quantiles] = [self._nothing] * self.num_layers
        left = x * self._total
        for segment in self.segments:
            if left <= 0:
                break
            part = min(1.0, left / segment.saved)
            at[segment.layer] = tuple(a + part * (b - a) for a, b in zip(segment.start, segment.end, strict=True))
            left -= segment.saved
        return at

    def candidate(self, quantiles: Sequence[Quantiles]) -> Candidate:
        """The policy with these thresholds."""
        made = self._make(quantiles)
        self._made[made.key()] = list(quantiles)
        return made

    def quantiles_of(self, candidate: Candidate) -> list[Quantiles]:
        """The thresholds of a policy that this plan made; of any other, those of saving nothing."""
        return self._made.get(candidate.key(), [self._nothing] * self.num_layers)

    def family(self) -> Family:
        """Along the filling order."""
        return lambda x: self.candidate(self.quantiles(x))

    def shifted(self, quantiles: Sequence[Quantiles]) -> Family:
        """From nothing saved through the given thresholds (at one half) to everything saved."""

        def at(x: float) -> Candidate:
            part = 2 * x if x <= 0.5 else 2 * x - 1
            return self.candidate(
                [tuple(q * part if x <= 0.5 else q + (1 - q) * part for q in layer) for layer in quantiles]
            )

        return at


def entropy_plan(damage: Damage, entropy: npt.NDArray[np.float32], k_values: Sequence[int]) -> LayerPlan:
    """Thresholds of entropy.

    Args:
        damage: of step 1.
        entropy: [W, n, L] the full model's, nats.
        k_values: rising, the trained top-k last.
    """
    in_order = [np.sort(np.asarray(entropy[..., layer]), axis=None) for layer in range(entropy.shape[-1])]

    def make(quantiles: Sequence[Quantiles]) -> Candidate:
        layers = {layer: choices_at(in_order[layer], at, k_values) for layer, at in enumerate(quantiles)}
        return Candidate("entropy_per_layer", EntropyPolicy(kind="entropy", layers=layers))

    return LayerPlan([_entropy_options(damage, layer) for layer in range(len(in_order))], make)


def one_number_plan(laboratory: Laboratory, rules: OneNumberRules) -> LayerPlan:
    """Step 1 and 2 for a kind with one number: one pass for each layer and level, the other layers in full."""
    full_k = rules.full_k
    options: list[list[Option]] = []
    for layer in range(rules.num_layers):
        found: list[Option] = []
        for level in LEVELS:
            shares = [level if at == layer else 0.0 for at in range(rules.num_layers)]
            scores = laboratory.measure(rules.by_layer(shares)).scores
            found.append((full_k - scores.avg_k, scores.mean_kl, (level,)))
        options.append(found)
    return LayerPlan(options, lambda quantiles: rules.by_layer([share for (share,) in quantiles]))


def _entropy_options(damage: Damage, layer: int) -> list[Option]:
    """Every choice of band edges, its damage the sum of its bands'."""
    kl, saved = damage.kl[layer], damage.saved[layer]
    num_bands, num_lower = kl.shape
    options: list[Option] = []
    for edges in itertools.combinations_with_replacement(range(num_bands + 1), num_lower):
        cells = [(slice(begin, end), c) for c, (begin, end) in enumerate(itertools.pairwise((0, *edges)))]
        options.append(
            (
                float(sum(saved[bands, c].sum() for bands, c in cells)),
                float(sum(kl[bands, c].sum() for bands, c in cells)),
                tuple(edge / num_bands for edge in edges),
            )
        )
    return options


def _hull_segments(options: Sequence[Option], layer: int) -> list[_Segment]:
    """The lower convex hull of a layer's options, from nothing saved on."""
    hull: list[Option] = [(0.0, 0.0, (0.0,) * len(options[0][2]))]
    for option in sorted(options):
        if option[0] <= hull[-1][0]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return [_Segment(_slope(a, b), layer, a[2], b[2], b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(hull)]


def _slope(a: tuple[float, float, Any], b: tuple[float, float, Any]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def refine(laboratory: Laboratory, plan: LayerPlan, found: Measured, budget: Budget, passes: int) -> Measured:
    """Step 4: move single layers' thresholds by what the real model says.

    The score is damage plus a price for each expert run, the price being what the last savings cost, so that
    moves which save different amounts can be compared; the budget is met again at the end.

    Args:
        laboratory: measures.
        plan: turns thresholds into policies.
        found: the policy of steps 2 and 3.
        budget: to meet.
        passes: most candidates to measure before the budget is met again.

    Returns:
        The better of the refined policy and `found`.
    """
    full_k = laboratory.evaluator.full_k
    room = full_k - found.scores.avg_k
    if room <= 0 or passes < 1:
        return found
    # Damage grows about as the square of what is saved, so its slope is twice the mean cost.
    price = 2 * found.scores.mean_kl / room
    best, at = found, plan.quantiles_of(found.candidate)
    left, step = passes, 0.12

    def score(measured: Measured) -> float:
        return measured.scores.mean_kl + price * measured.scores.avg_k

    def moved(base: Sequence[Quantiles], moves: Sequence[tuple[int, float]]) -> list[Quantiles]:
        changed = list(base)
        for layer, by in moves:
            changed[layer] = tuple(min(1.0, max(0.0, q + by)) for q in changed[layer])
        return changed

    while left > 0 and step >= 0.03:
        gains: list[tuple[float, int, float]] = []
        for layer, by in itertools.product(range(plan.num_layers), (step, -step)):
            trial = moved(at, [(layer, by)])
            if left <= 0 or trial == at:
                continue
            left -= 1
            gains.append((score(laboratory.measure(plan.candidate(trial))) - score(best), layer, by))
        taken: dict[int, float] = {}
        for gain, layer, by in sorted(gains):
            if gain < 0 and layer not in taken:
                taken[layer] = by
        # All good moves together may be too much of a good thing; then the best alone.
        trials = [list(taken.items()), list(taken.items())[:2], list(taken.items())[:1]] if taken else []
        for moves in trials:
            trial = moved(at, moves)
            measured = laboratory.measure(plan.candidate(trial))
            left -= 1
            if score(measured) < score(best):
                best, at = measured, trial
                break
        else:
            step /= 2
    if best is found:
        return found
    met = solve(laboratory, plan.shifted(at), budget)
    if budget.avg_k is not None:
        return met if met.scores.mean_kl < found.scores.mean_kl else found
    return met if met.scores.avg_k < found.scores.avg_k else found


def static_by_layer(k: Sequence[int]) -> Candidate:
    """A fixed k in each layer."""
    layers = {layer: EntropyChoices(thresholds=[], k=[value]) for layer, value in enumerate(k)}
    return Candidate("static_per_layer", EntropyPolicy(kind="entropy", layers=layers))


def static_path(damage: Damage, k_values: Sequence[int]) -> list[list[int]]:
    """Each layer's k, from the full down to the lowest, one layer and one expert at a time, cheapest first.

    Every k in between is tried, not the measured ones alone: a coarser opponent would be an easier one. What it
    costs is interpolated.
    """
    measured = np.concatenate([damage.kl.sum(axis=1), np.zeros((len(damage.kl), 1))], axis=1)  # [L, C + 1]
    lowest, full_k = k_values[0], k_values[-1]
    cost = [np.interp(range(full_k + 1), k_values, layer) for layer in measured]
    k = [full_k] * len(cost)
    path = [list(k)]
    while any(value > lowest for value in k):
        _, layer = min((cost[at][value - 1] - cost[at][value], at) for at, value in enumerate(k) if value > lowest)
        k[layer] -= 1
        path.append(list(k))
    return path


SAME_AVG_K = 0.005
"""Average k closer than this, as a share of the trained top-k, count as the same."""


def solve_static_by_layer(
    laboratory: Laboratory,
    damage: Damage,
    k_values: Sequence[int],
    budget: Budget,
    passes: int,
    *,
    at_least: bool = False,
) -> Measured:
    """The best fixed k by layer within a budget: the cheapest layers first, then exchanges by the real model.

    Args:
        laboratory: measures.
        damage: of step 1.
        k_values: rising, the trained top-k last.
        budget: the target.
        passes: most exchanges to measure.
        at_least: take the lowest average k that is not below the budget's, instead of the highest that is not
            above it: what an opponent of an adaptive policy must be given, so that it never has fewer experts.

    Raises:
        CalibrationError: the budget is below the lowest k.
    """
    path = static_path(damage, k_values)
    if budget.avg_k is not None:
        k = nearest_on_one_side(path, [float(np.mean(ks)) for ks in path], budget.avg_k, k_values[-1], at_least)
    else:
        assert budget.perplexity_increase is not None
        limit = laboratory.full().scores.perplexity * (1 + budget.perplexity_increase)
        k = path[0]
        for ks in path[1:]:
            if laboratory.measure(static_by_layer(ks)).scores.perplexity > limit:
                break
            k = ks
    best, left = laboratory.measure(static_by_layer(k)), passes
    improved = True
    while improved and left > 0:
        improved = False
        for up, down in itertools.permutations(range(len(k)), 2):
            if k[up] == k_values[-1] or k[down] == k_values[0] or left <= 0:
                continue
            trial = list(k)
            trial[up] += 1
            trial[down] -= 1
            left -= 1
            measured = laboratory.measure(static_by_layer(trial))
            if measured.scores.mean_kl < best.scores.mean_kl:
                best, k, improved = measured, trial, True
                break
    return best


_T = TypeVar("_T")


def nearest_on_one_side(items: Sequence[_T], averages: Sequence[float], wanted: float, full_k: int, above: bool) -> _T:
    """The item whose average k is nearest to the one wanted, not below it or not above it."""
    slack = SAME_AVG_K * full_k
    fitting = [
        (abs(average - wanted), at)
        for at, average in enumerate(averages)
        if (average >= wanted - slack if above else average <= wanted + slack)
    ]
    if not fitting:
        raise CalibrationError(
            f"an average k of {wanted:g} cannot be reached: the lowest of this kind is {min(averages):.3f}."
        )
    return items[min(fitting)[1]]
