# SPDX-License-Identifier: Apache-2.0
"""Families: policies of one kind along one number, from 0 (nothing saved) to 1 (everything that can be).

Where the routers' traces are there, the number is the share of the expert runs saved if routing stayed as the full
model's, so a family is close to linear in what it saves and a budget is met in two or three passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from adaptive_k_moe.calibration.kinds import Kind
from adaptive_k_moe.calibration.laboratory import DECIMALS, Candidate
from adaptive_k_moe.calibration.routers import RouterTraces
from adaptive_k_moe.policy import (
    EntropyChoices,
    EntropyPolicy,
    FixedPolicy,
    Policy,
    RatioPolicy,
    TopPPolicy,
)

Family = Callable[[float], Candidate]

Quantiles = tuple[float, ...]
"""A layer's thresholds as shares of its tokens that lie below them, rising; one fewer than values of k."""

OneNumber = Literal["top_p", "ratio", "contribution"]
"""Kinds whose rule is one number."""

PER_LAYER: dict[OneNumber, Kind] = {
    "top_p": "top_p_per_layer",
    "ratio": "ratio_per_layer",
    "contribution": "contribution_per_layer",
}
"""The kinds with a number for each layer."""

_POLICY: TypeAdapter[Policy] = TypeAdapter(Policy)
_SMALLEST = 10.0 ** -(DECIMALS + 2)


def choices_at(entropies: npt.NDArray[np.float32], quantiles: Quantiles, k_values: Sequence[int]) -> EntropyChoices:
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


def shapes(num_choices: int) -> dict[str, Callable[[float], Quantiles]]:
    """Ways from "nothing saved" to "everything saved" for one rule with several thresholds."""
    count = num_choices - 1
    ways: dict[str, Callable[[float], Quantiles]] = {"extremes": lambda x: (x,) * count}
    if count > 1:
        ways["spread"] = lambda x: tuple(x ** (count - i) for i in range(count))
        ways["levels"] = lambda x: tuple(min(1.0, max(0.0, x * count - (count - 1 - i))) for i in range(count))
    return ways


def entropy_families(entropy: npt.NDArray[np.float32], k_values: Sequence[int]) -> list[Family]:
    """One rule for all layers; a family for each shape.

    Args:
        entropy: [W, n, L] the full model's, nats.
        k_values: rising.
    """
    pooled = np.sort(np.asarray(entropy), axis=None)

    def family(way: Callable[[float], Quantiles]) -> Family:
        def at(x: float) -> Candidate:
            rule = choices_at(pooled, way(x), k_values)
            return Candidate("entropy", EntropyPolicy(kind="entropy", thresholds=rule.thresholds, k=rule.k))

        return at

    return [family(way) for way in shapes(len(k_values)).values()]


def top_p_family(k_min: int) -> Family:
    """Probability mass, from 1 down to 0."""

    def at(x: float) -> Candidate:
        p = max(round(1.0 - x, DECIMALS + 2), 10.0 ** -(DECIMALS + 2))
        return Candidate("top_p", TopPPolicy(kind="top_p", p=p, k_min=k_min))

    return at


def ratio_family(k_min: int) -> Family:
    """Score against the best expert's, from 0 up to 1."""
    return lambda x: Candidate("ratio", RatioPolicy(kind="ratio", ratio=round(x, DECIMALS + 2), k_min=k_min))


def random_family(k_low: int, seed: int) -> Family:
    """The lowest k for a random share of the tokens."""
    return lambda x: Candidate("random", FixedPolicy(kind="fixed", k=k_low), share=round(x, DECIMALS + 2), seed=seed)


class OneNumberRules:
    """Rules of a kind with one number, by the share of the droppable expert runs that they drop.

    Every expert beyond `k_min` has a value of the number at which it is dropped; the number for a share is that
    quantile of the values.

    Args:
        kind: what the number is.
        routers: the full model's choices.
        k_min: experts that always run.
    """

    def __init__(self, kind: OneNumber, routers: RouterTraces, k_min: int) -> None:
        self.kind = kind
        self.k_min = k_min
        self._name = "ratio" if kind == "ratio" else "p"
        self.full_k = routers.scores.shape[-1]
        self.num_layers = routers.scores.shape[-2]
        self._values = [np.sort(self._dropped_at(routers, layer), axis=None) for layer in range(self.num_layers)]
        self._pooled = np.sort(np.concatenate(self._values))

    def family(self) -> Family:
        """One number for all layers."""
        return lambda x: self._candidate(self.kind, {self._name: self._number(self._pooled, x), "k_min": self.k_min})

    def by_layer(self, shares: Sequence[float]) -> Candidate:
        """A policy with a share for each layer; nothing is dropped at 0."""
        layers = {
            layer: {
                self._name: self._number(self._values[layer], share),
                "k_min": self.full_k if share <= 0 else self.k_min,
            }
            for layer, share in enumerate(shares)
        }
        return self._candidate(PER_LAYER[self.kind], {"layers": layers})

    def _candidate(self, kind: Kind, rule: dict[str, Any]) -> Candidate:
        return Candidate(kind, _POLICY.validate_python({"kind": self.kind, **rule}))

    def _number(self, values: npt.NDArray[np.float32], x: float) -> float:
        """A ratio drops the experts whose value lies below it, a share those whose value reaches it."""
        if self.kind == "ratio":
            return 0.0 if x <= 0 else 1.0 if x >= 1 else round(float(np.quantile(values, x)), DECIMALS + 2)
        if x <= 0:
            return 1.0
        return _SMALLEST if x >= 1 else max(_SMALLEST, round(float(np.quantile(values, 1 - x)), DECIMALS + 2))

    def _dropped_at(self, routers: RouterTraces, layer: int) -> npt.NDArray[np.float32]:
        """[W, n, K - k_min] the number at which each expert beyond `k_min` goes."""
        scores = np.asarray(routers.scores[:, :, layer], np.float64)
        match self.kind:
            case "ratio":
                # By score, which a correction bias does not follow.
                by_size = -np.sort(-scores, axis=-1)
                values = by_size / by_size[..., :1]
            case "top_p":
                values = (np.cumsum(scores, axis=-1) - scores) / routers.total[:, :, layer, None]
            case "contribution":
                weighed = scores * routers.norms[layer][routers.experts[:, :, layer]]
                values = (np.cumsum(weighed, axis=-1) - weighed) / weighed.sum(axis=-1, keepdims=True)
        dropped: npt.NDArray[np.float32] = values[..., self.k_min :].astype(np.float32)
        return dropped
