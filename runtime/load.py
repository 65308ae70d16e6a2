# SPDX-License-Identifier: Apache-2.0
"""The engine's load, and the step of a `by_load` policy that it calls for."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from adaptive_k_moe.policy import LOAD_LIMITS, ByLoadPolicy, LoadStep

WINDOW_SECONDS = 1.0
"""The time over which `time_between_tokens` is a mean."""


class Load(NamedTuple):
    """How much the engine has to do; the limits of a `LoadStep` are of these.

    Attributes:
        queue: sequences that wait for a place in the batch, without those of the background.
        time_between_tokens: mean seconds between two tokens of a sequence; 0 if there was none lately.
    """

    queue: int = 0
    time_between_tokens: float = 0.0


class TokenTimes:
    """The mean time between two tokens, over the last second."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float, int]] = deque()  # when, sum of seconds, how many

    def add(self, now: float, intervals: Sequence[float]) -> None:
        """Take what a step brought: the seconds since the token before, of each sequence that had one."""
        if intervals:
            self._steps.append((now, sum(intervals), len(intervals)))
            while self._steps[0][0] < now - WINDOW_SECONDS:
                self._steps.popleft()

    def mean(self, now: float) -> float:
        """Seconds; 0 if the last token is longer ago."""
        if not self._steps or now - self._steps[-1][0] > WINDOW_SECONDS:
            self._steps.clear()
            return 0.0
        return sum(seconds for _, seconds, _ in self._steps) / sum(count for *_, count in self._steps)


class LoadFollower:
    """Which step of a policy the load calls for.

    Each step begins as soon as the load reaches one of its limits, and is left when the load has been below
    `leave_share` of each of them for `leave_seconds`. The last step that has begun is taken.

    Args:
        policy: its steps and when they are left.
    """

    def __init__(self, policy: ByLoadPolicy) -> None:
        self.policy = policy
        self._steps = policy.reachable
        # Since when the load has been low for each step; inf is not at all, -inf a step that has not begun.
        self._low_since = [math.inf, *(-math.inf for _ in self._steps[1:])]

    def update(self, load: Load, now: float) -> None:
        """Take the load of a moment, in seconds that never fall."""
        for index, step in enumerate(self._steps[1:], 1):
            share, begun = _share_of_limits(step, load), self._begun(index, now)
            if share >= 1.0 or (begun and share >= self.policy.leave_share):
                self._low_since[index] = math.inf
            else:
                self._low_since[index] = min(self._low_since[index], now) if begun else -math.inf

    def step(self, now: float) -> int:
        """Index of the step to take: the last that has begun. Between two updates the load is what it was."""
        return max(index for index in range(len(self._steps)) if self._begun(index, now))

    def policy_at(self, now: float) -> str:
        """Name of the policy of the step to take."""
        return self._steps[self.step(now)].policy

    def _begun(self, index: int, now: float) -> bool:
        return now - self._low_since[index] < self.policy.leave_seconds


def _share_of_limits(step: LoadStep, load: Load) -> float:
    """The load as a share of the step's limits, of that which it is nearest to: 1 begins the step."""
    limits = {name: getattr(step, name) for name in LOAD_LIMITS}
    shares: list[float] = [getattr(load, name) / limit for name, limit in limits.items() if limit is not None]
    return max(shares)
