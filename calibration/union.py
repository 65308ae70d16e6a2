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

from adaptive_k_moe.calibration.evaluator import Evaluator
from adaptive_k_moe.calibration.routers import ranked_experts
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


def unions(evaluator: Evaluator, windows: Windows, policies: Sequence[str], batches: Sequence[int]) -> list[Union]:
    """Distinct experts of policies, as if windows were sequences that decode in step.

    k is the engine's own under each policy; which experts rank first is taken from the full model's routers, so the
    small change of ranking that a policy brings about itself is left out.

    Args:
        evaluator: the engine, of the target openvino; its session is closed meanwhile.
        windows: W windows of n tokens.
        policies: names; `full` comes first, whether named or not.
        batches: sequences in a step; those above W are left out.
    """
    tables = evaluator.config.policy_tables()
    experts = ranked_experts(evaluator, windows, int(tables.k_values.max())).astype(np.int64)
    num_experts = evaluator.config.pretrained_config.num_experts
    found: list[Union] = []
    for name in dict.fromkeys([FULL, *policies]):
        k = np.concatenate([part.k for part in evaluator.batches(windows, tables, tables.index(name))])
        chosen = np.zeros((*k.shape, num_experts), bool)
        np.put_along_axis(chosen, experts, np.arange(experts.shape[-1]) < k[..., None], axis=-1)
        for batch in batches:
            if batch <= len(windows):
                distinct = distinct_experts(chosen, batch)
                full = next((item.distinct for item in found if (item.policy, item.batch) == (FULL, batch)), distinct)
                found.append(Union(name, batch, distinct, distinct / full))
    return found
