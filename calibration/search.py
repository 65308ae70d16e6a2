# SPDX-License-Identifier: Apache-2.0
"""Finds a policy of each kind for a budget, by running the model.

Damage is the mean KL divergence of the next-token prediction from the full model's. It measures the same
thing as a rise in perplexity, with far less noise: it is zero for the full model at every token, so no
luck of the text enters.

The method for thresholds by layer:

1. Measure. Each layer's tokens are cut into bands of equal size by their entropy in the full model's traces;
   for each layer, band and k, one pass over the text runs only those tokens at that k.
2. Fill. A layer's thresholds are a set of band edges; its options are points (experts saved, damage), and
   only their lower convex hull can be best. The hulls' segments of all layers, ordered by damage for each expert
   saved, are taken until the budget is full; the last one in part. If damages only added up, this would be
   optimal.
3. Correct. Dropping experts in one layer changes the next, so the measured average k is not the predicted
   one: the budget given to step 2 is corrected until the measured average meets the target.
4. Refine. Each layer's thresholds are moved up and down and the real model decides, then step sizes halve.

Every other kind has one number to find (and, with more than two values of k, a shape), which steps 3 finds alone.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.calibration.evaluator import Evaluator, Reference, Scores, random_rows
from adaptive_k_moe.calibration.traces import EvaluationCache
from adaptive_k_moe.calibration.windows import Windows
from adaptive_k_moe.policy import (
    EntropyChoices,
    EntropyPolicy,
    FixedPolicy,
    Policy,
    RatioPolicy,
    TopPPolicy,
)

Kind = Literal["entropy", "entropy_per_layer", "top_p", "ratio", "static", "static_per_layer", "random"]

ADAPTIVE_KINDS: tuple[Kind, ...] = ("entropy", "entropy_per_layer", "top_p", "ratio")
STATIC_KINDS: tuple[Kind, ...] = ("static", "static_per_layer")

Quantiles = tuple[float, ...]
"""A layer's thresholds as shares of its tokens that lie below them, rising; one fewer than values of k."""

DECIMALS = 4
"""Thresholds are rounded before they are measured, so that the file says what was measured."""


@dataclass(frozen=True)
class Candidate:
    """A policy with the kind it was made as; `random` is a control that no policy file can express.

    Attributes:
        kind: how it decides.
        policy: the rule; for `random` the rule of the tokens that were drawn.
        share: `random` only: share of the tokens drawn, the others run the trained top-k.
        seed: `random` only: of the draw.
    """

    kind: Kind
    policy: Policy
    share: float | None = None
    seed: int = 0

    def key(self) -> str:
        """A description that is equal for equal candidates, whatever kind they were made as."""
        content: dict[str, Any] = self.policy.model_dump(mode="json", exclude_none=True)
        if self.share is not None:
            content["random"] = [self.share, self.seed]
        return json.dumps(content, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Measured:
    """A candidate and its scores."""

    candidate: Candidate
    scores: Scores


class Laboratory:
    """Measures candidates on one text, each once.

    Args:
        evaluator: the engine.
        windows: the text.
        reference: the full model's predictions of it.
        cache: scores from before.
        on_evaluation: called before each pass over the text, with what is measured.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        windows: Windows,
        reference: Reference,
        cache: EvaluationCache,
        *,
        on_evaluation: Callable[[str], None] | None = None,
    ) -> None:
        self.evaluator = evaluator
        self.windows = windows
        self._reference = reference
        self._cache = cache
        self._on_evaluation = on_evaluation
        self.passes = 0

    def measure(self, candidate: Candidate) -> Measured:
        """A candidate's scores, from the cache or by a pass over the text."""
        key = candidate.key()
        scores = self._cache.get(key)
        if scores is None:
            if self._on_evaluation is not None:
                self._on_evaluation(candidate.kind.replace("_", " "))
            rows: int | npt.NDArray[np.int32] = 1
            policies: dict[str, Policy] = {"candidate": candidate.policy}
            if candidate.share is not None:
                policies["others"] = FixedPolicy(kind="fixed", k=self.evaluator.full_k)
                rows = random_rows(self.windows.tokens.shape, candidate.share, candidate.seed)
            tables = self.evaluator.tables(policies)
            scores = self.evaluator.scores(self.windows, tables, rows, self._reference)
            self._cache.put(key, scores)
            self.passes += 1
        return Measured(candidate, scores)

    def full(self) -> Measured:
        """The trained top-k."""
        return self.measure(static(self.evaluator.full_k))


class Budget(NamedTuple):
    """What a policy may use or cost; exactly one is set.

    Attributes:
        avg_k: mean experts run for a token in a layer.
        perplexity_increase: share by which perplexity may rise.
    """

    avg_k: float | None = None
    perplexity_increase: float | None = None


def static(k: int) -> Candidate:
    """The same k everywhere."""
    return Candidate("static", FixedPolicy(kind="fixed", k=k))


def default_k_values(full_k: int) -> list[int]:
    """A third, two thirds and all of the trained top-k, as in 2, 4, 6; for a top-2 model 1 and 2."""
    return sorted({max(1, round(full_k / 3)), max(1, round(2 * full_k / 3)), full_k} if full_k > 2 else {1, full_k})


def check_k_values(k_values: Sequence[int], full_k: int) -> list[int]:
    """Rising values of k, the trained top-k last.

    Raises:
        CalibrationError: they do not rise, or do not end with the trained top-k.
    """
    if not k_values or any(low >= high for low, high in itertools.pairwise(k_values)) or k_values[0] < 1:
        raise CalibrationError(f"the k values {list(k_values)} must rise from at least 1.")
    if k_values[-1] != full_k:
        raise CalibrationError(f"the k values {list(k_values)} must end with the model's trained top-k, {full_k}.")
    if len(k_values) < 2:
        raise CalibrationError(f"the model runs {full_k} expert for every token, so there is nothing to save.")
    return list(k_values)


# ----------------------------------------------------------------------------------------------------------
# Families: policies of one kind along one number, 0 (nothing saved) to 1 (everything that can be)
# ----------------------------------------------------------------------------------------------------------

Family = Callable[[float], Candidate]


def choices_at(entropies: npt.NDArray[np.float32], quantiles: Quantiles, k_values: Sequence[int]) -> EntropyChoices:
    """A rule whose thresholds lie at the given shares of some tokens' entropies.

    Args:
        entropies: sorted, nats.
        quantiles: shares of the tokens below each threshold, rising.
        k_values: one more than quantiles.
    """
    thresholds: list[float] = []
    ks: list[int] = []
    below = 0.0
    for quantile, k in zip(quantiles, k_values, strict=False):
        if quantile <= below:
            continue  # nobody is between two equal thresholds
        if quantile >= 1.0:
            return EntropyChoices(thresholds=thresholds, k=[*ks, k])
        limit = round(float(np.quantile(entropies, quantile)), DECIMALS)
        if not thresholds or limit > thresholds[-1]:
            thresholds.append(limit)
            ks.append(k)
        below = quantile
    return EntropyChoices(thresholds=thresholds, k=[*ks, k_values[-1]])


def shapes(num_choices: int) -> dict[str, Callable[[float], Quantiles]]:
    """Ways from "nothing saved" to "everything saved" for one rule with several thresholds."""
    count = num_choices - 1
    ways: dict[str, Callable[[float], Quantiles]] = {"extremes": lambda x: (x,) * count}
    if count > 1:
        ways["spread"] = lambda x: tuple(x ** (count - i) for i in range(count))
        ways["levels"] = lambda x: tuple(min(1.0, max(0.0, x * count - (count - 1 - i))) for i in range(count))
    return ways


def entropy_families(entropy: npt.NDArray[np.float32], k_values: Sequence[int]) -> list[Family]:
    """One rule for all layers; a family for each shape.

    Args:
        entropy: [W, n, L] the full model's, nats.
        k_values: rising.
    """
    pooled = np.sort(np.asarray(entropy), axis=None)

    def family(way: Callable[[float], Quantiles]) -> Family:
        def at(x: float) -> Candidate:
            rule = choices_at(pooled, way(x), k_values)
            return Candidate("entropy", EntropyPolicy(kind="entropy", thresholds=rule.thresholds, k=rule.k))

        return at

    return [family(way) for way in shapes(len(k_values)).values()]


def top_p_family(k_min: int) -> Family:
    """Probability mass, from 1 down to 0."""

    def at(x: float) -> Candidate:
        p = max(round(1.0 - x, DECIMALS + 2), 10.0 ** -(DECIMALS + 2))
        return Candidate("top_p", TopPPolicy(kind="top_p", p=p, k_min=k_min))

    return at


def ratio_family(k_min: int) -> Family:
    """Score against the best expert's, from 0 up to 1."""
    return lambda x: Candidate("ratio", RatioPolicy(kind="ratio", ratio=round(x, DECIMALS + 2), k_min=k_min))


def random_family(k_low: int, seed: int) -> Family:
    """The lowest k for a random share of the tokens."""
    return lambda x: Candidate("random", FixedPolicy(kind="fixed", k=k_low), share=round(x, DECIMALS + 2), seed=seed)


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


# ----------------------------------------------------------------------------------------------------------
# By layer
# ----------------------------------------------------------------------------------------------------------


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


class LayerPlan:
    """Step 2: the order in which layers and bands are taken.

    Args:
        damage: of step 1.
        entropy: [W, n, L] the full model's, nats.
        k_values: rising, the trained top-k last.
    """

    def __init__(self, damage: Damage, entropy: npt.NDArray[np.float32], k_values: Sequence[int]) -> None:
        self.k_values = list(k_values)
        self.num_layers = entropy.shape[-1]
        self._sorted = [np.sort(np.asarray(entropy[..., layer]), axis=None) for layer in range(self.num_layers)]
        self.segments = sorted(
            (segment for layer in range(self.num_layers) for segment in _hull_segments(damage, layer)),
            key=lambda segment: (segment.slope, segment.layer),
        )
        self._total = sum(segment.saved for segment in self.segments)

    def quantiles(self, x: float) -> list[Quantiles]:
        """Each layer's thresholds when a share x of all that can be saved is taken."""
        at: list[Quantiles] = [(0.0,) * (len(self.k_values) - 1)] * self.num_layers
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
        layers = {layer: choices_at(self._sorted[layer], at, self.k_values) for layer, at in enumerate(quantiles)}
        return Candidate("entropy_per_layer", EntropyPolicy(kind="entropy", layers=layers))

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


def _hull_segments(damage: Damage, layer: int) -> list[_Segment]:
    """The lower convex hull of a layer's options, from nothing saved on."""
    kl, saved = damage.kl[layer], damage.saved[layer]
    num_bands, num_lower = kl.shape
    options: list[tuple[float, float, tuple[int, ...]]] = []
    for edges in itertools.combinations_with_replacement(range(num_bands + 1), num_lower):
        cells = [(slice(begin, end), c) for c, (begin, end) in enumerate(itertools.pairwise((0, *edges)))]
        options.append(
            (
                float(sum(saved[bands, c].sum() for bands, c in cells)),
                float(sum(kl[bands, c].sum() for bands, c in cells)),
                edges,
            )
        )
    options.sort()
    hull: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, (0,) * num_lower)]
    for option in options:
        if option[0] <= hull[-1][0]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return [
        _Segment(
            _slope(a, b),
            layer,
            tuple(edge / num_bands for edge in a[2]),
            tuple(edge / num_bands for edge in b[2]),
            b[0] - a[0],
            b[1] - a[1],
        )
        for a, b in itertools.pairwise(hull)
    ]


def _slope(a: tuple[float, float, Any], b: tuple[float, float, Any]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def refine(
    laboratory: Laboratory, plan: LayerPlan, found: Measured, quantiles: list[Quantiles], budget: Budget, passes: int
) -> Measured:
    """Step 4: move single layers' thresholds by what the real model says.

    The score is damage plus a price for each expert run, the price being what the last savings cost, so that
    moves which save different amounts can be compared; the budget is met again at the end.

    Args:
        laboratory: measures.
        plan: turns thresholds into policies.
        found: the policy of steps 2 and 3.
        quantiles: its thresholds.
        budget: to meet.
        passes: most candidates to measure before the budget is met again.

    Returns:
        The better of the refined policy and `found`.
    """
    full_k = plan.k_values[-1]
    room = full_k - found.scores.avg_k
    if room <= 0 or passes < 1:
        return found
    # Damage grows about as the square of what is saved, so its slope is twice the mean cost.
    price = 2 * found.scores.mean_kl / room
    best, at = found, list(quantiles)
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
    """Each layer's k, from the full down to the lowest, one layer and one step at a time, cheapest first."""
    whole = damage.kl.sum(axis=1)  # [L, C]
    cost = np.concatenate([whole, np.zeros((len(whole), 1))], axis=1)
    level = [len(k_values) - 1] * len(whole)
    path = [[k_values[i] for i in level]]
    while any(level):
        _, layer = min(
            ((cost[at, i - 1] - cost[at, i]) / (k_values[i] - k_values[i - 1]), at) for at, i in enumerate(level) if i
        )
        level[layer] -= 1
        path.append([k_values[i] for i in level])
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
        k = _nearest_on_one_side(path, [float(np.mean(ks)) for ks in path], budget.avg_k, k_values[-1], at_least)
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
            trial = list(k)
            above, below = k_values.index(k[up]) + 1, k_values.index(k[down]) - 1
            if above >= len(k_values) or below < 0 or left <= 0:
                continue
            trial[up], trial[down] = k_values[above], k_values[below]
            if sum(trial) != sum(k):
                continue
            left -= 1
            measured = laboratory.measure(static_by_layer(trial))
            if measured.scores.mean_kl < best.scores.mean_kl:
                best, k, improved = measured, trial, True
                break
    return best


# ----------------------------------------------------------------------------------------------------------
# All kinds
# ----------------------------------------------------------------------------------------------------------


class Search:
    """Everything that is measured once for a text, and policies of any kind for any budget.

    Args:
        laboratory: measures.
        entropy: [W, n, L] the full model's entropies of its text, nats.
        k_values: rising, the trained top-k last.
        num_bands: bands in each layer.
        refine_passes: candidates that refining may measure.
    """

    def __init__(
        self,
        laboratory: Laboratory,
        entropy: npt.NDArray[np.float32],
        k_values: Sequence[int],
        *,
        num_bands: int = 6,
        refine_passes: int = 48,
    ) -> None:
        self.laboratory = laboratory
        self.k_values = check_k_values(k_values, laboratory.evaluator.full_k)
        self.damage = measure_damage(laboratory, entropy, self.k_values, num_bands)
        self.plan = LayerPlan(self.damage, entropy, self.k_values)
        self._entropy = entropy
        self._refine_passes = refine_passes

    def find(self, kind: Kind, budget: Budget, *, refined: bool = True) -> Measured:
        """A policy of one kind for a budget.

        Args:
            kind: how it decides.
            budget: what it may use.
            refined: spend the passes of step 4.

        Raises:
            CalibrationError: the budget is below what the kind can reach.
        """
        laboratory, lowest = self.laboratory, self.k_values[0]
        passes = self._refine_passes if refined else 0
        match kind:
            case "static":
                members = [laboratory.measure(static(k)) for k in range(1, self.k_values[-1] + 1)]
                return _static_within(members, budget, laboratory.full().scores.perplexity, self.k_values[-1])
            case "static_per_layer":
                return solve_static_by_layer(laboratory, self.damage, self.k_values, budget, passes)
            case "entropy_per_layer":
                found = solve(laboratory, self.plan.family(), budget)
                return refine(laboratory, self.plan, found, self._quantiles_of(found), budget, passes)
            case "entropy":
                families = entropy_families(self._entropy, self.k_values)
            case "top_p":
                families = [top_p_family(lowest)]
            case "ratio":
                families = [ratio_family(lowest)]
            case "random":
                families = [random_family(lowest, seed) for seed in range(1)]
        found_all = [solve(laboratory, family, budget) for family in families]
        return best_of(found_all, budget)

    def opponent(self, avg_k: float) -> Measured:
        """The best fixed k by layer with at least this average k: what an adaptive policy has to beat."""
        return solve_static_by_layer(
            self.laboratory, self.damage, self.k_values, Budget(avg_k=avg_k), self._refine_passes, at_least=True
        )

    def _quantiles_of(self, found: Measured) -> list[Quantiles]:
        """Where a policy's thresholds lie among the tokens, by looking the policy up along the plan."""
        assert isinstance(found.candidate.policy, EntropyPolicy)
        result: list[Quantiles] = []
        for layer in range(self.plan.num_layers):
            values = np.asarray(self._entropy[..., layer]).ravel()
            rule = found.candidate.policy.choices(layer, self.k_values[-1])
            below = [float((values < limit).mean()) for limit in rule.thresholds] + [1.0]
            pairs = list(zip(below, rule.k, strict=True))
            # For each lower k the share of tokens that run at most so many.
            at = [max((share for share, own in pairs if own <= k), default=0.0) for k in self.k_values[:-1]]
            result.append(tuple(at))
        return result


def best_of(found: Sequence[Measured], budget: Budget) -> Measured:
    """Least damage at a given average k; lowest average k at a given perplexity."""
    if budget.avg_k is not None:
        return min(found, key=lambda item: item.scores.mean_kl)
    return min(found, key=lambda item: item.scores.avg_k)


def _static_within(members: Sequence[Measured], budget: Budget, full_perplexity: float, full_k: int) -> Measured:
    if budget.avg_k is not None:
        averages = [item.scores.avg_k for item in members]
        return _nearest_on_one_side(members, averages, budget.avg_k, full_k, False)
    assert budget.perplexity_increase is not None
    limit = full_perplexity * (1 + budget.perplexity_increase)
    # Full k keeps any budget, so there is always one.
    return next(item for item in members if item.scores.perplexity <= limit or item is members[-1])


_T = TypeVar("_T")


def _nearest_on_one_side(items: Sequence[_T], averages: Sequence[float], wanted: float, full_k: int, above: bool) -> _T:
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
