# SPDX-License-Identifier: Apache-2.0
"""Time of policies on an engine, as ratios from interleaved rounds.

Every round times every policy once, in an order that rotates, and a policy's time counts as its ratio to
`full` in the same round: a machine that is busy for a while is busy for both. All policies read the same
tokens, so a policy's choice of words is not in its time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.calibration.bootstrap import Interval
from adaptive_k_moe.calibration.evaluator import Evaluator
from adaptive_k_moe.calibration.windows import Windows
from adaptive_k_moe.policy import PolicyTables

Phase = Literal["prefill", "decode"]

PROMPT_TOKENS = 32
"""Tokens of each sequence before the first decoded one."""


@dataclass(frozen=True)
class Timing:
    """One policy's time in one phase at one batch.

    Attributes:
        policy: its name.
        phase: reading prompts, or one token a sequence a step.
        batch: sequences in a step.
        num_tokens: tokens of one round.
        seconds: median over the rounds.
        tokens_per_second: `num_tokens` over `seconds`.
        ratio: median over the rounds of the time over `full`'s in the same round, and its interval.
        avg_k: mean experts run for a token in a layer, over the tokens that were timed.
    """

    policy: str
    phase: Phase
    batch: int
    num_tokens: int
    seconds: float
    tokens_per_second: float
    ratio: Interval
    avg_k: float

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return {**asdict(self), "ratio": self.ratio.to_json()}


def time_policies(
    evaluator: Evaluator,
    windows: Windows,
    tables: PolicyTables,
    names: Sequence[str],
    *,
    batches: Sequence[int] = (1, 4, 16),
    rounds: int = 7,
    decode_steps: int = 24,
    progress: Callable[[str], None] | None = None,
) -> list[Timing]:
    """Times of prefill and decode.

    Args:
        evaluator: the engine.
        windows: the text; only its first windows are used.
        tables: holds the policies.
        names: the policies to time; `full` (row 0) is timed, too.
        batches: sequences in a step; those that the engine or the text is too small for are left out.
        rounds: how often each is timed; a round before them warms up.
        decode_steps: tokens that each sequence decodes in a round.
        progress: called with what is timed next.
    """
    rows = {name: tables.index(name) for name in dict.fromkeys([tables.names[0], *names])}
    evaluator.session.set_policies(tables)
    build, results = evaluator.config.build_config, []
    phases: tuple[Phase, ...] = ("prefill", "decode")
    for phase in phases:
        for batch in batches:
            length = min(windows.window, build.max_num_tokens // batch)
            needed = 2 if phase == "prefill" else PROMPT_TOKENS + decode_steps
            if batch > min(build.max_batch_size, len(windows)) or length < 2 or windows.window < needed:
                continue
            tokens = windows.tokens[:batch, : length if phase == "prefill" else needed]
            seconds: dict[str, list[float]] = {name: [] for name in rows}
            avg_k: dict[str, float] = {}
            order = list(rows)
            if progress is not None:
                progress(f"{phase}, batch {batch}")
            for turn in range(rounds + 1):
                for name in order:
                    elapsed, avg_k[name] = _run(evaluator, tokens, rows[name], phase)
                    if turn:
                        seconds[name].append(elapsed)
                order = order[1:] + order[:1]
            num_tokens = batch * (tokens.shape[1] if phase == "prefill" else decode_steps)
            full = np.array(seconds[tables.names[0]])
            for name in rows:
                own = np.array(seconds[name])
                median = float(np.median(own))
                results.append(
                    Timing(
                        name,
                        phase,
                        batch,
                        num_tokens,
                        median,
                        num_tokens / median,
                        _median_interval(own / full),
                        avg_k[name],
                    )
                )
    return results


def _run(evaluator: Evaluator, tokens: npt.NDArray[np.int64], row: int, phase: Phase) -> tuple[float, float]:
    """Seconds in the session, and the average k."""
    count, n = tokens.shape
    if phase == "prefill":
        rows = np.full(tokens.shape, row, np.int32)
        wanted = np.arange(1, count + 1) * n - 1
        started = time.perf_counter()
        output = evaluator.step(tokens, rows, wanted)
        return time.perf_counter() - started, float(output.k.mean())
    prompt = tokens[:, :PROMPT_TOKENS]
    evaluator.step(prompt, np.full(prompt.shape, row, np.int32), np.arange(1, count + 1) * PROMPT_TOKENS - 1)
    rows = np.full((count, 1), row, np.int32)
    seconds, ks = 0.0, []
    for past in range(PROMPT_TOKENS, n):
        started = time.perf_counter()
        output = evaluator.step(tokens[:, past : past + 1], rows, np.arange(count), past=past)
        seconds += time.perf_counter() - started
        ks.append(output.k.mean())
    return seconds, float(np.mean(ks))


def _median_interval(ratios: npt.NDArray[np.float64]) -> Interval:
    picks = np.random.default_rng(0).integers(len(ratios), size=(1000, len(ratios)))
    low, high = np.quantile(np.median(ratios[picks], axis=1), [0.025, 0.975])
    return Interval(float(np.median(ratios)), float(low), float(high))
