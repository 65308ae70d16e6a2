# SPDX-License-Identifier: Apache-2.0
"""The routers' entropy on sets of text, measured in two ways, beside what others have reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.calibration import bootstrap
from adaptive_k_moe.calibration.bootstrap import Interval
from adaptive_k_moe.calibration.entropy import BITS, EntropyRule, FloatArray, router_entropy
from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.calibration.evaluator import Evaluator
from adaptive_k_moe.calibration.hooks import HookedModel
from adaptive_k_moe.calibration.windows import Windows

AGREEMENT_BITS = 1e-3
"""Hooks and engine may differ by this much at any token and layer."""

REPORTED_SOURCE = "reported by others for Nemotron 3 Nano (128 experts, top-6, k of 2, 4 and 6), not measured here"

REPORTED: list[dict[str, Any]] = [
    {"set": "easy", "entropy_bits": 5.26, "effective_k": 4.1, "savings": 0.324},
    {"set": "code", "entropy_bits": 5.28, "effective_k": 4.0, "savings": 0.333},
    {"set": "hard", "entropy_bits": 5.16, "effective_k": 3.9, "savings": 0.344},
    {"set": "average", "entropy_bits": 5.23, "effective_k": 4.0, "savings": 0.333},
]


@dataclass(frozen=True, eq=False)
class SetValidation:
    """One set of text.

    Attributes:
        name: of the set, or "average" for the mean over sets.
        entropy: bits, mean over tokens and layers.
        effective_k: mean k by the rule.
        savings: share of expert runs that the rule leaves out; a count, not a time.
        layer_entropy: the entropy of each layer, bits.
        layer_k: the mean k of each layer.
    """

    name: str
    entropy: Interval
    effective_k: Interval
    savings: Interval
    layer_entropy: list[Interval]
    layer_k: list[Interval]

    def to_json(self) -> dict[str, Any]:
        """Figures with 95 % intervals over windows."""
        return {
            "set": self.name,
            "entropy_bits": self.entropy.to_json(),
            "effective_k": self.effective_k.to_json(),
            "savings": self.savings.to_json(),
            "layers": [
                {"entropy_bits": entropy.to_json(), "effective_k": k.to_json()}
                for entropy, k in zip(self.layer_entropy, self.layer_k, strict=True)
            ],
        }


def summarize(entropy: FloatArray, rule: EntropyRule, full_k: int, name: str) -> SetValidation:
    """A set's row.

    Args:
        entropy: [W, n, L] nats.
        rule: chooses k.
        full_k: the trained top-k, which savings are against.
        name: of the set.
    """
    bits = (np.asarray(entropy, np.float64) * BITS).mean(axis=1)  # [W, L]
    k = rule.choose(entropy).astype(np.float64).mean(axis=1)
    return SetValidation(
        name,
        bootstrap.mean(bits.mean(axis=1)),
        bootstrap.mean(k.mean(axis=1)),
        bootstrap.mean(1 - k.mean(axis=1) / full_k),
        [bootstrap.mean(column) for column in bits.T],
        [bootstrap.mean(column) for column in k.T],
    )


def hook_entropies(
    model: HookedModel, windows: Windows, *, progress: Callable[[int], None] | None = None
) -> npt.NDArray[np.float64]:
    """[W, n, L] nats, from the full softmax of the logits that hooks caught."""
    return router_entropy(model.router_logits(windows.tokens, progress=progress))


def engine_entropies(evaluator: Evaluator, windows: Windows) -> npt.NDArray[np.float64]:
    """[W, n, L] nats, from the engine's own output under the trained top-k."""
    tables = evaluator.tables({})
    return np.concatenate([batch.entropy for batch in evaluator.batches(windows, tables, 0)]).astype(np.float64)


def check_agreement(hooks: npt.NDArray[np.float64], engine: npt.NDArray[np.float64]) -> float:
    """The largest difference between the two ways, bits.

    Raises:
        CalibrationError: it is above `AGREEMENT_BITS`, so one of the two is not the model.
    """
    if hooks.shape != engine.shape:
        raise CalibrationError(
            f"hooks saw {hooks.shape[-1]} routers and the engine {engine.shape[-1]}: they are not the same model."
        )
    gap = np.abs(hooks - engine) * BITS
    largest = float(gap.max())
    if not largest <= AGREEMENT_BITS:
        window, token, layer = np.unravel_index(int(np.nanargmax(gap)), gap.shape)
        raise CalibrationError(
            f"hooks and engine differ by {largest:.2g} bits in MoE layer {layer} (window {window}, token {token}), "
            f"more than the {AGREEMENT_BITS:g} that rounding explains: one of the two does not run this model."
        )
    return largest
