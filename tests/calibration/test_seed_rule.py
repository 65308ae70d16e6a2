# SPDX-License-Identifier: Apache-2.0
"""Entropy of synthetic logits, the published rule on them, and its published table."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_k_moe.calibration.entropy import BITS, EntropyRule, router_entropy, seed_rule
from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.calibration.validation import REPORTED, check_agreement, summarize
from adaptive_k_moe.errors import AdaptiveKError

RULE = EntropyRule.checked([4.5, 5.5], [2, 4, 6], "bits", num_experts=128)


def logits_of_entropy(bits: float, num_experts: int = 128, seed: int = 0) -> np.ndarray:
    """Random logits, scaled until their softmax has this entropy."""
    direction = np.random.default_rng(seed).normal(size=num_experts)
    low, high = 0.0, 1e4
    for _ in range(100):
        scale = (low + high) / 2
        weights = np.exp(scale * direction - np.logaddexp.reduce(scale * direction))
        entropy = -(weights * np.log2(np.maximum(weights, 1e-300))).sum()
        low, high = (scale, high) if entropy > bits else (low, scale)
    return low * direction


@given(st.floats(0.05, 6.99), st.integers(0, 5))
def test_entropy_is_that_of_the_full_softmax(bits: float, seed: int) -> None:
    logits = logits_of_entropy(bits, seed=seed)
    assert router_entropy(logits) * BITS == pytest.approx(bits, abs=1e-6)
    assert router_entropy(logits + 1e4) * BITS == pytest.approx(bits, abs=1e-6)


def test_entropy_of_extremes() -> None:
    assert router_entropy(np.zeros(128)) * BITS == pytest.approx(7.0)
    assert router_entropy(np.array([900.0, -900.0])) == 0.0


@pytest.mark.parametrize(
    ("low_bits", "high_share", "high_bits", "row"),
    [
        # The published row says what share of tokens must have been above 5.5 or below 4.5 bits; with the others at
        # an entropy that gives the row's mean, every digit of the row follows from the rule.
        (5.252, 0.028, 5.55, 0),
        (5.28, 0.0, 5.55, 1),
        (5.189, 0.032, 4.30, 2),
    ],
)
def test_the_rule_gives_the_published_table(low_bits: float, high_share: float, high_bits: float, row: int) -> None:
    count = 1000
    other = round(high_share * count)
    logits = np.stack([logits_of_entropy(high_bits)] * other + [logits_of_entropy(low_bits)] * (count - other))
    entropy = router_entropy(logits).reshape(10, 100, 1)
    found, reported = summarize(entropy, RULE, 6, "set"), REPORTED[row]
    assert round(found.entropy.value, 2) == reported["entropy_bits"]
    assert round(found.effective_k.value, 1) == reported["effective_k"]
    assert round(found.savings.value, 3) == pytest.approx(reported["savings"], abs=0.0016 if row else 0.0011)


def test_all_tokens_at_the_published_average_save_a_third() -> None:
    entropy = router_entropy(np.stack([logits_of_entropy(5.23, seed=seed) for seed in range(20)])).reshape(4, 5, 1)
    found = summarize(entropy, RULE, 6, "average")
    assert found.entropy.value == pytest.approx(5.23, abs=1e-6)
    assert found.effective_k.value == 4.0
    assert f"{found.savings.value:.1%}" == "33.3%"


def test_a_threshold_itself_belongs_to_the_choice_above_it() -> None:
    limit = 4.5 / BITS
    assert RULE.choose(np.array([np.nextafter(limit, 0), limit])).tolist() == [2, 4]


def test_seed_rule_of_mixtral_is_capped_at_its_top_k() -> None:
    rule = seed_rule(8, 2)
    assert rule.thresholds == (0.6, 1.2)
    assert rule.choose(np.array([0.5, 0.7, 1.5])).tolist() == [1, 2, 2]
    assert rule.merged() == EntropyRule((0.6,), (1, 2))


def test_seed_rule_of_nemotron_is_in_bits() -> None:
    rule = seed_rule(128, 6)
    assert [limit * BITS for limit in rule.thresholds] == pytest.approx([4.5, 5.5])
    assert rule.k == (2, 4, 6)


@pytest.mark.parametrize(
    ("thresholds", "k", "unit", "sentence"),
    [
        ([4.5, 5.5], [2, 4, 6], "bytes", "the unit 'bytes' is neither 'nats' nor 'bits'."),
        ([4.5, 5.5], [2, 4, 6], "nats", "no entropy of 128 experts reaches the threshold 5.5 nats"),
        ([5.5, 4.5], [2, 4, 6], "bits", "thresholds must rise"),
        ([4.5, 5.5], [2, 4, 6, 8], "bits", "2 thresholds need 3 values of k, not 4"),
    ],
)
def test_unusable_rules_are_one_sentence(thresholds: list[float], k: list[int], unit: str, sentence: str) -> None:
    with pytest.raises(AdaptiveKError) as caught:
        EntropyRule.checked(thresholds, k, unit, num_experts=128)
    message = str(caught.value)
    assert sentence in message
    assert message.endswith(".") and "\n" not in message


def test_a_difference_between_hooks_and_engine_is_told_with_its_place() -> None:
    hooks = np.full((2, 3, 4), 1.0)
    engine = hooks.copy()
    assert check_agreement(hooks, engine) == 0.0
    engine[1, 2, 3] += 0.01
    with pytest.raises(CalibrationError, match=r"differ by 0.014 bits in MoE layer 3 \(window 1, token 2\)"):
        check_agreement(hooks, engine)
    engine[1, 2, 3] = math.nan
    with pytest.raises(CalibrationError):
        check_agreement(hooks, engine)
    with pytest.raises(CalibrationError, match="hooks saw 4 routers and the engine 3"):
        check_agreement(hooks, hooks[..., :3])
