# SPDX-License-Identifier: Apache-2.0
"""Finds a policy of each kind for a budget, by running the model.

Damage is the mean KL divergence of the next-token prediction from the full model's. It measures the same
thing as a rise in perplexity, with far less noise: it is zero for the full model at every token, so no
luck of the text enters.

The method for thresholds by layer:

1. Measure. Each layer's tokens are cut into bands of equal size by their entropy in the full model's recording;
   for each layer, band and k, one pass over the text runs only those tokens at that k.
2. Fill. A layer's thresholds are a set of band edges; its options are points (experts saved, damage), and
   only their lower convex hull can be best. The hulls' segments of all layers, ordered by damage for each expert
   saved, are taken until the budget is full; the last one in part. If damages only added up, this would be
   optimal.
3. Correct. Dropping experts in one layer changes the next, so the measured average k is not the predicted
   one: the budget given to step 2 is corrected until the measured average meets the target.
4. Refine. The best so far is what step 3 found, or what was found of a kind that this one contains (one rule for all
   layers, a fixed k by layer) if that does less damage. Single layers' rules are moved from there and the real model
   decides, then step sizes halve. So no kind does more damage on the text than a kind it contains.

Kinds whose rule is one number (top-p, ratio, contribution), with a smallest and a largest k, are treated by layer in
the same way: the options of step 2 are every fixed k, and the number at some shares of a layer's expert runs saved,
which step 1 measures with the other layers in full.

One rule for all layers is the same with all layers as one; for thresholds of entropy step 3 tries shapes instead of
step 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.calibration.by_layer import (
    FillingOrder,
    entropy_order,
    measure_damage,
    nearest_on_one_side,
    one_number_order,
    refine,
    solve_static_by_layer,
)
from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.calibration.families import (
    EntropyRules,
    Family,
    OneNumberRules,
    Rules,
    plain_family,
    random_family,
)
from adaptive_k_moe.calibration.kinds import CONTAINS, PER_LAYER, ROUTER_KINDS, Kind
from adaptive_k_moe.calibration.laboratory import Budget, Laboratory, Measured, static
from adaptive_k_moe.calibration.routers import RouterRecording
from adaptive_k_moe.calibration.solve import best_of, keeps, solve
from adaptive_k_moe.policy_kinds import ONE_NUMBER


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


class Search:
    """Everything that is measured once for a text, and policies of any kind for any budget.

    Args:
        laboratory: measures.
        entropy: [W, n, L] the full model's entropies of its text, nats.
        k_values: rising, the trained top-k last.
        routers: the full model's choices; None leaves `ROUTER_KINDS` out.
        num_bands: bands in each layer.
        refine_passes: candidates that refining may measure.
    """

    def __init__(
        self,
        laboratory: Laboratory,
        entropy: npt.NDArray[np.float32],
        k_values: Sequence[int],
        *,
        routers: RouterRecording | None = None,
        num_bands: int = 6,
        refine_passes: int = 48,
    ) -> None:
        self.laboratory = laboratory
        self.k_values = check_k_values(k_values, laboratory.evaluator.full_k)
        self.damage = measure_damage(laboratory, entropy, self.k_values, num_bands)
        self._entropy = entropy
        self._routers = routers
        self._refine_passes = refine_passes
        self._rules: dict[Kind, Rules | None] = {}
        self._orders: dict[Kind, FillingOrder] = {}
        self._found: dict[tuple[Kind, Budget, bool], Measured] = {}

    def find(self, kind: Kind, budget: Budget, *, refined: bool = True) -> Measured:
        """A policy of one kind for a budget; on this text no worse than what is found of any kind it `CONTAINS`.

        Args:
            kind: how it decides.
            budget: what it may use.
            refined: spend the passes of step 4.

        Raises:
            CalibrationError: the budget is below what the kind can reach.
        """
        asked = (kind, budget, refined)
        if asked not in self._found:
            self._rules_of(kind)  # or tells at once that there are none
            contained = [self.find(inner, budget, refined=refined) for inner in CONTAINS.get(kind, ())]
            best = self._best(kind, budget, contained, self._refine_passes if refined else 0)
            self._found[asked] = replace(best, candidate=replace(best.candidate, kind=kind))
        return self._found[asked]

    def _best(self, kind: Kind, budget: Budget, contained: Sequence[Measured], passes: int) -> Measured:
        laboratory = self.laboratory
        if kind == "static":
            members = [laboratory.measure(static(k)) for k in range(self.k_values[0], self.k_values[-1] + 1)]
            return _static_within(laboratory, members, budget)
        if kind == "static_per_layer":
            fixed = solve_static_by_layer(laboratory, self.damage, self.k_values, budget, passes)
            return best_of([fixed, *contained], budget)
        found = [solve(laboratory, family, budget) for family in self._families(kind)]
        rules = self._rules_of(kind)
        if rules is None:
            return best_of([*found, *contained], budget)
        # What the contained kinds say, in the words of this one.
        said = [laboratory.measure(rules.candidate(rules.rules_of(inner.candidate.policy))) for inner in contained]
        found += [same for same in said if keeps(laboratory, same, budget)]
        return refine(laboratory, rules, best_of([*found, *contained], budget), budget, passes)

    def opponent(self, avg_k: float) -> Measured:
        """The best fixed k by layer with at least this average k: what an adaptive policy has to beat."""
        return solve_static_by_layer(
            self.laboratory, self.damage, self.k_values, Budget(avg_k=avg_k), self._refine_passes, at_least=True
        )

    def order(self, kind: Kind) -> FillingOrder:
        """Steps 1 and 2 of a kind, made once."""
        if kind not in self._orders:
            rules = self._rules_of(kind)
            if isinstance(rules, EntropyRules):
                made = entropy_order(self.damage, rules)
            else:
                assert isinstance(rules, OneNumberRules)
                made = one_number_order(self.laboratory, self.damage, rules, self.k_values)
            self._orders[kind] = made
        return self._orders[kind]

    def _families(self, kind: Kind) -> list[Family]:
        """Where the search of an adaptive kind, or of the control, looks first."""
        rules = self._rules_of(kind)
        if isinstance(rules, OneNumberRules) and rules.count == 1:
            return [rules.family(), self.order(kind).family()]
        if isinstance(rules, EntropyRules) and rules.count == 1:
            return rules.families()
        if rules is not None:
            return [self.order(kind).family()]
        lowest = self.k_values[0]
        return [random_family(lowest, seed=0) if kind == "random" else plain_family(kind, lowest)]

    def _rules_of(self, kind: Kind) -> Rules | None:
        """What can be moved in a kind's policies; None for the control, and where that takes the routers' recording."""
        if kind not in self._rules:
            self._rules[kind] = self._make_rules(kind)
        return self._rules[kind]

    def _make_rules(self, kind: Kind) -> Rules | None:
        if kind in ("entropy", PER_LAYER["entropy"]):
            return EntropyRules(self._entropy, self.k_values, by_layer=kind != "entropy")
        one = next((one for one in ONE_NUMBER if kind in (one, PER_LAYER[one])), None)
        if one is not None and self._routers is not None:
            return OneNumberRules(one, self._routers, self.k_values[0], by_layer=kind != one)
        if kind in ROUTER_KINDS:
            raise CalibrationError(f"{kind} rules by layer, and contribution, need the routers' recording.")
        return None


def _static_within(laboratory: Laboratory, members: Sequence[Measured], budget: Budget) -> Measured:
    """The one of rising k that uses a budget up."""
    if budget.avg_k is not None:
        averages = [item.scores.avg_k for item in members]
        return nearest_on_one_side(members, averages, budget.avg_k, laboratory.evaluator.full_k, False)
    # Full k keeps any budget, so there is always one.
    return next(item for item in members if item is members[-1] or keeps(laboratory, item, budget))
