# SPDX-License-Identifier: Apache-2.0
"""Candidates and their measurement: one policy, one pass over a text, each made once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.calibration.evaluator import Evaluator, Reference, Scores, random_rows
from adaptive_k_moe.calibration.kinds import Kind
from adaptive_k_moe.calibration.recording import EvaluationCache
from adaptive_k_moe.calibration.timing import StepTime
from adaptive_k_moe.calibration.windows import Windows
from adaptive_k_moe.policy import FixedPolicy, Policy, PolicyTables, rules_of
from adaptive_k_moe.policy_kinds import KINDS

DECIMALS = 4
"""Thresholds are rounded before they are measured, so that the file says what was measured."""


@dataclass(frozen=True)
class Candidate:
    """A policy with the kind it was made as; `random` is a control that no policy file can express.

    Attributes:
        kind: how it decides.
        policy: the rule; for `random` the rule of the tokens that were drawn.
        share: `random` only: share of the tokens drawn, the others run the trained top-k.
        seed: `random` only: of the draw.
    """

    kind: Kind
    policy: Policy
    share: float | None = None
    seed: int = 0

    def key(self) -> str:
        """A description that is equal for equal candidates, whatever kind they were made as."""
        content: dict[str, Any] = self.policy.model_dump(mode="json", exclude_none=True)
        if self.share is not None:
            content["random"] = [self.share, self.seed]
        return json.dumps(content, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Measured:
    """A candidate and its scores."""

    candidate: Candidate
    scores: Scores


class Laboratory:
    """Measures candidates on one text, each once.

    Args:
        evaluator: the engine.
        windows: the text.
        reference: the full model's predictions of it; None where `_read` knows them.
        cache: scores from before.
        on_evaluation: called before each pass over the text, with what is measured.

    Attributes:
        passes: over the text, so far.
        step_time: what decode steps take, for budgets of time.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        windows: Windows,
        reference: Reference | None,
        cache: EvaluationCache,
        *,
        on_evaluation: Callable[[str], None] | None = None,
    ) -> None:
        self.evaluator = evaluator
        self.windows = windows
        self._reference = reference
        self._cache = cache
        self._on_evaluation = on_evaluation
        self.passes = 0
        self.step_time: StepTime | None = None

    def measure(self, candidate: Candidate) -> Measured:
        """A candidate's scores, from the cache or by a pass over the text."""
        key = candidate.key()
        if any(KINDS[rule.kind].uses_norms for rule in rules_of(candidate.policy, {})):
            key += hashlib.sha256(json.dumps(self.evaluator.expert_norms).encode()).hexdigest()
        scores = self._cache.get(key)
        if scores is None:
            if self._on_evaluation is not None:
                self._on_evaluation(candidate.kind.replace("_", " "))
            rows: int | npt.NDArray[np.int32] = 1
            policies: dict[str, Policy] = {"candidate": candidate.policy}
            if candidate.share is not None:
                policies["others"] = FixedPolicy(kind="fixed", k=self.evaluator.full_k)
                rows = random_rows(self.windows.tokens.shape, candidate.share, candidate.seed)
            scores = self._read(self.evaluator.tables(policies), rows)
            self._cache.put(key, scores)
            self.passes += 1
        return Measured(candidate, scores)

    def _read(self, tables: PolicyTables, rows: int | npt.NDArray[np.int32]) -> Scores:
        """One pass over the text; the policy's row, or one for each token."""
        return self.evaluator.scores(self.windows, tables, rows, self._reference)

    def full(self) -> Measured:
        """The trained top-k."""
        return self.measure(static(self.evaluator.full_k))


class Budget(NamedTuple):
    """What a policy may use or cost; exactly one is set.

    Attributes:
        avg_k: mean experts run for a token in a layer.
        perplexity_increase: share by which perplexity may rise.
        reads: share of the experts that the full model reads in decode; for texts read in decode steps.
        time: share of the full model's time of a decode step.
        kl: KL divergence from the full model, nats a token.
    """

    avg_k: float | None = None
    perplexity_increase: float | None = None
    reads: float | None = None
    time: float | None = None
    kl: float | None = None

    @property
    def bounds_damage(self) -> bool:
        """Whether it says what may be lost, and not what may be used."""
        return self.perplexity_increase is not None or self.kl is not None


def static(k: int) -> Candidate:
    """The same k everywhere."""
    return Candidate("static", FixedPolicy(kind="fixed", k=k))
