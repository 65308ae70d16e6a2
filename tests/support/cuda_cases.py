# SPDX-License-Identifier: Apache-2.0
"""Random layers, their inputs, and what the oracle says about them. Shared by tests/cuda and tests/gpu."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from cuda_launcher import DTYPES, Layer, Result

import oracle

Array = npt.NDArray[Any]
Inputs = dict[str, Array | None]

# Largest error of an output, relative to the largest output of the layer.
TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


def quantise(values: Array, storage: str, group_size: int, element: str) -> tuple[Array, Array, Array]:
    """Weights [..., K] as integers and scales, and the numbers that those stand for."""
    k = values.shape[-1]
    group = group_size or k
    grouped = values.reshape(*values.shape[:-1], k // group, group).astype(np.float32)
    most = 127 if storage == "int8" else 7
    scales = (np.abs(grouped).max(-1) / most + 1e-6).astype(DTYPES[element])
    rounded = np.rint(grouped / scales[..., None].astype(np.float32))
    integers = np.clip(rounded, -most - 1, most).astype(np.int8).reshape(values.shape)
    # The negative end too, which a symmetric quantiser would leave unused.
    integers.reshape(-1)[:: max(1, integers.size // 7)] = -most - 1
    exact = (integers.reshape(grouped.shape) * scales[..., None].astype(np.float32)).reshape(values.shape)
    if storage == "int4":
        nibbles = integers.astype(np.uint8) & 0xF
        integers = (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).astype(np.uint8)
    return np.ascontiguousarray(integers), np.ascontiguousarray(scales), exact


def make_logits(rng: np.random.Generator, tokens: int, experts: int, kind: str) -> Array:
    """Logits of a kind: plain, ties (few distinct values), special (NaN, infinities in some rows)."""
    spread = rng.uniform(0.1, 4, (tokens, 1))
    logits = (rng.standard_normal((tokens, experts)) * spread).astype(np.float32)
    if kind == "ties":
        logits = np.rint(logits).astype(np.float32)
    if kind == "special":
        for t in range(tokens):
            row = logits[t]
            somewhere = rng.integers(0, experts, 3)
            match t % 7:
                case 0:
                    row[somewhere[0]] = np.nan
                case 1:
                    row[somewhere[:2]] = np.inf
                case 2:
                    row[somewhere] = -np.inf
                case 3:
                    row[:] = -np.inf
                case 4:
                    row[:] = np.nan
                case 5:
                    row[somewhere] = (np.nan, np.inf, -np.inf)
    return logits


def make_policies(rng: np.random.Generator, experts: int, most: int) -> tuple[Array, Array, Array]:
    """One row of each kind, and a fixed one."""
    most = max(1, min(most, experts))
    choices = 3
    top = float(np.log(experts)) + 1e-3
    limits = np.sort(rng.uniform(0, top, choices - 1)).astype(np.float32)
    ks = np.sort(rng.integers(1, most + 1, choices)).astype(np.int32)
    ks[-1] = most
    kind = np.array(
        [oracle.ENTROPY, oracle.TOP_P, oracle.RATIO, oracle.ENTROPY, oracle.CONTRIBUTION, oracle.CONTRIBUTION], np.int32
    )
    thresholds = np.array([limits, *([value, np.inf] for value in (0.7, 0.4, np.inf, 0.85, 0.3))], np.float32)
    least = [1, 1, most, 1, (most + 1) // 2]
    k_values = np.array([ks, *([k, most, most] for k in least)], np.int32)
    return kind, thresholds, k_values


def add_sharing(rng: np.random.Generator, table: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """The table with rows that share: two prices, two numbers of experts, and a price that nothing reaches."""
    kind, thresholds, k_values = table
    most = int(k_values.max())
    kinds = [
        oracle.SHARED_PRICE,
        oracle.SHARED_EXPERTS,
        oracle.SHARED_PRICE,
        oracle.SHARED_EXPERTS,
        oracle.SHARED_PRICE,
    ]
    parameters = np.array([rng.uniform(0.05, 0.3), rng.integers(0, 4), rng.uniform(0.3, 1.5), 2, 1e6])
    limits = np.full((len(kinds), thresholds.shape[1]), np.inf, np.float32)
    limits[:, 0] = parameters
    ks = np.array([[least, most, most] for least in (0, 0, 1, min(1, most), 0)], np.int32)
    return np.append(kind, np.int32(kinds)), np.concatenate([thresholds, limits]), np.concatenate([k_values, ks])


def random_weights(rng: np.random.Generator, experts: int, n: int, k: int) -> Array:
    """Normal numbers [experts, n, k], of variance 1 / k. A large layer repeats a piece whose length is a prime, so that
    drawing a billion numbers takes a second and no two experts are alike."""
    count = experts * n * k
    piece = rng.standard_normal(min(count, 4_194_301)).astype(np.float32) / np.sqrt(np.float32(k))
    return np.resize(piece, (experts, n, k))


def make_inputs(
    layer: Layer, seed: int, *, logits: str = "plain", bias: bool = False, most: int = 8, sharing: bool = False
) -> tuple[Inputs, Inputs]:
    """The launcher's inputs and the oracle's (weights as the numbers that they stand for). With `sharing`, about half
    of the tokens follow rows that share."""
    rng = np.random.default_rng(seed)
    dtype = DTYPES[layer.element]
    kind, thresholds, k_values = make_policies(rng, layer.experts, most)
    if sharing:
        kind, thresholds, k_values = add_sharing(rng, (kind, thresholds, k_values))
    layer.policies, layer.choices = k_values.shape
    wide = 2 if layer.activation in oracle.GATED else 1
    inputs: Inputs = {
        "hidden_states": rng.standard_normal((layer.tokens, layer.hidden)).astype(dtype),
        "router_logits": make_logits(rng, layer.tokens, layer.experts, logits),
        # Also outside the table, where the nearest row counts.
        "policy_index": rng.integers(-1, len(kind) + 1, layer.tokens).astype(np.int32),
        "policy_kind": kind,
        "thresholds": thresholds,
        "k_values": k_values,
        "correction_bias": (rng.standard_normal(layer.experts) * 0.3).astype(np.float32) if bias else None,
        # Some of them equal, so that contributions tie where logits do, and 0 for experts that add nothing.
        "expert_norms": rng.choice(np.array([0, 0.5, 1, 1.75], np.float32), layer.experts) if seed % 3 < 2 else None,
    }
    exact: Inputs = dict(inputs)
    for name, n, k in (("up", wide * layer.intermediate, layer.hidden), ("down", layer.hidden, layer.intermediate)):
        weights = random_weights(rng, layer.experts, n, k)[layer.range]
        if layer.weights == "element":
            inputs[name] = weights.astype(dtype)
            exact[name] = inputs[name]
        else:
            inputs[name], inputs[name + "_scales"], exact[name] = quantise(
                weights, layer.weights, layer.group_size, layer.element
            )
    return inputs, exact


def routing_arguments(layer: Layer) -> dict[str, Any]:
    return {
        "scoring": layer.scoring,
        "norm_topk_prob": layer.norm_topk_prob,
        "routed_scaling_factor": layer.routed_scaling_factor,
        "n_group": layer.n_group,
        "topk_group": layer.topk_group,
        "max_k": layer.max_k,
    }


def expected(layer: Layer, exact: Inputs) -> tuple[Array, Array, Array]:
    with np.errstate(all="ignore"):
        return oracle.moe(
            exact["hidden_states"].astype(np.float32),
            exact["router_logits"],
            exact["policy_index"],
            exact["policy_kind"],
            exact["thresholds"],
            exact["k_values"],
            exact["up"],
            exact["down"],
            activation=layer.activation,
            first_expert=layer.first_expert,
            correction_bias=exact["correction_bias"],
            expert_norms=exact["expert_norms"],
            **routing_arguments(layer),
        )


def expected_routing(layer: Layer, exact: Inputs, close: list[float] | None = None) -> list[oracle.TokenRouting]:
    """The step's routing; for `close`, see oracle.route_step."""
    names = ("router_logits", "policy_index", "policy_kind", "thresholds", "k_values")
    with np.errstate(all="ignore"):
        return oracle.route_step(
            *(exact[name] for name in names),
            close=close,
            correction_bias=exact["correction_bias"],
            expert_norms=exact["expert_norms"],
            **routing_arguments(layer),
        )


def make_decided(layer: Layer, seed: int, **options: Any) -> tuple[Inputs, Inputs]:
    """As make_inputs(), a step with sharing tokens whose reads no rounding decides."""
    for attempt in range(seed, seed + 100_000, 1000):
        inputs, exact = make_inputs(layer, attempt, sharing=True, **options)
        close: list[float] = []
        expected_routing(layer, exact, close)
        if min(close, default=1.0) > 3e-6:
            return inputs, exact
    raise AssertionError("every step was close to a tie")


def make_unread(layer: Layer) -> Inputs:
    """Inputs of a step in which every token shares and no expert pays its price."""
    inputs, _ = make_inputs(layer, 0)
    layer.policies, layer.choices = 1, 2
    return inputs | {
        "policy_kind": np.array([oracle.SHARED_PRICE], np.int32),
        "thresholds": np.array([[1e6]], np.float32),
        "k_values": np.array([[0, 4]], np.int32),
    }


def check_plan(layer: Layer, exact: Inputs, result: Result) -> None:
    """The plan is the stable sort by expert of the selections that the routing left; exact is not read."""
    tokens, ranks = np.nonzero(np.arange(layer.capacity)[None] < result.k[:, None])
    experts = result.experts[tokens, ranks]
    order = np.lexsort((tokens, experts))
    load = np.bincount(experts, minlength=layer.experts)
    np.testing.assert_array_equal(np.diff(result.offsets), load)
    np.testing.assert_array_equal(result.expert_load, load)
    assert result.offsets[0] == 0
    mine = np.arange(layer.experts)[layer.range]
    np.testing.assert_array_equal(result.active, np.intersect1d(experts, mine) - mine[0])
    np.testing.assert_array_equal(result.row_token, tokens[order])
    rows = np.empty(len(order), np.int64)
    rows[order] = np.arange(len(order))
    rows[~np.isin(experts, mine)] = -1
    np.testing.assert_array_equal(result.token_rows[tokens, ranks], rows)


def check_routing(layer: Layer, exact: Inputs, result: Result) -> None:
    """Routing as the oracle's, token by token."""
    for t, token in enumerate(expected_routing(layer, exact)):
        np.testing.assert_allclose(
            result.entropy[t], token.entropy, atol=2e-6, rtol=2e-6, err_msg=f"entropy of token {t}"
        )
        assert result.k[t] == token.k, f"k of token {t}"
        assert result.experts[t, : token.k].tolist() == token.experts, f"experts of token {t}"
        np.testing.assert_allclose(
            result.weights[t, : token.k], token.weights, atol=1e-6, rtol=1e-5, err_msg=f"weights of token {t}"
        )
        assert (result.experts[t, token.k :] == -1).all()


def check_output(layer: Layer, exact: Inputs, result: Result) -> None:
    """Outputs as the oracle's; rows that are undefined there are undefined here."""
    output, k, _ = expected(layer, exact)
    np.testing.assert_array_equal(result.k, k)
    got = result.output.astype(np.float64)
    finite = np.isfinite(output)
    np.testing.assert_array_equal(np.isfinite(got), finite)
    if finite.any():
        worst = np.abs(got[finite] - output[finite]).max() / max(np.abs(output[finite]).max(), 1e-30)
        assert worst <= TOLERANCE[layer.element], f"largest error {worst:.2e} of the largest output"


def check_all(layer: Layer, exact: Inputs, result: Result) -> None:
    if layer.tokens == 0:
        return  # nothing ran, and nothing was promised
    check_routing(layer, exact, result)
    check_plan(layer, exact, result)
    check_output(layer, exact, result)
