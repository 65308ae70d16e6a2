# SPDX-License-Identifier: Apache-2.0
"""AdaptiveKMoe in NumPy float64, one token at a time: the specification that the tests hold the operator to."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

ENTROPY, TOP_P, RATIO, CONTRIBUTION, SHARED_PRICE, SHARED_EXPERTS = 0, 1, 2, 3, 4, 5
GATED = ("swiglu", "geglu")
Array = npt.NDArray[Any]

# The error of a sum in float32, relative to the largest.
FLOAT32_SUMS = 2e-6


class TokenRouting(NamedTuple):
    k: int
    entropy: float
    experts: list[int]
    weights: list[float]


def softmax(logits: Array) -> Array:
    """Softmax in float64; undefined (all NaN) with a NaN, a +inf, or nothing but -inf."""
    x = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        p = np.exp(x - x.max())
        return p / p.sum() if np.isfinite(p).all() else np.full_like(p, np.nan)


def entropy(logits: Array) -> float:
    """Entropy of the softmax in nats, NaN where that is undefined."""
    p = softmax(logits)
    if np.isnan(p).any():
        return math.nan
    positive = p[p > 0]
    return float(-(positive * np.log(positive)).sum())


def sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-x.astype(np.float64)))


def ranked(keys: Array, candidates: list[int]) -> list[int]:
    """Candidates by falling key; ties by index, NaN last."""

    def order(i: int) -> tuple[bool, float, int]:
        return (True, 0.0, i) if np.isnan(keys[i]) else (False, -float(keys[i]), i)

    return sorted(candidates, key=order)


def route_token(
    logits: Array,
    kind: int,
    thresholds: Array,
    k_values: Array,
    *,
    correction_bias: Array | None = None,
    expert_norms: Array | None = None,
    scoring: str = "softmax",
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
    max_k: int = 0,
    read: set[int] | None = None,
) -> TokenRouting:
    num_experts = len(logits)
    # Scores exist in float32, so that what rounds to a tie is one.
    scores = (softmax(logits) if scoring == "softmax" else sigmoid(logits)).astype(np.float32)
    keys = scores if correction_bias is None else scores + correction_bias.astype(np.float32)
    if scoring == "softmax" and correction_bias is None:
        keys = logits  # the same order without rounding

    selectable = list(range(num_experts))
    if n_group > 1:
        size = num_experts // n_group
        group_scores = []
        for g in range(n_group):
            best = ranked(keys, list(range(g * size, (g + 1) * size)))
            taken = best[:1] if scoring == "softmax" else best[:2]
            group_scores.append(np.float32(sum(np.float32(keys[i]) for i in taken)))
        kept = ranked(np.array(group_scores), list(range(n_group)))[:topk_group]
        selectable = [i for g in kept for i in range(g * size, (g + 1) * size)]
    order = ranked(keys, [e for e in selectable if read is None or e in read])

    largest = min(max_k or 32, len(order))
    if read is None:
        largest = max(1, largest)
    h = entropy(logits)
    if kind == TOP_P and not math.isnan(h):
        share = scores.astype(np.float64) / scores.astype(np.float64).sum()
        p = float(thresholds[0]) if len(thresholds) else 1.0
        reached = np.flatnonzero(np.cumsum(share[order]) >= p)
        k = int(reached[0]) + 1 if len(reached) else num_experts
        k = min(max(k, int(k_values[0])), int(k_values[-1]))
    elif kind == RATIO and not math.isnan(h):
        ratio = np.float32(thresholds[0]) if len(thresholds) else np.float32(0)
        k = int((scores >= ratio * scores.max()).sum())
        k = min(max(k, int(k_values[0])), int(k_values[-1]))
    elif kind == CONTRIBUTION and not math.isnan(h):
        p = float(thresholds[0]) if len(thresholds) else 1.0
        best = order[: max(1, min(int(k_values[-1]), largest))]
        norms = np.ones(num_experts, np.float32) if expert_norms is None else expert_norms
        mass = np.cumsum(scores[best] * norms[best], dtype=np.float64)
        k = min(int((~(mass >= p * mass[-1])).sum()) + 1, len(best))
        k = min(max(k, int(k_values[0])), int(k_values[-1]))
    elif kind in (TOP_P, RATIO, CONTRIBUTION, SHARED_PRICE, SHARED_EXPERTS):
        k = int(k_values[-1])
    else:
        below = [i for i, limit in enumerate(thresholds) if np.float32(h) < limit]
        k = int(k_values[below[0] if below else -1])
    k = min(max(k, 1), largest)

    experts = order[:k]
    weights = scores[experts].astype(np.float64)
    if norm_topk_prob:
        weights = weights / (weights.sum() + 1e-20)
    return TokenRouting(k, h, experts, list(weights * routed_scaling_factor))


def route_step(
    router_logits: Array,
    policy_index: Array,
    policy_kind: Array,
    thresholds: Array,
    k_values: Array,
    *,
    close: list[float] | None = None,
    **routing: Any,
) -> list[TokenRouting]:
    """All tokens of a step; those of sharing rows choose again among the experts that the step reads.

    `close` is given how far, relatively, what decides is from a tie: rounding decides where that is next to nothing.
    """
    rows = np.clip(policy_index, 0, len(policy_kind) - 1)

    def route(t: int, read: set[int] | None = None) -> TokenRouting:
        row = rows[t]
        return route_token(
            router_logits[t], int(policy_kind[row]), thresholds[row], k_values[row], read=read, **routing
        )

    alone = [route(t) for t in range(len(router_logits))]
    sharing = [
        policy_kind[row] in (SHARED_PRICE, SHARED_EXPERTS) and not math.isnan(token.entropy)
        for row, token in zip(rows, alone, strict=True)
    ]
    paid: set[int] = set()
    worth: dict[int, float] = {}
    by_row: dict[int, dict[int, float]] = {}
    for token, row, shares in zip(alone, rows, sharing, strict=True):
        paid |= set(token.experts[: int(k_values[row][0])] if shares else token.experts)
        for expert, weight in zip(token.experts, token.weights, strict=True) if shares else ():
            square = float(np.float32(weight)) ** 2
            if policy_kind[row] == SHARED_PRICE:
                worth[expert] = worth.get(expert, 0.0) + square / float(thresholds[row][0])
            else:
                of_row = by_row.setdefault(int(row), {})
                of_row[expert] = of_row.get(expert, 0.0) + square
    paid |= {expert for expert, value in worth.items() if value >= 1}
    read = set(paid)
    for row, values in by_row.items():
        best = sorted((e for e in values if e not in paid and values[e] > 0), key=lambda e: (-values[e], e))
        read |= set(best[: int(thresholds[row][0])])
        if close is not None:
            close += [1 - values[b] / values[a] for a, b in pairwise(best)]
    if close is not None:
        close += [abs(value - 1) for value in worth.values()]
    return [route(t, read) if shares else token for t, (token, shares) in enumerate(zip(alone, sharing, strict=True))]


def activate(name: str, x: Array) -> Array:
    def gelu(v: Array) -> Array:
        return v * 0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(v / math.sqrt(2)))

    if name in GATED:
        gate, up = np.split(x, 2)
        return (gate * sigmoid(gate) if name == "swiglu" else gelu(gate)) * up
    if name == "silu":
        return x * sigmoid(x)
    if name == "gelu":
        return gelu(x)
    if name == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return np.maximum(x, 0) ** (2 if name == "relu2" else 1)


def bfloat16(x: Array) -> Array:
    """Float64 numbers rounded to bfloat16, by way of float32 as the operator has them."""
    return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def in_int8(x: Array, group_size: int | None) -> Array:
    """A row rounded to int8 in blocks of neighbours, each with its scale, as float64.

    Blocks are of 256 where the weights have a scale a row; else of 128, or of the weights' groups where those are
    shorter, or of 32 where 128 does not divide them.
    """
    group = len(x) if group_size is None else group_size
    block = 256 if group >= len(x) else 128 if group % 128 == 0 else group if group < 128 else 32
    rounded = []
    for start in range(0, len(x), block):
        part = x[start : start + block].astype(np.float32)
        largest = np.abs(part).max()
        integers = np.rint(part * (np.float32(127) / largest)) if largest > 0 else np.zeros_like(part)
        rounded.append(integers.astype(np.float64) * float(largest / np.float32(127)))
    return np.concatenate(rounded)


def moe(
    hidden_states: Array,
    router_logits: Array,
    policy_index: Array,
    policy_kind: Array,
    thresholds: Array,
    k_values: Array,
    gate_up: Array,
    down: Array,
    *,
    activation: str = "swiglu",
    first_expert: int = -1,
    margin: Array | None = None,
    activations_in: Callable[[Array], Array] = lambda x: x,
    **routing: Any,
) -> tuple[Array, Array, Array]:
    """The operator: output [T, H], k [T] and entropy [T], with the arguments of adaptive_k_moe.plugin.moe.

    `activations_in` rounds a row of activations. With `margin` [T, H], they are rounded to bfloat16, and margin is set
    to what the output may be off by because float32 sums leave it open which way an expert's hidden value is rounded.
    """
    tokens = len(hidden_states)
    output = np.zeros(hidden_states.shape, np.float64)
    ks = np.zeros(tokens, np.int32)
    entropies = np.zeros(tokens, np.float64)
    if margin is not None:
        margin[:] = 0
    step = route_step(router_logits, policy_index, policy_kind, thresholds, k_values, **routing)
    for t, token in enumerate(step):
        ks[t], entropies[t] = token.k, token.entropy
        for expert, weight in zip(token.experts, token.weights, strict=True):
            here = expert - max(first_expert, 0)
            if not 0 <= here < len(down):
                continue
            w_up, w_down = gate_up[here].astype(np.float64), down[here].astype(np.float64)
            x = hidden_states[t].astype(np.float64)
            hidden = activate(activation, w_up @ (activations_in(x) if margin is None else bfloat16(x)))
            if margin is not None:
                open_ways = bfloat16(hidden + FLOAT32_SUMS * abs(hidden).max())
                open_ways -= bfloat16(hidden - FLOAT32_SUMS * abs(hidden).max())
                margin[t] += abs(weight) * (abs(w_down) @ open_ways)
                hidden = bfloat16(hidden)
            else:
                hidden = activations_in(hidden)
            output[t] += weight * (w_down @ hidden)
    return output, ks, entropies
