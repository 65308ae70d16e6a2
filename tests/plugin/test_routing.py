# SPDX-License-Identifier: Apache-2.0
"""Routing: against the oracle on hostile logits, and against the routers of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import fixed
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adaptive_k_moe.plugin import route

import oracle

# Few distinct values make ties; the rest are the ends of what float32 can be.
ELEMENTS = st.sampled_from([-2.0, -0.0, 0.0, 0.5, 1.0, 3.0]) | st.floats(-30, 30, width=32, allow_subnormal=False)
HOSTILE = ELEMENTS | st.sampled_from([np.nan, np.inf, -np.inf, 2.0**100, -(2.0**100)])
EXPERTS = st.sampled_from([1, 2, 3, 8, 12, 64, 512])


def logits(elements: st.SearchStrategy[float]) -> st.SearchStrategy[Any]:
    return EXPERTS.flatmap(
        lambda e: hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.just(e)), elements=elements, fill=st.just(0.0))
    )


def compare(router_logits: Any, kind: int, thresholds: list[float], k_values: list[int], **attributes: Any) -> None:
    count = len(router_logits)
    rows = np.array([thresholds], np.float32)
    ks = np.array([k_values], np.int32)
    got = route(router_logits, np.zeros(count, np.int32), np.array([kind], np.int32), rows, ks, **attributes)
    for t in range(count):
        want = oracle.route_token(router_logits[t], kind, rows[0], ks[0], **attributes)
        np.testing.assert_allclose(got.entropy[t], want.entropy, rtol=0, atol=1e-6)
        if kind == oracle.ENTROPY and np.any(np.abs(want.entropy - rows[0]) < 1e-6):
            continue  # rounding decides
        assert got.k[t] == want.k
        assert got.experts[t, : want.k].tolist() == want.experts
        np.testing.assert_allclose(got.weights[t, : want.k], want.weights, rtol=2e-6, atol=1e-12)
        assert (got.experts[t, want.k :] == -1).all()
        assert (got.weights[t, want.k :] == 0).all()


@given(logits(HOSTILE), st.sampled_from(["softmax", "sigmoid"]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_entropy_rows_match_the_oracle_on_any_logits(x: Any, scoring: str, norm: bool) -> None:
    compare(x, oracle.ENTROPY, [0.6, 1.2, np.inf], [1, 2, 4, 4], scoring=scoring, norm_topk_prob=norm)


@given(logits(HOSTILE), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_correction_bias_and_groups_match_the_oracle(x: Any, seed: int) -> None:
    experts = x.shape[1]
    bias = np.random.default_rng(seed).choice([0.0, 0.1, 0.25], experts).astype(np.float32)
    groups = 4 if experts % 4 == 0 else 1
    for scoring in ("softmax", "sigmoid"):
        for correction_bias in (None, bias):
            compare(
                x,
                oracle.ENTROPY,
                [1.0],
                [2, 6],
                scoring=scoring,
                correction_bias=correction_bias,
                n_group=groups,
                topk_group=(groups + 1) // 2,
                routed_scaling_factor=2.5,
            )


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("kind", "parameter"), [(oracle.TOP_P, 0.3), (oracle.TOP_P, 0.9), (oracle.RATIO, 0.2)])
@pytest.mark.parametrize("experts", [1, 5, 64, 512])
def test_mass_and_ratio_rows_match_the_oracle(scoring: str, kind: int, parameter: float, experts: int) -> None:
    x = (3 * np.random.default_rng(experts).standard_normal((200, experts))).astype(np.float32)
    compare(x, kind, [parameter, 0.0], [1, 0, 8], scoring=scoring)


@given(logits(HOSTILE), st.integers(0, 2**31), st.sampled_from([0.01, 0.3, 0.77, 0.999, 1.0]))
@settings(max_examples=150, deadline=None)
def test_contribution_rows_match_the_oracle_on_any_logits(x: Any, seed: int, p: float) -> None:
    experts = x.shape[1]
    rng = np.random.default_rng(seed)
    bias = rng.choice([0.0, 0.1, 0.25], experts).astype(np.float32)
    groups = 4 if experts % 4 == 0 else 1
    for scoring, norms in (
        ("softmax", None),
        ("softmax", rng.choice([0.0, 0.5, 1.5], experts)),
        ("sigmoid", 10.0 ** rng.integers(-6, 6, experts)),
    ):
        compare(
            x,
            oracle.CONTRIBUTION,
            [p, 0.0],
            [1 + seed % 3, 0, 6],
            scoring=scoring,
            correction_bias=bias if seed % 2 else None,
            expert_norms=None if norms is None else norms.astype(np.float32),
            n_group=groups,
            topk_group=(groups + 1) // 2,
        )


def test_a_norm_that_is_no_number_drops_no_expert_and_spoils_no_weight() -> None:
    x = np.linspace(0, 1, 8, dtype=np.float32)[None]
    rows = np.array([3], np.int32), np.array([[0.5]], np.float32), np.array([[1, 5]], np.int32)
    norms = np.ones(8, np.float32)
    norms[6] = np.nan
    got, full = route(x, np.zeros(1, np.int32), *rows, expert_norms=norms), route(x, *fixed(1, 5))
    for ours, theirs in zip(got, full, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_a_whole_share_is_full_to_the_bit(norm_topk_prob: bool) -> None:
    x = np.random.default_rng(0).standard_normal((200, 16)).astype(np.float32)
    rows = np.array([3], np.int32), np.array([[1.0]], np.float32), np.array([[1, 4]], np.int32)
    norms = np.random.default_rng(1).uniform(0.5, 2, 16).astype(np.float32)
    got = route(x, np.zeros(200, np.int32), *rows, expert_norms=norms, norm_topk_prob=norm_topk_prob)
    full = route(x, *fixed(200, 4), norm_topk_prob=norm_topk_prob)
    for ours, theirs in zip(got, full, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_experts_add_decides_how_many_run() -> None:
    x = np.log(np.array([[0.5, 0.3, 0.2]], np.float32))
    rows = np.array([3], np.int32), np.array([[0.6]], np.float32), np.array([[1, 3]], np.int32)
    for norms, k in (([1, 1, 1], 2), ([2, 1, 1], 1), ([1, 0.1, 2.5], 3)):
        assert route(x, np.zeros(1, np.int32), *rows, expert_norms=np.array(norms, np.float32)).k[0] == k
    # The share is of the most experts that the row may run, not of all.
    two = rows[0], rows[1], np.array([[1, 2]], np.int32)
    assert route(x, np.zeros(1, np.int32), *two, expert_norms=np.array([1, 1, 9], np.float32)).k[0] == 1


@pytest.mark.parametrize("kind", [oracle.ENTROPY, oracle.TOP_P, oracle.RATIO, oracle.CONTRIBUTION])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_row_without_a_softmax_runs_its_full_k(kind: int, poison: float) -> None:
    x = np.zeros((1, 8), np.float32)
    x[0, 3] = poison
    got = route(
        x,
        np.zeros(1, np.int32),
        np.array([kind], np.int32),
        np.array([[0.1, 0.2]], np.float32),
        np.array([[1, 2, 5]], np.int32),
    )
    assert got.k[0] == 5
    assert np.isnan(got.entropy[0])


def test_entropy_is_that_of_float64_over_its_whole_range() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((500, 128)) * np.logspace(-3, 2, 500)[:, None]).astype(np.float32)
    got = route(x, *fixed(500, 1)).entropy
    np.testing.assert_allclose(got, [oracle.entropy(row) for row in x], rtol=0, atol=1e-6)
    np.testing.assert_allclose(route(np.zeros((1, 512), np.float32), *fixed(1, 1)).entropy, np.log(512), atol=1e-6)


def test_k_is_clamped_to_max_k_and_to_what_groups_leave() -> None:
    x = np.zeros((1, 64), np.float32)
    assert route(x, *fixed(1, 50)).k[0] == 32
    assert route(x, *fixed(1, 50), max_k=40).k[0] == 40
    assert route(x, *fixed(1, 50), max_k=3).k[0] == 3
    assert route(x, *fixed(1, 0)).k[0] == 1
    assert route(x, *fixed(1, 50), n_group=8, topk_group=2).k[0] == 16


def test_policy_index_is_clamped_into_the_table() -> None:
    x = np.zeros((3, 4), np.float32)
    kinds, thresholds, ks = np.zeros(2, np.int32), np.zeros((2, 0), np.float32), np.array([[1], [3]], np.int32)
    got = route(x, np.array([-5, 1, 99], np.int32), kinds, thresholds, ks)
    assert got.k.tolist() == [1, 3, 3]


def by_expert(indices: Any, values: Any, experts: int) -> Any:
    dense = np.zeros((len(indices), experts), np.float32)
    for t, (i, v) in enumerate(zip(indices, values, strict=True)):
        keep = np.asarray(i) >= 0
        dense[t, np.asarray(i)[keep]] = np.asarray(v)[keep]
    return dense


@pytest.mark.parametrize(
    "architecture",
    ["mixtral", "qwen3_moe", "qwen3_moe_norm", "olmoe", "nemotron_h", "nemotron_h_groups", "deepseek_v3"],
)
def test_selection_and_weights_are_those_of_transformers(architecture: str) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    hidden, experts, k, count = 32, 16, 4, 300
    attributes: dict[str, Any] = {}
    if architecture == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralTopKRouter

        router = MixtralTopKRouter(MixtralConfig(hidden_size=hidden, num_local_experts=experts, num_experts_per_tok=k))
    elif architecture.startswith("qwen3_moe"):
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeTopKRouter

        attributes["norm_topk_prob"] = architecture.endswith("norm")
        router = Qwen3MoeTopKRouter(
            Qwen3MoeConfig(
                hidden_size=hidden,
                num_experts=experts,
                num_experts_per_tok=k,
                norm_topk_prob=attributes["norm_topk_prob"],
            )
        )
    elif architecture == "olmoe":
        from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeTopKRouter

        attributes["norm_topk_prob"] = False
        router = OlmoeTopKRouter(
            OlmoeConfig(hidden_size=hidden, num_experts=experts, num_experts_per_tok=k, norm_topk_prob=False)
        )
    else:
        groups = dict(n_group=4, topk_group=2) if architecture != "nemotron_h" else dict(n_group=1, topk_group=1)
        attributes = dict(scoring="sigmoid", routed_scaling_factor=2.5, norm_topk_prob=True, **groups)
        shared = dict(
            hidden_size=hidden,
            n_routed_experts=experts,
            num_experts_per_tok=k,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
            **groups,
        )
        if architecture == "deepseek_v3":
            from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3TopkRouter

            router = DeepseekV3TopkRouter(DeepseekV3Config(**shared))
        else:
            from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHTopkRouter

            router = NemotronHTopkRouter(NemotronHConfig(**shared))
        router.e_score_correction_bias.copy_(0.3 * torch.randn(experts))
        attributes["correction_bias"] = router.e_score_correction_bias.numpy()
    with torch.no_grad():
        router.weight.copy_(torch.randn(experts, hidden) / hidden**0.5)
        raw, weights, indices = router(torch.randn(count, hidden))
    got = route(raw.numpy(), *fixed(count, k), **attributes)
    np.testing.assert_allclose(
        by_expert(got.experts, got.weights, experts),
        by_expert(indices.numpy(), weights.numpy(), experts),
        rtol=1e-5,
        atol=1e-7,
    )
