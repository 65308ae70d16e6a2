# SPDX-License-Identifier: Apache-2.0
"""How many different experts a step of decode touches: a batch needs the union of its tokens' experts.

Weights are read once a step whoever shares them, so where reading weights is what takes the time, the union is what
decode pays for, and it shrinks less than k does as the batch grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.calibration.evaluator import Evaluator
from adaptive_k_moe.calibration.windows import Windows
from adaptive_k_moe.policy import FULL


@dataclass(frozen=True)
class Union:
    """One policy at one batch.

    Attributes:
        policy: its name.
        batch: sequences in a step.
        distinct: mean number of different experts in a layer and step.
        ratio: that over `full`'s.
    """

    policy: str
    batch: int
    distinct: float
    ratio: float

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return {"policy": self.policy, "batch": self.batch, "distinct": self.distinct, "ratio": self.ratio}


def distinct_experts(chosen: npt.NDArray[np.bool_], batch: int) -> float:
    """Mean size of the union over groups of sequences, positions and layers.

    Args:
        chosen: [W, n, L, E] whether a token runs an expert.
        batch: sequences in a group; what does not fill one is left out.
    """
    groups = len(chosen) // batch
    grouped = chosen[: groups * batch].reshape(groups, batch, *chosen.shape[1:])
    return float(grouped.any(axis=1).sum(axis=-1).mean())


def unions(
    evaluator: Evaluator,
    windows: Windows,
    router_logits: npt.NDArray[np.float32],
    policies: Sequence[str],
    batches: Sequence[int],
) -> list[Union]:
    """Distinct experts of policies, as if windows were sequences that decode in step.

    k is the engine's own under each policy; which experts rank first is taken from the full model's logits, so
    the small change of ranking that a policy brings about itself is left out.

    Args:
        evaluator: the engine.
        windows: W windows of n tokens.
        router_logits: [W, n, L, E] of the full model.
        policies: names; `full` comes first, whether named or not.
        batches: sequences in a step; those above W are left out.

    Raises:
        CalibrationError: the model does not rank experts by their logits.
    """
    if evaluator.config.pretrained_config.moe.scoring != "softmax":
        raise CalibrationError("distinct experts are counted for softmax routers only: leave out --checkpoint_dir.")
    tables = evaluator.config.policy_tables()
    # The rank of each expert; ties to the lowest index, as in the operator.
    ranks = np.argsort(np.argsort(-router_logits, axis=-1, kind="stable"), axis=-1, kind="stable")
    found: list[Union] = []
    for name in dict.fromkeys([FULL, *policies]):
        k = np.concatenate([part.k for part in evaluator.batches(windows, tables, tables.index(name))])
        chosen = ranks < k[..., None]
        for batch in batches:
            if batch <= len(windows):
                distinct = distinct_experts(chosen, batch)
                full = next((item.distinct for item in found if (item.policy, item.batch) == (FULL, batch)), distinct)
                found.append(Union(name, batch, distinct, distinct / full))
    return found
