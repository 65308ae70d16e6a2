# SPDX-License-Identifier: Apache-2.0
"""Rules of single layers: what dropping costs in each, the order in which layers give experts up, and refining.

Steps 1, 2 and 4 of the method in ``search.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.calibration.families import EntropyRules, Family, OneNumberRules, Rule, Rules
from adaptive_k_moe.calibration.laboratory import DECIMALS, Budget, Candidate, Laboratory, Measured, static
from adaptive_k_moe.calibration.solve import SAME_AVG_K, best_of, keeps, solve
from adaptive_k_moe.policy import EntropyChoices, EntropyPolicy

LEVELS = (0.25, 0.5, 0.75)
"""Shares of a layer's droppable expert runs at which a kind with one number is measured."""

FIRST_STEP, LAST_STEP = 0.24, 0.03
"""Of refining, as shares of a layer's tokens or of its droppable expert runs."""


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
    place: int
    start: Rule
    end: Rule
    saved: float


Option = tuple[float, float, Rule]
"""Average k saved, damage, and the rule."""


class FillingOrder:
    """Step 2: the order in which places, each layer or all of them as one, give experts up.

    Args:
        rules: what a place's rule is.
        options: of each place, without that of saving nothing.
    """

    def __init__(self, rules: Rules, options: Sequence[Sequence[Option]]) -> None:
        self._rules = rules
        self._nothing = rules.fixed(rules.full_k)
        self.segments = sorted(
            (part for place, found in enumerate(options) for part in _hull_segments(found, place, self._nothing)),
            key=lambda segment: (segment.slope, segment.place),
        )
        self._total = sum(segment.saved for segment in self.segments)

    def rules_at(self, x: float) -> list[Rule]:
        """Each place's rule when a share x of all that can be saved is taken."""
        at = [self._nothing] * self._rules.count
        left = x * self._total
        for segment in self.segments:
            if left <= 0:
                break
            at[segment.place] = self._rules.between(segment.start, segment.end, min(1.0, left / segment.saved))
            left -= segment.saved
        return at

    def family(self) -> Family:
        """Along the order."""
        return lambda x: self._rules.candidate(self.rules_at(x))


def entropy_order(damage: Damage, rules: EntropyRules) -> FillingOrder:
    """For thresholds of entropy by layer."""
    return FillingOrder(rules, [_entropy_options(damage, rules, layer) for layer in range(rules.count)])


def one_number_order(
    laboratory: Laboratory, damage: Damage, rules: OneNumberRules, k_values: Sequence[int]
) -> FillingOrder:
    """For a kind with one number: every fixed k, and one pass for each place and level, the other places in full."""
    full_k, nothing = rules.full_k, [rules.fixed(rules.full_k)] * rules.count
    options = _fixed_options(laboratory, damage, rules, k_values[:-1])
    for place, level in itertools.product(range(rules.count), LEVELS):
        rule = rules.saving(level)
        scores = laboratory.measure(rules.candidate(_replaced(nothing, {place: rule}))).scores
        options[place].append((full_k - scores.avg_k, scores.mean_kl, rule))
    return FillingOrder(rules, options)


def _fixed_options(laboratory: Laboratory, damage: Damage, rules: Rules, lower: Sequence[int]) -> list[list[Option]]:
    """Every place's at a fixed k: of all layers at once by measurement, of single layers the sum of their bands."""
    if rules.count == 1:
        measured = [laboratory.measure(static(k)).scores for k in lower]
        return [[(rules.full_k - s.avg_k, s.mean_kl, rules.fixed(k)) for s, k in zip(measured, lower, strict=True)]]
    saved, kl = damage.saved.sum(axis=1), damage.kl.sum(axis=1)
    return [
        [(float(saved[layer, c]), float(kl[layer, c]), rules.fixed(k)) for c, k in enumerate(lower)]
        for layer in range(rules.count)
    ]


def _entropy_options(damage: Damage, rules: EntropyRules, layer: int) -> list[Option]:
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
                rules.at([edge / num_bands for edge in edges]),
            )
        )
    return options


def _hull_segments(options: Sequence[Option], place: int, nothing: Rule) -> list[_Segment]:
    """The lower convex hull of a place's options, from nothing saved on."""
    hull: list[Option] = [(0.0, 0.0, nothing)]
    for option in sorted(options):
        if option[0] <= hull[-1][0]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return [_Segment(_slope(a, b), place, a[2], b[2], b[0] - a[0]) for a, b in itertools.pairwise(hull)]


def _slope(a: Option, b: Option) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _replaced(rules: Sequence[Rule], by: Mapping[int, Rule]) -> list[Rule]:
    return [by.get(place, rule) for place, rule in enumerate(rules)]


class _Move(NamedTuple):
    place: int
    rule: Rule
    damage: float
    """Change of it."""
    avg_k: float
    """Change of it."""


def refine(laboratory: Laboratory, rules: Rules, found: Measured, budget: Budget, passes: int) -> Measured:
    """Step 4: change single places' rules by what the real model says.

    Every place's neighbouring rules are measured. Those are taken together that do the least damage at a price for each
    expert run, at which they leave the average k as it was: some places get experts that others give up. Steps halve
    where nothing is better, and the budget is met again at the end.

    Args:
        laboratory: measures.
        rules: what may be changed.
        found: where to begin: a policy of these rules or of a kind that they contain.
        budget: to meet.
        passes: most candidates to measure before the budget is met again.

    Returns:
        The better of the refined policy and `found`.
    """
    if passes < 1 or found.scores.avg_k >= rules.full_k:
        return found
    best, at = found, rules.rules_of(found.candidate.policy)
    seen, left, step = {found.candidate.key()}, passes, FIRST_STEP
    while left > 0 and step >= LAST_STEP:
        moves: list[_Move] = []
        for place, rule in _by_turns([rules.neighbours(rule, step) for rule in at]):
            candidate = rules.candidate(_replaced(at, {place: rule}))
            if candidate.key() in seen or left <= 0:
                continue
            seen.add(candidate.key())
            left -= 1
            scores = laboratory.measure(candidate).scores
            moves.append(_Move(place, rule, scores.mean_kl - best.scores.mean_kl, scores.avg_k - best.scores.avg_k))
        price = _price(moves, found.scores.avg_k - best.scores.avg_k + SAME_AVG_K * rules.full_k)
        taken = _best_moves(moves, price)
        # All good moves together may be too much of a good thing; then the best alone.
        for count in sorted({len(taken), min(2, len(taken)), min(1, len(taken))} - {0}, reverse=True):
            trial = _replaced(at, {move.place: move.rule for move in taken[:count]})
            measured = laboratory.measure(rules.candidate(trial))
            left -= 1
            more = measured.scores.avg_k - best.scores.avg_k
            if measured.scores.mean_kl + price * more < best.scores.mean_kl:
                best, at = measured, trial
                break
        else:
            step /= 2
    if best is found:
        return found
    met = [best] if keeps(laboratory, best, budget) else []
    return best_of([found, *met, solve(laboratory, rules.through(at), budget)], budget)


def _by_turns(found: Sequence[Sequence[Rule]]) -> Iterator[tuple[int, Rule]]:
    """The first of every place before the second of any: there may be more of them than passes."""
    for turn in itertools.zip_longest(*found):
        yield from ((place, rule) for place, rule in enumerate(turn) if rule is not None)


def _best_moves(moves: Sequence[_Move], price: float) -> list[_Move]:
    """Each place's best move at a price for each expert run, where any is good; the best place first."""
    best: dict[int, _Move] = {}
    for move in sorted(moves, key=lambda move: move.damage + price * move.avg_k):
        if move.damage + price * move.avg_k < 0:
            best.setdefault(move.place, move)
    return list(best.values())


def _price(moves: Sequence[_Move], more: float) -> float:
    """The least price at which the best moves raise the average k by no more than this."""
    low, high = 0.0, max((abs(move.damage / move.avg_k) for move in moves if move.avg_k), default=0.0)
    for _ in range(50):
        middle = (low + high) / 2
        if sum(move.avg_k for move in _best_moves(moves, middle)) > more:
            low = middle
        else:
            high = middle
    return high


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
        path += [[k] * len(path[0]) for k in range(k_values[0], k_values[-1])]
        averages = [float(np.mean(ks)) for ks in path]
        nearest = nearest_on_one_side(averages, averages, budget.avg_k, k_values[-1], at_least)
        level = [ks for ks, average in zip(path, averages, strict=True) if average == nearest]
        k = min(level, key=lambda ks: laboratory.measure(static_by_layer(ks)).scores.mean_kl)
    else:
        k = path[0]
        for ks in path[1:]:
            if not keeps(laboratory, laboratory.measure(static_by_layer(ks)), budget):
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
