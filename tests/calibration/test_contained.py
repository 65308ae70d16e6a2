# SPDX-License-Identifier: Apache-2.0
"""On the text that is fitted, no kind of policy does more damage than a kind that it contains."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_k_moe.calibration.calibrate import _laboratory, _routers
from adaptive_k_moe.calibration.evaluator import Evaluator, Scores
from adaptive_k_moe.calibration.families import EntropyRules
from adaptive_k_moe.calibration.kinds import ADAPTIVE_KINDS, CONTAINS, STATIC_KINDS
from adaptive_k_moe.calibration.laboratory import Budget, Candidate, Measured, static
from adaptive_k_moe.calibration.routers import RouterRecording
from adaptive_k_moe.calibration.search import Search
from adaptive_k_moe.calibration.solve import keeps
from adaptive_k_moe.calibration.windows import Windows
from adaptive_k_moe.plugin import route
from adaptive_k_moe.policy import EntropyPolicy, FixedPolicy, PolicySet, RatioPolicy, TopPPolicy, compile_policies

EXPERTS, FULL_K, LAYERS = 8, 4, 3


class RoutedLaboratory:
    """Random routers, each policy's k by the operator; an expert that does not run does damage.

    What an expert's absence costs grows as a power of its share of the scores: at 0 only the count matters, so a fixed
    k is best, at 2 nearly only the scores. What layers do adds up to more than its parts.
    """

    def __init__(self, seed: int, power: float, n: int = 40) -> None:
        rng = np.random.default_rng(seed)
        self.logits = (rng.standard_normal((2, n, LAYERS, EXPERTS)) * [[0.7], [1.5], [3.0]]).astype(np.float32)
        shares = np.exp(self.logits) / np.exp(self.logits).sum(-1, keepdims=True)
        experts = np.argsort(-self.logits, axis=-1, kind="stable")[..., :FULL_K].astype(np.int32)
        scores = np.take_along_axis(shares, experts, -1)
        self.norms = rng.uniform(0.3, 2.0, (LAYERS, EXPERTS))
        self.norms /= self.norms.mean(axis=1, keepdims=True)
        total = shares.sum(-1).astype(np.float32)
        self.routers = RouterRecording(scores.astype(np.float32), experts, total, self.norms)
        self.entropy = -(shares * np.log(shares)).sum(-1).astype(np.float32)
        # [W, n, L, K + 1] damage of a token that runs k experts: each missing one costs more than the last.
        cost = scores**power * rng.uniform(0.5, 1.5, (LAYERS, 1)) * np.arange(FULL_K, 0, -1)
        missing = np.cumsum(cost[..., ::-1], axis=-1)[..., ::-1]
        self.damage = np.concatenate([missing, np.zeros_like(missing[..., :1])], axis=-1)
        self.noise = rng.uniform(0.5, 1.5, (2, n))
        self.evaluator = SimpleNamespace(full_k=FULL_K)

    def measure(self, candidate: Candidate) -> Measured:
        policies = PolicySet(policies={"candidate": candidate.policy}, expert_norms=self.norms.tolist())
        model = {"num_experts": EXPERTS, "num_experts_per_tok": FULL_K, "num_moe_layers": LAYERS}
        tables = compile_policies(policies.for_model(**model), **model)
        tokens = self.logits[..., 0, 0].size
        k = np.stack(
            [
                route(
                    self.logits[:, :, layer].reshape(tokens, EXPERTS),
                    np.full(tokens, tables.index("candidate"), np.int32),
                    tables.policy_kind,
                    tables.thresholds[layer],
                    tables.k_values[layer],
                    expert_norms=tables.expert_norms[layer],
                ).k
                for layer in range(LAYERS)
            ],
            axis=-1,
        ).reshape(self.entropy.shape)
        done = np.take_along_axis(self.damage, k[..., None].astype(np.int64), -1)[..., 0].sum(-1) ** 1.2 / 20
        nll = 3.0 + (done * self.noise).mean(axis=1)
        return Measured(candidate, Scores(nll, done.mean(axis=1), np.ones(2), k.mean(axis=1)))

    def full(self) -> Measured:
        return self.measure(static(FULL_K))


def check(search: Search, budget: Budget) -> None:
    """Every kind keeps the budget, and does no worse than what it contains."""
    found = {kind: search.find(kind, budget) for kind in (*STATIC_KINDS, *ADAPTIVE_KINDS)}
    for kind, best in found.items():
        assert best.candidate.kind == kind
        assert keeps(search.laboratory, best, budget)
        assert search.laboratory.measure(best.candidate).scores.mean_kl == best.scores.mean_kl
        for inner in CONTAINS.get(kind, ()):
            if budget.avg_k is not None:
                assert best.scores.mean_kl <= found[inner].scores.mean_kl, (kind, inner)
            else:
                assert best.scores.avg_k <= found[inner].scores.avg_k, (kind, inner)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 99),
    power=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    k_values=st.sampled_from([[1, 2, 3, 4], [1, 4], [2, 3, 4], [1, 3, 4]]),
    budget=st.one_of(
        st.floats(2.0, 4.0).map(lambda k: Budget(avg_k=k)), st.floats(0.0, 0.3).map(lambda p: Budget(None, p))
    ),
    passes=st.sampled_from([0, 7, 30]),
)
def test_no_kind_is_worse_than_one_it_contains(
    seed: int, power: float, k_values: list[int], budget: Budget, passes: int
) -> None:
    laboratory: Any = RoutedLaboratory(seed, power)
    search = Search(
        laboratory, laboratory.entropy, k_values, routers=laboratory.routers, num_bands=3, refine_passes=passes
    )
    check(search, budget)


def test_no_kind_is_worse_than_one_it_contains_on_the_bundled_model(
    evaluator: Evaluator, parts: tuple[Windows, Windows], tmp_path: Path
) -> None:
    def quiet(_what: str, _done: int, _total: int | None) -> None:
        pass

    fit = parts[0].take(np.arange(4))
    routers = _routers(evaluator, fit, tmp_path, None, quiet)
    recording, laboratory = _laboratory(evaluator, fit, tmp_path, "fitted", quiet)
    search = Search(laboratory, recording.entropy, [1, 2], routers=routers, num_bands=2, refine_passes=6)
    check(search, Budget(avg_k=1.5))


@pytest.mark.parametrize("kind", ["entropy", "top_p", "ratio", "contribution"])
def test_a_kind_says_a_fixed_k_where_that_is_best(kind: Any) -> None:
    laboratory: Any = RoutedLaboratory(seed=1, power=0.0)
    search = Search(laboratory, laboratory.entropy, [1, 2, 3, 4], routers=laboratory.routers, num_bands=2)
    budget = Budget(avg_k=3.0)
    fixed = search.find("static", budget).scores
    one, each = search.find(kind, budget), search.find(f"{kind}_per_layer", budget)  # type: ignore[arg-type]
    assert fixed.avg_k == 3.0 and one.scores.mean_kl == fixed.mean_kl
    assert each.scores.mean_kl == search.find("static_per_layer", budget).scores.mean_kl
    policy = one.candidate.policy
    if isinstance(policy, EntropyPolicy):
        assert policy.k == [3]
    else:
        assert not isinstance(policy, FixedPolicy) and (policy.k_min, policy.k_max) == (3, 3)


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_moving_single_rules_finds_what_the_filling_order_missed(power: float) -> None:
    laboratory: Any = RoutedLaboratory(seed=2, power=power, n=200)
    budget = Budget(avg_k=8 / 3)

    def found(kind: Any, passes: int) -> float:
        search = Search(
            laboratory, laboratory.entropy, [1, 4], routers=laboratory.routers, num_bands=2, refine_passes=passes
        )
        return search.find(kind, budget).scores.mean_kl

    for kind in ("entropy_per_layer", "top_p_per_layer", "ratio_per_layer", "contribution_per_layer"):
        assert found(kind, 60) < 0.97 * found(kind, 0)


def test_neighbours_are_rules_and_lead_away() -> None:
    entropy = np.random.default_rng(0).uniform(0, 2, (2, 50, 2)).astype(np.float32)
    rules = EntropyRules(entropy, [1, 2, 3, 4], by_layer=True)
    for rule in [rules.fixed(k) for k in (1, 2, 3, 4)] + [(0.5, 0.5, 0.5), (0.1, 0.5, 0.5), (0.0, 0.6, 1.0)]:
        near = rules.neighbours(rule, 0.1)
        assert len(set(near)) == len(near) and rule not in near
        for other in near:
            assert list(other) == sorted(other) and other[0] >= 0 and other[-1] <= 1
            assert max(abs(a - b) for a, b in zip(rule, other, strict=True)) == pytest.approx(0.1)
    assert rules.neighbours(rules.fixed(3), 0.1) == [(0.0, 0.1, 1.0), (0.0, 0.0, 0.9)]
    assert (0.6, 0.6, 0.6) in rules.neighbours((0.5, 0.5, 0.5), 0.1)


def test_what_a_policy_says_is_read_back() -> None:
    laboratory: Any = RoutedLaboratory(seed=3, power=1.0)
    search = Search(laboratory, laboratory.entropy, [1, 2, 4], routers=laboratory.routers, num_bands=2)
    one = RatioPolicy(kind="ratio", ratio=0.3, k_min=2, k_max=3)
    rules: Any = search._rules_of("ratio_per_layer")
    again = laboratory.measure(rules.candidate(rules.rules_of(one))).scores
    assert again.k == pytest.approx(laboratory.measure(Candidate("ratio", one)).scores.k, abs=0.02)
    assert rules.rules_of(TopPPolicy(kind="top_p", p=0.5, k_min=3, k_max=3)) == [rules.fixed(3)] * LAYERS
    entropy: Any = search._rules_of("entropy_per_layer")
    thresholds = EntropyPolicy(kind="entropy", thresholds=[1.0, 1.5], k=[1, 3, 4])
    again = laboratory.measure(entropy.candidate(entropy.rules_of(thresholds))).scores
    assert again.k == pytest.approx(laboratory.measure(Candidate("entropy", thresholds)).scores.k, abs=0.03)
