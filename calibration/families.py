# SPDX-License-Identifier: Apache-2.0
"""Rules as numbers that a search can move, and families: policies of one kind along one number.

A family's number goes from 0 (nothing saved) to 1 (everything that can be). Where the routers' recording is there, the
numbers of a rule are shares of expert runs saved if routing stayed as the full model's, so a family is close to linear
in what it saves and a budget is met in two or three passes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from adaptive_k_moe.calibration.evaluator import Float64Array
from adaptive_k_moe.calibration.kinds import PER_LAYER, Kind
from adaptive_k_moe.calibration.laboratory import DECIMALS, Candidate
from adaptive_k_moe.calibration.routers import RouterRecording
from adaptive_k_moe.policy import ByLoadPolicy, EntropyChoices, EntropyPolicy, FixedPolicy, PhasesPolicy, Policy
from adaptive_k_moe.policy_kinds import KINDS

Family = Callable[[float], Candidate]

Rule = tuple[float, ...]
"""The numbers of one rule, as `Rules` of its kind read them."""

_POLICY: TypeAdapter[Policy] = TypeAdapter(Policy)
_SMALLEST = 10.0 ** -(DECIMALS + 2)


class Rules(ABC):
    """Rules of one kind: one for all layers, or one for each.

    Attributes:
        kind: what they make.
        count: rules in a policy, 1 or the number of MoE layers.
        lowest: the least k of any rule.
        full_k: the trained top-k, the largest.
    """

    def __init__(self, kind: Kind, count: int, lowest: int, full_k: int) -> None:
        self.kind = kind
        self.count = count
        self.lowest = lowest
        self.full_k = full_k

    @abstractmethod
    def candidate(self, rules: Sequence[Rule]) -> Candidate:
        """The policy with these rules, `count` of them."""

    @abstractmethod
    def rule_of(self, policy: Policy, place: int) -> Rule:
        """The rule, up to rounding, that a policy of a kind that this one contains follows in one place."""

    @abstractmethod
    def fixed(self, k: int) -> Rule:
        """The same k for every token."""

    @abstractmethod
    def between(self, start: Rule, end: Rule, part: float) -> Rule:
        """A rule on the way from one to another; `part` from 0 to 1."""

    @abstractmethod
    def toward(self, rule: Rule, k: int, part: float) -> Rule:
        """The rule part of the way to a fixed k, changed no more than that takes."""

    @abstractmethod
    def neighbours(self, rule: Rule, step: float) -> list[Rule]:
        """Rules that a small step leads to.

        Args:
            rule: to step from.
            step: share of the tokens, or of the droppable expert runs, that is decided anew.
        """

    def rules_of(self, policy: Policy) -> list[Rule]:
        """`rule_of` every place."""
        return [self.rule_of(policy, place) for place in range(self.count)]

    def through(self, rules: Sequence[Rule]) -> Family:
        """From nothing saved through the given rules (at one half) to everything saved."""

        def at(x: float) -> Candidate:
            if x <= 0.5:
                return self.candidate([self.toward(rule, self.full_k, 1 - 2 * x) for rule in rules])
            return self.candidate([self.toward(rule, self.lowest, 2 * x - 1) for rule in rules])

        return at


class EntropyRules(Rules):
    """Thresholds of entropy.

    A rule's numbers are the shares of the tokens that run at most k, for each k from the lowest to the one below the
    trained top-k; they rise.

    Args:
        entropy: [W, n, L] the full model's, nats.
        k_values: rising, the trained top-k last.
        by_layer: thresholds of each layer's own.
    """

    def __init__(self, entropy: npt.NDArray[np.float32], k_values: Sequence[int], *, by_layer: bool) -> None:
        parts = [entropy[..., layer] for layer in range(entropy.shape[-1])] if by_layer else [entropy]
        super().__init__("entropy_per_layer" if by_layer else "entropy", len(parts), k_values[0], k_values[-1])
        self.k_values = list(k_values)
        self._by_layer = by_layer
        self._entropies = [np.sort(np.asarray(part), axis=None) for part in parts]

    def at(self, shares: Sequence[float]) -> Rule:
        """The rule that uses `k_values` alone.

        Args:
            shares: of the tokens that run at most each of them, without the last; rising.
        """
        return tuple(shares[sum(value <= k for value in self.k_values) - 1] for k in range(self.lowest, self.full_k))

    def families(self) -> list[Family]:
        """The same rule everywhere; a family for each shape."""
        ways = shapes(len(self.k_values)).values()
        return [lambda x, way=way: self.candidate([self.at(way(x))] * self.count) for way in ways]  # type: ignore[misc]

    def candidate(self, rules: Sequence[Rule]) -> Candidate:
        """The policy with thresholds at these shares."""
        ks = range(self.lowest, self.full_k + 1)
        made = [choices_at(entropies, rule, ks) for entropies, rule in zip(self._entropies, rules, strict=True)]
        if self._by_layer:
            return Candidate(self.kind, EntropyPolicy(kind="entropy", layers=dict(enumerate(made))))
        return Candidate(self.kind, EntropyPolicy(kind="entropy", thresholds=made[0].thresholds, k=made[0].k))

    def rule_of(self, policy: Policy, place: int) -> Rule:
        """Shares of a fixed policy, or of one with thresholds."""
        if isinstance(policy, FixedPolicy):
            return self.fixed(policy.k)
        assert isinstance(policy, EntropyPolicy)
        choices, entropies = policy.choices(place, self.full_k), self._entropies[place]
        limits = np.array([*choices.thresholds, np.inf])
        below = np.searchsorted(entropies, limits) / len(entropies)
        ranges = range(self.lowest, self.full_k)
        return tuple(
            max((share for share, k in zip(below, choices.k, strict=True) if k <= most), default=0.0) for most in ranges
        )

    def fixed(self, k: int) -> Rule:
        """All tokens at k."""
        return tuple(float(k <= most) for most in range(self.lowest, self.full_k))

    def between(self, start: Rule, end: Rule, part: float) -> Rule:
        """Every share part of the way."""
        return tuple(a + part * (b - a) for a, b in zip(start, end, strict=True))

    def toward(self, rule: Rule, k: int, part: float) -> Rule:
        """As `between`."""
        return self.between(rule, self.fixed(k), part)

    def neighbours(self, rule: Rule, step: float) -> list[Rule]:
        """One share up or down. Of equal ones the outer one alone, and, unless nobody or everybody is there, all."""
        found: list[Rule] = []
        for share in sorted(set(rule)):
            first, end = rule.index(share), len(rule) - rule[::-1].index(share)
            up = min([share + step, 1.0, *rule[end:]])
            down = max([share - step, 0.0, *rule[:first]])
            found += [
                (*rule[: end - 1], up, *rule[end:]),
                (*rule[:first], down, *rule[first + 1 :]),
            ]
            if end - first > 1 and 0 < share < 1:
                found += [(*rule[:first], *(to,) * (end - first), *rule[end:]) for to in (up, down)]
        return [near for near in found if near != rule]


class OneNumberRules(Rules):
    """Rules of a kind with one number, and a smallest and a largest k.

    A rule is read as the mean k, the smallest, and the largest. Every expert between the two has a value of the kind's
    number at which it is dropped, and the number for a mean k is that quantile of the values.

    Args:
        kind: what the number is.
        routers: the full model's choices.
        lowest: experts that always run.
        by_layer: a rule for each layer.
    """

    def __init__(self, kind: Kind, routers: RouterRecording, lowest: int, *, by_layer: bool) -> None:
        layers, full_k = routers.scores.shape[-2:]
        super().__init__(PER_LAYER[kind] if by_layer else kind, layers if by_layer else 1, lowest, full_k)
        self._number_kind = kind
        self._routers = routers
        self._layers = [[layer] for layer in range(layers)] if by_layer else [list(range(layers))]
        self._by_layer = by_layer
        self._made: dict[tuple[int, Rule], dict[str, Any]] = {}

    def saving(self, share: float) -> Rule:
        """The rule that may drop every expert but the lowest k, and drops this share of them."""
        return _window(self.full_k - share * (self.full_k - self.lowest), self.lowest, self.full_k)

    def family(self) -> Family:
        """The same number everywhere, with every k from the lowest to the trained top-k."""
        return lambda x: self.candidate([self.saving(x)] * self.count)

    def candidate(self, rules: Sequence[Rule]) -> Candidate:
        """The policy with these mean, smallest and largest k."""
        made = [self._rule(place, rule) for place, rule in enumerate(rules)]
        content = {"layers": dict(enumerate(made))} if self._by_layer else made[0]
        return Candidate(self.kind, _POLICY.validate_python({"kind": self._number_kind, **content}))

    def rule_of(self, policy: Policy, place: int) -> Rule:
        """What a policy of this kind, or a fixed one, runs if routing stays as the full model's."""
        if isinstance(policy, FixedPolicy):
            return self.fixed(policy.k)
        if isinstance(policy, EntropyPolicy):
            return self.fixed(policy.choices(place, self.full_k).k[0])
        assert not isinstance(policy, PhasesPolicy | ByLoadPolicy)  # contained kinds alone come here
        rule = policy.choices(place, self.full_k)
        low, high = rule.k_min, rule.k_max or self.full_k
        if low == high:
            return self.fixed(low)
        values = self._dropped_at(place, low, high)
        dropped = values < rule.parameter if _keeps_from_below(self._number_kind) else values >= rule.parameter
        return _window(high - float(dropped.mean()) * (high - low), low, high)

    def fixed(self, k: int) -> Rule:
        """Mean, smallest and largest are one."""
        return (float(k),) * 3

    def between(self, start: Rule, end: Rule, part: float) -> Rule:
        """The mean part of the way, with every k that either rule may run."""
        if part <= 0 or part >= 1:
            return start if part <= 0 else end
        return _window(start[0] + part * (end[0] - start[0]), min(start[1], end[1]), max(start[2], end[2]))

    def toward(self, rule: Rule, k: int, part: float) -> Rule:
        """The mean part of the way; the smallest and the largest k as far as it takes."""
        return _widened(rule[0] + part * (k - rule[0]), rule[1], rule[2])

    def neighbours(self, rule: Rule, step: float) -> list[Rule]:
        """The mean up or down; the smallest or largest k one up or down at the same mean, of a fixed k both."""
        mean, low, high = rule
        by = step * max(high - low, 1.0)
        means = [max(mean - by, float(self.lowest)), min(mean + by, float(self.full_k))]
        ends = [(low - 1, high), (low, high + 1), (low + 1, high), (low, high - 1)]
        if low == high:
            ends = [(low - 1, high + 1)]
        return [_widened(value, low, high) for value in means] + [
            (mean, start, end) for start, end in ends if self.lowest <= start < mean < end <= self.full_k
        ]

    def _rule(self, place: int, rule: Rule) -> dict[str, Any]:
        """As in a policy file."""
        if (place, rule) not in self._made:
            mean, low, high = rule[0], int(rule[1]), int(rule[2])
            if low == high:
                number = KINDS[self._number_kind].keeps_all
            else:
                kept = (mean - low) / (high - low)
                values = self._dropped_at(place, low, high)
                number = float(np.quantile(values, 1 - kept if _keeps_from_below(self._number_kind) else kept))
            made = {**_number(self._number_kind, number), "k_min": low}
            if high < self.full_k:
                made["k_max"] = high
            self._made[place, rule] = made
        return self._made[place, rule]

    def _dropped_at(self, place: int, low: int, high: int) -> npt.NDArray[np.float32]:
        """The number at which each expert beyond `low` goes, of those up to `high`."""
        return np.concatenate([self._dropped_in(layer, low, high) for layer in self._layers[place]], axis=None)

    def _dropped_in(self, layer: int, low: int, high: int) -> npt.NDArray[np.float32]:
        """[W, n, high - low] of one layer."""
        values = DROPPED_AT[self._number_kind](self._routers, layer, high)
        dropped: npt.NDArray[np.float32] = values[..., low:high].astype(np.float32)
        return dropped


def _dropped_by_ratio(routers: RouterRecording, layer: int, high: int) -> Float64Array:  # noqa: ARG001 (as all)
    # By score, which a correction bias does not follow.
    by_size = -np.sort(-_scores(routers, layer), axis=-1)
    ratios: Float64Array = by_size / by_size[..., :1]
    return ratios


def _dropped_by_mass(routers: RouterRecording, layer: int, high: int) -> Float64Array:  # noqa: ARG001 (as all)
    scores = _scores(routers, layer)
    return (np.cumsum(scores, axis=-1) - scores) / routers.total[:, :, layer, None]


def _dropped_by_contribution(routers: RouterRecording, layer: int, high: int) -> Float64Array:
    weighed = _scores(routers, layer) * routers.norms[layer][routers.experts[:, :, layer]]
    shares: Float64Array = (np.cumsum(weighed, axis=-1) - weighed) / weighed[..., :high].sum(axis=-1, keepdims=True)
    return shares


DROPPED_AT: dict[Kind, Callable[[RouterRecording, int, int], Float64Array]] = {
    "ratio": _dropped_by_ratio,
    "top_p": _dropped_by_mass,
    "contribution": _dropped_by_contribution,
}
"""For each kind with one number: [W, n, K], its value at which each expert of a layer is dropped, if `high` may run."""


def _scores(routers: RouterRecording, layer: int) -> Float64Array:
    """[W, n, K] of one layer."""
    return np.asarray(routers.scores[:, :, layer], np.float64)


def _keeps_from_below(kind: Kind) -> bool:
    """Whether the experts whose value lies below the number are dropped, and not those that reach it."""
    return KINDS[kind].keeps_all == 0


def _number(kind: Kind, number: float) -> dict[str, Any]:
    """A kind's number as in a policy file; a share is above 0."""
    rounded = round(number, DECIMALS + 2)
    return {str(KINDS[kind].parameter): rounded if _keeps_from_below(kind) else max(_SMALLEST, rounded)}


def _window(mean: float, low: float, high: float) -> Rule:
    """A rule of `OneNumberRules`; a fixed k where the mean is an end."""
    if mean <= low or mean >= high:
        return (low if mean <= low else high,) * 3
    return (mean, low, high)


def _widened(mean: float, low: float, high: float) -> Rule:
    """A rule of `OneNumberRules` whose window holds the mean."""
    return _window(mean, min(low, float(math.floor(mean))), max(high, float(math.ceil(mean))))


def choices_at(entropies: npt.NDArray[np.float32], quantiles: Rule, k_values: Sequence[int]) -> EntropyChoices:
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


def shapes(num_choices: int) -> dict[str, Callable[[float], Rule]]:
    """Ways from "nothing saved" to "everything saved" for one rule with several thresholds."""
    count = num_choices - 1
    ways: dict[str, Callable[[float], Rule]] = {"extremes": lambda x: (x,) * count}
    if count > 1:
        ways["spread"] = lambda x: tuple(x ** (count - i) for i in range(count))
        ways["levels"] = lambda x: tuple(min(1.0, max(0.0, x * count - (count - 1 - i))) for i in range(count))
    return ways


def plain_family(kind: Kind, k_min: int) -> Family:
    """A kind with one number without the routers' recording: its number from one end to the other."""

    def at(x: float) -> Candidate:
        number = abs(KINDS[kind].keeps_all - x)
        return Candidate(kind, _POLICY.validate_python({"kind": kind, **_number(kind, number), "k_min": k_min}))

    return at


def random_family(k_low: int, seed: int) -> Family:
    """The lowest k for a random share of the tokens."""
    return lambda x: Candidate("random", FixedPolicy(kind="fixed", k=k_low), share=round(x, DECIMALS + 2), seed=seed)
