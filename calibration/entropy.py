# SPDX-License-Identifier: Apache-2.0
"""Entropy of routers and the rule by which the seeds choose k, on plain arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.policy import EntropyChoices, parse_policy_set

FloatArray = npt.NDArray[np.float32] | npt.NDArray[np.float64]

BITS = 1 / math.log(2)
"""Bits in a nat."""


def router_entropy(logits: FloatArray) -> npt.NDArray[np.float64]:
    """Entropy of the softmax over all experts, in nats.

    Args:
        logits: [..., E] raw router logits, before any top-k.
    """
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    weights = np.exp(shifted)
    total = weights.sum(axis=-1)
    entropy: npt.NDArray[np.float64] = np.log(total) - (weights * shifted).sum(axis=-1) / total
    return np.maximum(entropy, 0.0)


@dataclass(frozen=True)
class EntropyRule:
    """k by entropy: `k[i]` for the first i with entropy below `thresholds[i]`, else the last.

    Attributes:
        thresholds: rising, in nats.
        k: one more than thresholds.
    """

    thresholds: tuple[float, ...]
    k: tuple[int, ...]

    @classmethod
    def checked(cls, thresholds: Sequence[float], k: Sequence[int], unit: str, *, num_experts: int) -> EntropyRule:
        """A rule in nats, from thresholds in a unit.

        Raises:
            CalibrationError: the unit is unknown, or a threshold is beyond what the experts' entropy can reach.
            PolicyError: thresholds do not rise, or there is not one k more than thresholds.
        """
        if unit not in ("nats", "bits"):
            raise CalibrationError(f"the unit {unit!r} is neither 'nats' nor 'bits'.")
        policy = {"kind": "entropy", "thresholds": list(thresholds), "k": list(k)}
        parse_policy_set({"unit": unit, "policies": {"rule": policy}}, "the rule")
        rule = EntropyChoices(thresholds=list(thresholds), k=list(k))
        most = math.log(num_experts) * (BITS if unit == "bits" else 1.0)
        if rule.thresholds and rule.thresholds[-1] >= most > 0:
            other = "bits" if unit == "nats" else "nats"
            raise CalibrationError(
                f"no entropy of {num_experts} experts reaches the threshold {rule.thresholds[-1]:g} {unit} (at most "
                f"{most:.3f}): correct it, or say {other} if that is its unit."
            )
        per_unit = 1 / BITS if unit == "bits" else 1.0
        return cls(tuple(limit * per_unit for limit in rule.thresholds), tuple(rule.k))

    def choose(self, entropy: FloatArray) -> npt.NDArray[np.int64]:
        """K for each entropy in nats."""
        return np.array(self.k)[np.searchsorted(np.array(self.thresholds), entropy, side="right")]

    def capped(self, full_k: int) -> EntropyRule:
        """The rule with no k above the trained top-k."""
        return EntropyRule(self.thresholds, tuple(min(k, full_k) for k in self.k))

    def merged(self) -> EntropyRule:
        """The same rule without thresholds between equal k."""
        kept = [i for i in range(len(self.thresholds)) if self.k[i] != self.k[i + 1]]
        return EntropyRule(tuple(self.thresholds[i] for i in kept), (*(self.k[i] for i in kept), self.k[-1]))


def seed_rule(num_experts: int, full_k: int) -> EntropyRule:
    """The rule that was published for this size of model: 0.6 and 1.2 nats for 8 experts, 4.5 and 5.5 bits for 128.

    Other numbers of experts take the published thresholds of 128 as shares of the greatest entropy.
    """
    if num_experts <= 8:
        return EntropyRule((0.6, 1.2), (1, 2, 4)).capped(full_k)
    most = math.log(num_experts)
    thresholds = tuple(bits / 7 * most for bits in (4.5, 5.5))
    return EntropyRule(thresholds, tuple(max(1, round(full_k * part)) for part in (1 / 3, 2 / 3, 1)))
