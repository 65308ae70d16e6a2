# SPDX-License-Identifier: Apache-2.0
"""The CPU operator against its specification: the ONNX function body run by a plain ONNX Runtime."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from adaptive_k_moe import plugin
from adaptive_k_moe.engine_builder.graph.moe_function import (
    DOMAIN,
    make_moe_function,
    moe_attributes,
)
from adaptive_k_moe.model_config import MoeConfig
from adaptive_k_moe.plugin.description import GATED_ACTIVATIONS, MAX_K, MOE

import oracle

HIDDEN, INTERMEDIATE = 7, 3


@dataclass(frozen=True)
class Rule:
    """One configuration of the operator's attributes."""

    num_experts: int
    activation: str = "swiglu"
    scoring: str = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    correction_bias: bool = False
    expert_norms: bool = False
    first_expert: int = -1
    given: int = 0  # experts whose weights it has, with first_expert

    @property
    def optional(self) -> list[str]:
        return ["correction_bias"] * self.correction_bias + ["expert_norms"] * self.expert_norms

    @property
    def moe(self) -> MoeConfig:
        return MoeConfig(
            num_experts=self.num_experts,
            num_experts_per_tok=1,
            intermediate_size=INTERMEDIATE,
            activation=self.activation,
            scoring=self.scoring,  # type: ignore[arg-type]
            norm_topk_prob=self.norm_topk_prob,
            routed_scaling_factor=self.routed_scaling_factor,
            n_group=self.n_group,
            topk_group=self.topk_group,
            layers=[0],
        )


RULES = [
    Rule(1),
    Rule(8),
    Rule(5, activation="relu2", scoring="sigmoid", correction_bias=True, routed_scaling_factor=2.5),
    Rule(8, norm_topk_prob=False, activation="geglu", expert_norms=True),
    Rule(12, scoring="sigmoid", n_group=4, topk_group=2, correction_bias=True, activation="silu", expert_norms=True),
    Rule(9, n_group=3, topk_group=1, activation="gelu", expert_norms=True),
    Rule(8, scoring="sigmoid", norm_topk_prob=False, activation="gelu_tanh"),
    Rule(512, activation="relu", expert_norms=True),
    Rule(8, expert_norms=True, first_expert=3, given=4),
    Rule(6, activation="relu2", scoring="sigmoid", correction_bias=True, first_expert=0, given=1),
]


@functools.cache
def function_session(rule: Rule) -> ort.InferenceSession:
    """A model of one node, the operator, with its function body and nothing of ours installed."""
    inputs = [*MOE.input_names(), *rule.optional]
    integer = {"policy_index", "policy_kind", "k_values", "k", "expert_load"}
    ranks = {"policy_index": 1, "policy_kind": 1, "up": 3, "down": 3, "k": 1, "entropy": 1, "expert_load": 1}
    ranks |= dict.fromkeys(rule.optional, 1)

    def value(name: str) -> onnx.ValueInfoProto:
        dtype = TensorProto.INT32 if name in integer else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, dtype, [None] * ranks.get(name, 2))

    node = helper.make_node(
        "AdaptiveKMoe",
        inputs,
        MOE.output_names(),
        domain=DOMAIN,
        **moe_attributes(rule.moe, max_k=MAX_K, weight_format="float32", expert_norms=rule.expert_norms)
        | {"first_expert": rule.first_expert},
    )
    graph = helper.make_graph([node], "operator", [value(n) for n in inputs], [value(n) for n in MOE.output_names()])
    function = make_moe_function(
        rule.moe,
        max_k=MAX_K,
        correction_bias=rule.correction_bias,
        expert_norms=rule.expert_norms,
        first_expert=rule.first_expert,
    )
    function.output.append("expert_load")
    model = helper.make_model(
        graph,
        ir_version=11,
        opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, 1)],
        functions=[function],
    )
    onnx.checker.check_model(model)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def arguments(rule: Rule, logits: np.ndarray, kinds: np.ndarray, limits: np.ndarray, ks: np.ndarray, index: Any) -> Any:
    rng = np.random.default_rng(len(logits) + rule.num_experts)
    given = rule.num_experts if rule.first_expert < 0 else rule.given
    width = INTERMEDIATE * (2 if rule.activation in GATED_ACTIVATIONS else 1)
    feed = {
        "hidden_states": rng.standard_normal((len(logits), HIDDEN), np.float32),
        "router_logits": logits,
        "policy_index": np.asarray(index, np.int32),
        "policy_kind": kinds,
        "thresholds": limits,
        "k_values": ks,
        "up": rng.standard_normal((given, width, HIDDEN), np.float32),
        "down": rng.standard_normal((given, HIDDEN, INTERMEDIATE), np.float32),
    }
    if rule.correction_bias:
        # Multiples of a quarter, so that biased scores tie now and then.
        feed["correction_bias"] = rng.integers(-2, 3, rule.num_experts).astype(np.float32) / 4
    if rule.expert_norms:
        # Few values, so that contributions tie, and some experts that add nothing.
        feed["expert_norms"] = rng.choice(np.array([0, 0.5, 1, 1.5], np.float32), rule.num_experts)
    return feed


def by_function(rule: Rule, feed: dict[str, np.ndarray]) -> Any:
    return function_session(rule).run(MOE.output_names(), feed)


def routing(rule: Rule, feed: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        **{name: feed[name] for name in rule.optional},
        "scoring": rule.scoring,
        "norm_topk_prob": rule.norm_topk_prob,
        "routed_scaling_factor": rule.routed_scaling_factor,
        "n_group": rule.n_group,
        "topk_group": rule.topk_group,
        "max_k": MAX_K,
    }


def by_plugin(rule: Rule, feed: dict[str, np.ndarray]) -> Any:
    return plugin.moe(
        *(feed[name] for name in MOE.input_names()),
        activation=rule.activation,
        first_expert=rule.first_expert,
        **routing(rule, feed),
    )


def expert_load(rule: Rule, feed: dict[str, np.ndarray]) -> np.ndarray:
    """[E] tokens that each expert runs for."""
    rows = (feed[name] for name in MOE.input_names()[1:6])
    experts = plugin.route(*rows, **routing(rule, feed)).experts
    return np.bincount(experts[experts >= 0], minlength=rule.num_experts)


def selected(rule: Rule, feed: dict[str, np.ndarray]) -> Any:
    """The most experts that each token's row may run, by rank, then -1."""
    most = np.repeat(feed["k_values"][:, -1:], 2, axis=1)
    logits, index, kinds = feed["router_logits"], feed["policy_index"], np.zeros_like(feed["policy_kind"])
    return plugin.route(logits, index, kinds, np.zeros((len(most), 1), np.float32), most, **routing(rule, feed)).experts


def near_a_limit(rule: Rule, feed: dict[str, np.ndarray]) -> bool:
    """Whether some token's entropy, mass, ratio or share is so near its row's limit that rounding decides."""
    logits = feed["router_logits"].astype(np.float64)
    with np.errstate(all="ignore"):
        exps = np.exp(logits - logits.max(1, keepdims=True))
        probs = exps / exps.sum(1, keepdims=True)
        entropy = -np.where(probs > 0, probs * np.log(probs), 0).sum(1)
        scores = probs if rule.scoring == "softmax" else 1 / (1 + np.exp(-logits))
        keys = scores + feed.get("correction_bias", np.zeros(1))
        if rule.n_group > 1 and rule.scoring == "sigmoid":
            # Two groups whose sums are as good as equal, of other terms: the order of rounding decides.
            best = np.sort(keys.reshape(len(keys), rule.n_group, -1), 2)[..., -2:]
            apart = np.abs(best.sum(2)[:, :, None] - best.sum(2)[:, None])
            if ((apart < 1e-6) & (best[:, :, None] != best[:, None]).any(3)).any():
                return True
        ranked = np.take_along_axis(scores, np.argsort(-keys, 1, kind="stable"), 1)
        mass = np.cumsum(ranked / ranked.sum(1, keepdims=True), 1)
        ratio = scores / scores.max(1, keepdims=True)
        candidates = selected(rule, feed)
        contributions = np.take_along_axis(scores * feed.get("expert_norms", np.ones(1)), candidates, 1)
        contributions = np.where(candidates < 0, 0, contributions)
        share = np.cumsum(contributions, 1) / contributions.sum(1, keepdims=True)
        limits = feed["thresholds"][np.clip(feed["policy_index"], 0, len(feed["policy_kind"]) - 1)]
        first = limits[:, :1]
        close: list[float] = []
        oracle.route_step(*(feed[name] for name in MOE.input_names()[1:6]), close=close, **routing(rule, feed))
        if min(close, default=1.0) < 1e-5:
            return True
        distances = (entropy[:, None] - limits, mass - first, ratio - first, share - first)
        return any(bool((np.abs(distance) < 1e-4).any()) for distance in distances)


FINITE = st.sampled_from([-3.0, -1.0, -0.25, 0.0, 0.25, 0.5, 1.0, 2.0, 5.0])
ANY = st.one_of(FINITE, st.sampled_from([float("nan"), float("inf"), float("-inf"), 90.0, -90.0]))


@st.composite
def layers(draw: st.DrawFn, rule: Rule) -> dict[str, np.ndarray]:
    tokens, policies, choices = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(2, 4))
    value = draw(st.sampled_from([FINITE, ANY]))
    if rule.num_experts <= 16:
        rows = st.lists(value, min_size=rule.num_experts, max_size=rule.num_experts)
        logits = np.array(draw(st.lists(rows, min_size=tokens, max_size=tokens)), np.float32)
    else:
        pool = np.array(draw(st.lists(value, min_size=1, max_size=6)), np.float32)
        logits = np.random.default_rng(draw(st.integers(0, 99))).choice(pool, (tokens, rule.num_experts))
    kinds = np.array(draw(st.lists(st.integers(0, 5), min_size=policies, max_size=policies)), np.int32)
    limit = st.integers(13, 987).map(lambda thousandths: thousandths / 1000)
    limits = np.array(
        [sorted(draw(st.lists(limit, min_size=choices - 1, max_size=choices - 1))) for _ in range(policies)], np.float32
    )
    # Entropies reach log E; stretch the limits of the rows that decide by it.
    limits[kinds == 0] *= max(np.log(rule.num_experts), 1.0)
    limits[kinds == oracle.SHARED_EXPERTS] *= 7
    ks = np.sort(
        np.array(
            [draw(st.lists(st.integers(1, 40), min_size=choices, max_size=choices)) for _ in range(policies)], np.int32
        )
    )
    ks[kinds >= oracle.SHARED_PRICE, 0] -= 1  # may be 0
    index = draw(st.lists(st.integers(-1, policies), min_size=tokens, max_size=tokens))
    return arguments(rule, logits, kinds, limits, ks, index)


@pytest.mark.parametrize("rule", RULES, ids=str)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_layers(rule: Rule, data: st.DataObject) -> None:
    feed = data.draw(layers(rule))
    assume(not near_a_limit(rule, feed))
    expected_output, expected_k, expected_entropy, load = by_function(rule, feed)
    output, k, entropy = by_plugin(rule, feed)
    np.testing.assert_array_equal(k, expected_k)
    assert load.sum() == k.sum()
    assert np.abs(load - expert_load(rule, feed)).sum() <= 2  # rounding may decide between two experts of equal worth
    np.testing.assert_allclose(entropy, expected_entropy, atol=2e-6, rtol=2e-6)
    np.testing.assert_allclose(output, expected_output, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("rule", RULES[:5], ids=str)
def test_many_tokens_with_mixed_rows(rule: Rule) -> None:
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((300, rule.num_experts), np.float32) * 3
    kinds = np.arange(6, dtype=np.int32)
    limits = np.array([[0.5, 1.2], *([p, np.inf] for p in (0.7, 0.3, 0.8, 20, 2))], np.float32)
    ks = np.array([[1, 2, 4], [1, 3, 3], [1, 3, 3], [1, 2, 6], [0, 1, 4], [1, 1, 4]], np.int32)
    feed = arguments(rule, logits, kinds, limits, ks, rng.integers(0, 6, 300))
    expected_output, expected_k, *_ = by_function(rule, feed)
    output, k, _ = by_plugin(rule, feed)
    agree = k == expected_k  # a token at a limit may fall to either side by rounding
    assert agree.mean() > 0.99
    np.testing.assert_allclose(output[agree], expected_output[agree], atol=1e-4, rtol=1e-4)


def test_an_expert_without_a_chance_in_a_chosen_group_goes_before_those_of_other_groups() -> None:
    rule = Rule(9, n_group=3, topk_group=1)
    logits = np.array([[-3, -3, -3, -3, -3, -3, -3, -1, -np.inf]], np.float32)
    kind, limits, ks = np.array([0], np.int32), np.array([[0.01]], np.float32), np.array([[1, 3]], np.int32)
    feed = arguments(rule, logits, kind, limits, ks, [0])
    (expected_output, expected_k, *_), (output, k, _) = by_function(rule, feed), by_plugin(rule, feed)
    assert k.tolist() == expected_k.tolist() == [3]
    np.testing.assert_allclose(output, expected_output, atol=2e-5, rtol=2e-5)
