# SPDX-License-Identifier: Apache-2.0
"""The whole operator: against the oracle and transformers, and that a token's bits are its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openvino as ov
import pytest
from cases import fixed, policies, quantised, tokens, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from openvino import opset13 as ops

from adaptive_k_moe.plugin import instruction_set, moe

import oracle


def assert_is_the_oracles(
    x: Any, logits: Any, policy: Any, up: Any, down: Any, activation: str, *, tolerance: float = 2e-6
) -> None:
    """On AMX, activations of bfloat16 weights are rounded to bfloat16; the oracle's are then too."""
    rounded = instruction_set() == "amx" and up.dtype != np.float32
    margin = np.zeros(x.shape) if rounded else None
    got, k, entropy = moe(x, logits, *policy, up, down, activation=activation)
    want, want_k, want_entropy = oracle.moe(x, logits, *policy, up, down, activation=activation, margin=margin)
    np.testing.assert_array_equal(k, want_k)
    np.testing.assert_allclose(entropy, want_entropy, rtol=0, atol=1e-6)
    allowed = tolerance * np.abs(want).max() + (0 if margin is None else margin)
    assert (np.abs(got - want) <= allowed).all()


ACTIVATIONS = ["swiglu", "geglu", "silu", "gelu", "gelu_tanh", "relu", "relu2"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_matches_the_oracle(activation: str, dtype: str) -> None:
    x, logits = tokens(23, 72, 6)
    up, down = weights(6, 72, 40, activation, dtype)
    assert_is_the_oracles(x, logits, policies(23), up, down, activation)


@pytest.mark.parametrize(
    ("count", "experts", "hidden", "intermediate"),
    [
        (1, 1, 1, 1),
        (2, 3, 5, 7),
        (9, 5, 33, 17),
        (3, 4, 1030, 1100),
        (130, 2, 64, 48),
        (40, 512, 16, 16),
        (7, 8, 2049, 3),
        (600, 2, 40, 24),
    ],
)
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_odd_shapes_match_the_oracle(count: int, experts: int, hidden: int, intermediate: int, activation: str) -> None:
    x, logits = tokens(count, hidden, experts)
    for dtype in ("float32", "bfloat16"):
        up, down = weights(experts, hidden, intermediate, activation, dtype)
        assert_is_the_oracles(x, logits, policies(count), up, down, activation, tolerance=3e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("hidden", "intermediate", "activation"), [(192, 224, "swiglu"), (1096, 1500, "relu2"), (70, 33, "geglu")]
)
def test_a_token_has_the_same_bits_in_any_batch_and_with_any_threads(
    hidden: int, intermediate: int, activation: str, dtype: str
) -> None:
    count, experts = 310, 3
    x, logits = tokens(count, hidden, experts)
    up, down = weights(experts, hidden, intermediate, activation, dtype)
    index, *rows = policies(count)
    whole = moe(x, logits, index, *rows, up, down, activation=activation)

    def part(chosen: Any, threads: int | None) -> None:
        got = moe(x[chosen], logits[chosen], index[chosen], *rows, up, down, activation=activation, num_threads=threads)
        for a, b in zip(got, whole, strict=True):
            np.testing.assert_array_equal(a, b[chosen])

    for t in range(0, count, 45):
        part(np.array([t]), 1)
    shuffled = np.random.default_rng(1).permutation(count)
    for size in (2, 3, 5, 8, 13, 21, 34, 89, 200):
        part(shuffled[:size], None)
        part(shuffled[-size:], 1)
    part(shuffled, 2)


@pytest.mark.parametrize("weight_format", ["float32", "bfloat16", "int8", "int4"])
def test_activations_beyond_the_cache_give_the_same_bits(weight_format: str) -> None:
    """A block of tokens is then taken part by part; here it is more than half of a cache of up to 2.5 MB."""
    count, hidden, intermediate = 256, 4128, 32
    x, logits = tokens(count, hidden, 1)
    arguments: dict[str, Any] = {"activation": "relu2"}
    if weight_format.startswith("int"):
        stored = quantised(1, hidden, intermediate, "relu2", int(weight_format[3:]), 32)
        up, down = stored.up, stored.down
        arguments |= stored.arguments
    else:
        up, down = weights(1, hidden, intermediate, "relu2", weight_format)
        assert_is_the_oracles(x, logits, fixed(count, 1), up, down, "relu2", tolerance=3e-6)
    index, *rows = fixed(count, 1)
    whole = moe(x, logits, index, *rows, up, down, **arguments)[0]
    for t in (0, 100, 255):
        one = slice(t, t + 1)
        alone = moe(x[one], logits[one], index[one], *rows, up, down, **arguments)[0]
        np.testing.assert_array_equal(alone[0], whole[t])


@pytest.mark.parametrize(
    ("count", "experts", "hidden", "intermediate"),
    [(1, 1, 32, 32), (2, 3, 96, 64), (3, 4, 1056, 1120), (130, 2, 64, 96), (40, 128, 32, 64), (7, 8, 2080, 32)],
)
@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 32), (4, None), (4, 32)])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_integer_weights_match_the_oracle(
    count: int, experts: int, hidden: int, intermediate: int, bits: int, group: int | None, activation: str
) -> None:
    x, logits = tokens(count, hidden, experts)
    up, down, arguments, dense = quantised(experts, hidden, intermediate, activation, bits, group)
    got, k, _ = moe(x, logits, *policies(count), up, down, activation=activation, **arguments)
    want, want_k, _ = oracle.moe(x, logits, *policies(count), *dense, activation=activation)
    np.testing.assert_array_equal(k, want_k)
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * np.abs(want).max())


def test_rows_of_int8_are_of_any_16_values() -> None:
    x, logits = tokens(9, 1040, 3)
    up, down, arguments, dense = quantised(3, 1040, 48, "swiglu", 8, None)
    got, _, _ = moe(x, logits, *policies(9), up, down, **arguments)
    np.testing.assert_array_equal(got, moe(x, logits, *policies(9), *dense)[0])


@given(
    count=st.integers(1, 60),
    experts=st.integers(1, 5),
    hidden=st.integers(1, 40),
    intermediate=st.integers(1, 4),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, 96, None]),
    activation=st.sampled_from(["geglu", "silu"]),
)
@settings(max_examples=60, deadline=None)
def test_integer_weights_have_the_bits_of_the_float32_that_they_stand_for(
    count: int, experts: int, hidden: int, intermediate: int, bits: int, group: int | None, activation: str
) -> None:
    """A value times its scale is rounded once, wherever it is read: alone, in a batch, in place or packed."""
    unit = group or 32
    hidden, intermediate = hidden * unit, intermediate * unit
    x, logits = tokens(count, hidden, experts)
    up, down, arguments, dense = quantised(experts, hidden, intermediate, activation, bits, group)
    index, *rows = policies(count)
    want = moe(x, logits, index, *rows, *dense, activation=activation)
    for part in (slice(None), slice(count // 2, count // 2 + 1), slice(1, 8)):
        got = moe(x[part], logits[part], index[part], *rows, up, down, activation=activation, **arguments)
        for found, wanted in zip(got, want, strict=True):
            np.testing.assert_array_equal(found, wanted[part])


def test_chosen_experts_alone_are_read() -> None:
    x, logits = tokens(20, 64, 8)
    logits[:, [2, 5]] = -50  # nobody's choice
    up, down = weights(8, 64, 32, "swiglu")
    want, _, _ = moe(x, logits, *fixed(20, 3), up, down)
    up[[2, 5]] = np.nan
    down[[2, 5]] = np.nan
    got, _, _ = moe(x, logits, *fixed(20, 3), up, down)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_bad_logits_spoil_their_own_token_only(poison: float) -> None:
    x, logits = tokens(20, 64, 8)
    up, down = weights(8, 64, 32, "swiglu")
    want, _, _ = moe(x, logits, *policies(20), up, down)
    logits[7, 3] = poison
    got, k, entropy = moe(x, logits, *policies(20), up, down)
    others = np.arange(20) != 7
    np.testing.assert_array_equal(got[others], want[others])
    assert np.isnan(got[7]).all()
    assert np.isnan(entropy[7])
    assert k[7] == policies(20)[3][policies(20)[0][7]][-1]


def test_minus_infinity_is_probability_zero() -> None:
    x, logits = tokens(5, 16, 4)
    logits[:, 1] = -np.inf
    up, down = weights(4, 16, 16, "swiglu")
    got, _, _ = moe(x, logits, *fixed(5, 2), up, down)
    want, _, _ = oracle.moe(x, logits, *fixed(5, 2), up, down)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_no_tokens_is_an_empty_result() -> None:
    x, logits = tokens(0, 16, 4)
    output, k, entropy = moe(x, logits, *fixed(0, 2), *weights(4, 16, 16, "swiglu"))
    assert output.shape == (0, 16)
    assert k.shape == entropy.shape == (0,)


def test_calls_from_several_threads_do_not_disturb_each_other() -> None:
    up, down = weights(8, 192, 224, "swiglu")
    cases = [tokens(count, 192, 8, seed=count) for count in (1, 2, 7, 40, 150)] * 4

    def run(case: Any) -> Any:
        return moe(*case, *policies(len(case[0])), up, down)[0]

    alone = [run(case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        for want, got in zip(alone, pool.map(run, cases), strict=True):
            np.testing.assert_array_equal(got, want)


def test_openvinos_products_in_bfloat16_and_the_operator_do_not_disturb_each_other() -> None:
    """Both may use the processor's tiles, on threads of one pool."""
    size = 160
    rng = np.random.default_rng(0)
    x = ops.parameter([48, size], np.float32)
    product = ops.matmul(x, ops.constant(rng.standard_normal((size, size), dtype=np.float32)), False, True)
    compiled = ov.Core().compile_model(ov.Model([product], [x]), "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    rows = rng.standard_normal((48, size), dtype=np.float32)
    up, down = weights(8, size, 96, "swiglu", "bfloat16")
    hidden_states, logits = tokens(37, size, 8)

    def operator() -> Any:
        return moe(hidden_states, logits, *policies(37), up, down)[0]

    def openvino() -> Any:
        return compiled.create_infer_request().infer([rows])[0]

    calls = [operator, openvino] * 40
    alone = {call: call() for call in calls[:2]}
    with ThreadPoolExecutor(4) as pool:
        for call, found in zip(calls, pool.map(lambda call: call(), calls), strict=True):
            np.testing.assert_array_equal(found, alone[call])


@pytest.mark.parametrize("architecture", ["mixtral", "olmoe", "nemotron_h"])
def test_experts_are_those_of_transformers(architecture: str) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    count, hidden, intermediate, experts, k = 50, 48, 56, 8, 3
    attributes: dict[str, Any] = {}
    if architecture == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

        block = MixtralSparseMoeBlock(
            MixtralConfig(
                hidden_size=hidden, intermediate_size=intermediate, num_local_experts=experts, num_experts_per_tok=k
            )
        )
    elif architecture == "olmoe":
        from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeSparseMoeBlock

        attributes = dict(norm_topk_prob=False)
        block = OlmoeSparseMoeBlock(
            OlmoeConfig(
                hidden_size=hidden,
                intermediate_size=intermediate,
                num_experts=experts,
                num_experts_per_tok=k,
                norm_topk_prob=False,
            )
        )
    else:
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHMoE

        attributes = dict(activation="relu2", scoring="sigmoid", routed_scaling_factor=2.5)
        block = NemotronHMoE(
            NemotronHConfig(
                hidden_size=hidden,
                moe_intermediate_size=intermediate,
                moe_shared_expert_intermediate_size=16,
                n_routed_experts=experts,
                num_experts_per_tok=k,
                routed_scaling_factor=2.5,
                n_group=1,
                topk_group=1,
            )
        )
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
        x = torch.randn(count, hidden)
        logits = block.gate(x)[0]
        want = block(x[None])[0]
        if architecture == "nemotron_h":
            want = want - block.shared_experts(x)
            up = block.experts.up_proj
            attributes["correction_bias"] = block.gate.e_score_correction_bias.numpy()
        else:
            up = block.experts.gate_up_proj
        up, down = up.detach().numpy(), block.experts.down_proj.detach().numpy()
    got, ks, _ = moe(x.numpy(), logits.numpy(), *fixed(count, k), up, down, **attributes)
    assert (ks == k).all()
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=5e-6 * float(want.abs().max()))
