# SPDX-License-Identifier: Apache-2.0
"""The search alone, on measurements that follow a formula; no engine."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from adaptive_k_moe.calibration.by_layer import Damage, entropy_order, static_path
from adaptive_k_moe.calibration.calibrate import check_budget
from adaptive_k_moe.calibration.commands.calibrate import add_arguments
from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.calibration.evaluator import Scores
from adaptive_k_moe.calibration.families import EntropyRules, OneNumberRules, choices_at, shapes
from adaptive_k_moe.calibration.kinds import ADAPTIVE_KINDS, CURVE_KINDS, STATIC_KINDS
from adaptive_k_moe.calibration.laboratory import Budget, Candidate, Measured, static
from adaptive_k_moe.calibration.routers import RouterRecording
from adaptive_k_moe.calibration.search import Search, check_k_values, default_k_values
from adaptive_k_moe.calibration.solve import solve
from adaptive_k_moe.policy import EntropyPolicy, FixedPolicy, Policy, RatioPolicy

LAYERS, FULL_K = 3, 2
# A layer's damage for each token that runs one expert, and how it rises with the token's entropy.
WEIGHT = np.array([0.02, 0.2, 0.05])
STEEPNESS = np.array([1.0, 2.0, 0.0])


class FormulaLaboratory:
    """Tokens with random entropies; a token's damage in a layer is WEIGHT * entropy ** STEEPNESS, all added up."""

    def __init__(self, num_windows: int = 8, n: int = 200) -> None:
        rng = np.random.default_rng(0)
        self.entropy = rng.uniform(0.0, 2.0, size=(num_windows, n, LAYERS)).astype(np.float32)
        self.evaluator = SimpleNamespace(full_k=FULL_K)
        self.passes = 0

    def k(self, policy: Policy) -> np.ndarray:
        if isinstance(policy, FixedPolicy):
            return np.full(self.entropy.shape, policy.k)
        assert isinstance(policy, EntropyPolicy)
        k = np.empty(self.entropy.shape, np.int64)
        for layer in range(LAYERS):
            rule = policy.choices(layer, FULL_K)
            k[..., layer] = np.array(rule.k)[np.searchsorted(rule.thresholds, self.entropy[..., layer], side="right")]
        return k

    def measure(self, candidate: Candidate) -> Measured:
        self.passes += 1
        k = self.k(candidate.policy)
        damage = ((k < FULL_K) * WEIGHT * self.entropy.astype(np.float64) ** STEEPNESS).sum(axis=-1).mean(axis=1)
        return Measured(candidate, Scores(3.0 + damage, damage, np.ones(len(k)), k.mean(axis=1)))

    def full(self) -> Measured:
        return self.measure(static(FULL_K))


def test_the_command_names_every_kind_that_can_be_found() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    required = ["--engine_dir", "e", "--text", "t", "--target_avg_k", "1", "--output", "o"]
    named = parser.parse_args([*required, "--policy_kind", *ADAPTIVE_KINDS, *STATIC_KINDS]).policy_kind
    assert (*ADAPTIVE_KINDS, *STATIC_KINDS) == tuple(named)
    pairs = ("static", "entropy", "top_p", "ratio", "contribution")
    assert {*named, "random"} == {"random", *pairs, *(f"{kind}_per_layer" for kind in pairs)} == set(CURVE_KINDS)


@pytest.fixture
def laboratory() -> Any:
    return FormulaLaboratory()


@pytest.fixture
def search(laboratory: Any) -> Search:
    return Search(laboratory, laboratory.entropy, [1, 2], num_bands=6, refine_passes=24)


@pytest.mark.parametrize("target", [1.2, 1.5, 1.8])
@pytest.mark.parametrize("kind", ["entropy", "entropy_per_layer"])
def test_an_average_k_is_met(search: Search, kind: Any, target: float) -> None:
    found = search.find(kind, Budget(avg_k=target))
    assert found.scores.avg_k == pytest.approx(target, abs=0.004 * FULL_K)
    assert found.scores.avg_k <= target + 0.001 * FULL_K + 1e-9


def test_thresholds_by_layer_are_close_to_the_best_there_are(search: Search, laboratory: Any) -> None:
    # Damage adds up here, so the best tokens to drop are those with the least damage; no rule does better.
    target = 4 / 3
    each = np.sort((WEIGHT * laboratory.entropy.astype(np.float64) ** STEEPNESS).ravel())
    dropped = round((FULL_K - target) * each.size)
    bound = each[:dropped].sum() / (laboratory.entropy.shape[0] * laboratory.entropy.shape[1])
    found = search.find("entropy_per_layer", Budget(avg_k=target))
    assert found.scores.mean_kl <= 1.1 * bound
    assert found.scores.mean_kl < search.find("entropy", Budget(avg_k=target)).scores.mean_kl
    assert found.scores.mean_kl < search.find("static_per_layer", Budget(avg_k=target)).scores.mean_kl


class RatioLaboratory(FormulaLaboratory):
    """The second expert's damage is its share of the score, times its layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        ratio = np.random.default_rng(4).uniform(0.0, 1.0, self.entropy.shape)
        scores = np.stack([1 / (1 + ratio), ratio / (1 + ratio)], axis=-1).astype(np.float32)
        experts = np.zeros(scores.shape, np.int32) + np.arange(2, dtype=np.int32)
        self.routers = RouterRecording(scores, experts, scores.sum(-1), np.ones((LAYERS, 2)))
        self.ratio = scores[..., 1] / scores[..., 0]

    def k(self, policy: Policy) -> np.ndarray:
        if isinstance(policy, RatioPolicy):
            rules = [policy.choices(layer, FULL_K) for layer in range(LAYERS)]
            limits, least = (np.array([getattr(rule, name) for rule in rules]) for name in ("ratio", "k_min"))
            return np.clip(1 + (self.ratio >= limits), least, [rule.k_max or FULL_K for rule in rules])
        return super().k(policy)

    def measure(self, candidate: Candidate) -> Measured:
        k = self.k(candidate.policy)
        damage = ((k < FULL_K) * WEIGHT * self.ratio**2).sum(axis=-1).mean(axis=1)
        self.passes += 1
        return Measured(candidate, Scores(3.0 + damage, damage, np.ones(len(k)), k.mean(axis=1)))


@pytest.mark.parametrize("target", [1.2, 1.5, 1.8])
def test_one_number_by_layer_is_close_to_the_best_there_is_and_soon_found(target: float) -> None:
    laboratory: Any = RatioLaboratory()
    search = Search(laboratory, laboratory.entropy, [1, 2], routers=laboratory.routers, num_bands=2, refine_passes=36)
    budget = Budget(avg_k=target)
    before = laboratory.passes
    one = solve(laboratory, OneNumberRules("ratio", laboratory.routers, 1, by_layer=False).family(), budget)
    # The share is what is saved here, so the first guess meets the budget (and full and last are measured).
    assert laboratory.passes - before <= 6
    by_layer = search.find("ratio_per_layer", budget)
    for found in (one, by_layer):
        assert found.scores.avg_k == pytest.approx(target, abs=0.004 * FULL_K)
    costs = np.sort((WEIGHT * laboratory.ratio.astype(np.float64) ** 2).ravel())
    bound = costs[: round((FULL_K - target) * costs.size)].sum() / (costs.size / LAYERS)
    assert by_layer.scores.mean_kl <= 1.1 * bound
    assert by_layer.scores.mean_kl < one.scores.mean_kl
    assert isinstance(by_layer.candidate.policy, RatioPolicy) and len(by_layer.candidate.policy.layers) == LAYERS


@pytest.mark.parametrize("kind", ["contribution", "top_p_per_layer", "ratio_per_layer", "contribution_per_layer"])
def test_kinds_that_need_the_routers_say_so(search: Search, kind: Any) -> None:
    with pytest.raises(CalibrationError, match="need the routers' recording"):
        search.find(kind, Budget(avg_k=1.5))


@pytest.mark.parametrize("kind", ["entropy_per_layer", "entropy"])
def test_a_budget_of_everything_is_the_full_model(search: Search, kind: Any) -> None:
    assert search.find(kind, Budget(avg_k=float(FULL_K))).scores.avg_k == FULL_K


def test_a_rise_of_perplexity_is_used_up_and_not_passed(search: Search, laboratory: Any) -> None:
    full = laboratory.full().scores.perplexity
    for kind in ("entropy", "entropy_per_layer"):
        found = search.find(kind, Budget(perplexity_increase=0.02))
        assert found.scores.perplexity / full - 1 <= 0.02
        assert found.scores.perplexity / full - 1 > 0.015


def test_static_layers_are_dropped_cheapest_first() -> None:
    kl = np.array([[[0.3]], [[0.1]], [[0.2]]])
    damage = Damage(np.empty((3, 0)), kl, np.full((3, 1, 1), 1 / 3))
    assert static_path(damage, [1, 2]) == [[2, 2, 2], [2, 1, 2], [2, 1, 1], [1, 1, 1]]


def test_static_layers_may_have_a_k_that_was_not_measured() -> None:
    kl = np.array([[[0.4, 0.1]], [[0.9, 0.32]]])  # at k of 1 and 3, of a top-5 model
    damage = Damage(np.empty((2, 0)), kl, np.full((2, 1, 2), 1 / 2))
    path = static_path(damage, [1, 3, 5])
    assert path == [[5, 5], [4, 5], [3, 5], [2, 5], [1, 5], [1, 4], [1, 3], [1, 2], [1, 1]]


def test_static_by_layer_finds_the_cheapest_pair(search: Search) -> None:
    found = search.find("static_per_layer", Budget(avg_k=4 / 3))
    # Layer 1 costs most by far (0.2 times a mean square of 4/3), so it alone stays full.
    assert found.scores.k.mean(axis=0).tolist() == [1, 2, 1]


def test_an_opponent_never_has_fewer_experts_and_a_candidate_never_more(search: Search) -> None:
    for target in (1.2, 4 / 3, 1.4, 1.5, 1.66, 1.9):
        assert search.opponent(target).scores.avg_k >= target - 0.01
        assert search.find("static_per_layer", Budget(avg_k=target)).scores.avg_k <= target + 0.01
        assert search.find("static", Budget(avg_k=target)).scores.avg_k == 1
    assert search.opponent(1.4).scores.avg_k == pytest.approx(5 / 3)


def test_the_filling_order_takes_thresholds_up_never_down(search: Search) -> None:
    before = [(0.0,)] * LAYERS
    for x in np.linspace(0, 1, 23):
        now = search.order("entropy_per_layer").rules_at(float(x))
        assert all(new >= old for new, old in zip(now, before, strict=True))
        before = now
    assert before == [(1.0,)] * LAYERS


@pytest.mark.parametrize("num_choices", [2, 3, 4])
def test_shapes_go_from_nothing_to_everything_and_rise(num_choices: int) -> None:
    for way in shapes(num_choices).values():
        assert way(0.0) == (0.0,) * (num_choices - 1)
        assert way(1.0) == (1.0,) * (num_choices - 1)
        for x in np.linspace(0, 1, 17):
            assert list(way(x)) == sorted(way(x))


def test_choices_lie_at_their_quantiles() -> None:
    entropies = np.linspace(0, 1, 101).astype(np.float32)
    assert choices_at(entropies, (0.2, 0.6), [2, 4, 6]).thresholds == [0.2, 0.6]
    assert choices_at(entropies, (0.0, 0.6), [2, 4, 6]).k == [4, 6]
    assert choices_at(entropies, (0.6, 0.6), [2, 4, 6]).k == [2, 6]
    assert choices_at(entropies, (0.0, 0.0), [2, 4, 6]).k == [6]
    assert choices_at(entropies, (0.3, 1.0), [2, 4, 6]).k == [2, 4]
    assert choices_at(entropies, (1.0, 1.0), [2, 4, 6]).k == [2]


def test_three_values_of_k_by_layer() -> None:
    rng = np.random.default_rng(2)
    entropy = rng.uniform(0, 3, size=(4, 50, 2)).astype(np.float32)
    kl = np.cumsum(rng.uniform(0.01, 0.1, size=(2, 5, 2))[..., ::-1], axis=-1)[..., ::-1]
    saved = np.broadcast_to(np.array([4, 2]) / 10, (2, 5, 2))
    order = entropy_order(Damage(np.empty((2, 4)), kl, saved), EntropyRules(entropy, [2, 4, 6], by_layer=True))
    slopes = [segment.slope for segment in order.segments]
    assert slopes == sorted(slopes)
    for x in np.linspace(0, 1, 9):
        policy = order.family()(float(x)).policy
        assert isinstance(policy, EntropyPolicy)
        for layer in range(2):
            rule = policy.choices(layer, 6)
            assert rule.k == sorted(rule.k) and set(rule.k) <= {2, 4, 6}


def test_equal_policies_are_one_candidate_however_they_were_made() -> None:
    assert static(1).key() == Candidate("top_p", FixedPolicy(kind="fixed", k=1)).key()
    assert static(1).key() != Candidate("random", FixedPolicy(kind="fixed", k=1), share=0.5).key()


def test_default_k_values() -> None:
    assert [default_k_values(k) for k in (2, 4, 6, 8)] == [[1, 2], [1, 3, 4], [2, 4, 6], [3, 5, 8]]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: check_k_values([2, 1], 2), r"the k values \[2, 1\] must rise"),
        (lambda: check_k_values([1, 2, 4], 2), "must end with the model's trained top-k, 2"),
        (lambda: check_k_values([1], 1), "nothing to save"),
        (lambda: check_budget(Budget(), 2), "give one budget"),
        (lambda: check_budget(Budget(avg_k=1.5, perplexity_increase=0.1), 2), "give one budget"),
        (lambda: check_budget(Budget(avg_k=0.5), 2), "an average k of 0.5 is no budget"),
        (lambda: check_budget(Budget(perplexity_increase=-0.1), 2), "in per cent"),
    ],
)
def test_unusable_numbers_are_one_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(CalibrationError, match=sentence) as caught:
        call()
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("target", [1.5, 3.0, 4.4, 4.55, 4.601, 4.7, 5.9])
def test_a_bend_in_what_a_family_saves_costs_few_passes(target: float) -> None:
    def measure(x: Any) -> Any:
        # Up to one half little is saved, then much, as where a refined policy meets its budget again.
        avg_k = 6 - 2.8 * min(x, 0.5) - 7.2 * max(x - 0.5, 0.0) ** 0.7 * 0.5**0.3
        seen.append(x)
        return Measured(x, Scores(np.full(1, 3.0), np.full(1, x), np.ones(1), np.full((1, 1), avg_k)))

    seen: list[float] = []
    laboratory: Any = SimpleNamespace(evaluator=SimpleNamespace(full_k=6), measure=measure, full=lambda: measure(0.0))
    found = solve(laboratory, lambda x: x, Budget(avg_k=target))  # type: ignore[arg-type,return-value]
    assert target - 0.012 <= found.scores.avg_k <= target + 0.002
    assert len(seen) <= 2 + 10


def test_an_average_below_a_kinds_reach_is_refused(laboratory: Any) -> None:
    with pytest.raises(CalibrationError, match=r"an average k of 1\.2 cannot be reached"):
        solve(laboratory, lambda _x: static(2), Budget(avg_k=1.2))
