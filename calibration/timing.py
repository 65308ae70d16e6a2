# SPDX-License-Identifier: Apache-2.0
"""Time of policies on an engine, as ratios from interleaved rounds.

Every round times every policy once, in an order that rotates, so that a machine that is busy for a while is busy
for all. All policies read the same tokens, so a policy's choice of words is not in its time. A step's time is the
least of its rounds: other programs can only make it longer.
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

PREFILL_STEPS = 3
"""Different prompts (or groups of them) that are read in a round."""


@dataclass(frozen=True)
class Timing:
    """One policy's time in one phase at one batch.

    Attributes:
        policy: its name.
        phase: reading prompts, or one token a sequence a step.
        batch: sequences in a step.
        num_tokens: tokens of one round.
        seconds: sum over the steps of the least time that each took in any round.
        tokens_per_second: `num_tokens` over `seconds`.
        ratio: `seconds` over `full`'s, with an interval from resampled rounds. `full` is timed twice in every round,
            and its own ratio is that of the second time to the first: what the machine's noise makes of no change.
        avg_k: mean experts run for a token in a layer, over the tokens that were timed.
        reads: mean experts of a layer that a step reads; None where the session does not say.
    """

    policy: str
    phase: Phase
    batch: int
    num_tokens: int
    seconds: float
    tokens_per_second: float
    ratio: Interval
    avg_k: float
    reads: float | None = None

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return {**asdict(self), "ratio": self.ratio.to_json()}


@dataclass(frozen=True)
class StepTime:
    """Time of a decode step by what it reads and runs, as a share of `full`'s.

    Attributes:
        fixed: what every step takes.
        by_reads: what one expert more to read takes, in every layer.
        by_k: what one expert more to run takes, for every token and layer.
        sharing: what agreeing on experts takes.
        largest_error: by which the fit differs from the time of a policy that it was fitted to.
    """

    fixed: float
    by_reads: float
    by_k: float
    sharing: float
    largest_error: float

    def share(self, reads: float, avg_k: float, *, sharing: bool) -> float:
        """Expected time of a policy.

        Args:
            reads: mean experts of a layer that a step reads.
            avg_k: mean experts run for a token in a layer.
            sharing: whether its rule sees the whole step.
        """
        return self.fixed + self.by_reads * reads + self.by_k * avg_k + self.sharing * sharing

    @classmethod
    def fit(cls, timings: Sequence[Timing], sharing: Sequence[bool]) -> StepTime:
        """Least squares with no term below 0.

        Args:
            timings: of policies that differ in what they read and run, with reads.
            sharing: of each, whether its rule sees the whole step.
        """
        rows = [
            (1.0, timing.reads or 0.0, timing.avg_k, float(sees)) for timing, sees in zip(timings, sharing, strict=True)
        ]
        terms, ratios = np.array(rows), np.array([timing.ratio.value for timing in timings])
        kept = list(range(terms.shape[1]))
        while True:
            found = np.linalg.lstsq(terms[:, kept], ratios, rcond=None)[0]
            if (found >= 0).all():
                break
            del kept[int(found.argmin())]
        values = np.zeros(terms.shape[1])
        values[kept] = found
        error = float(np.abs(terms @ values - ratios).max())
        return cls(float(values[0]), float(values[1]), float(values[2]), float(values[3]), error)


def time_policies(
    evaluator: Evaluator,
    windows: Windows,
    tables: PolicyTables,
    names: Sequence[str],
    *,
    batches: Sequence[int] = (1, 4, 16),
    rounds: int = 15,
    decode_steps: int = 12,
    phases: Sequence[Phase] = ("prefill", "decode"),
    prompt_tokens: int = PROMPT_TOKENS,
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
        phases: what is timed.
        prompt_tokens: of each sequence before the first decoded one.
        progress: called with what is timed next.
    """
    rows = {name: tables.index(name) for name in dict.fromkeys([tables.names[0], *names])}
    evaluator.session.set_policies(tables)
    build, results = evaluator.config.build_config, []
    for phase in phases:
        for batch in batches:
            length = min(windows.window, build.max_num_tokens // batch)
            needed = 2 if phase == "prefill" else prompt_tokens + decode_steps
            if batch > min(build.max_batch_size, len(windows)) or length < 2 or windows.window < needed:
                continue
            if phase == "prefill":
                groups = max(1, min(PREFILL_STEPS, len(windows) // batch))
                pieces = [windows.tokens[at * batch : (at + 1) * batch, :length] for at in range(groups)]
            else:
                pieces = [windows.tokens[:batch, :needed]]
            seconds: dict[str | None, list[list[float]]] = {name: [] for name in (None, *rows)}
            used: dict[str | None, tuple[float, float | None]] = {}
            order = list(seconds)
            if progress is not None:
                progress(f"{phase}, batch {batch}")
            for turn in range(rounds + 1):
                for name in order:
                    index = rows[name] if name else 0
                    decode_row = tables.decode_row[index]
                    elapsed, used[name] = _run(evaluator, pieces, (index, decode_row), phase, prompt_tokens)
                    if turn:
                        seconds[name].append(elapsed)
                order = order[1:] + order[:1]
            num_tokens = sum(piece.size for piece in pieces) if phase == "prefill" else batch * decode_steps
            full = np.array(seconds[None])  # row 0, once more beside the one that goes by its name
            for name in rows:
                own = np.array(seconds[name])
                least = float(own.min(axis=0).sum())
                results.append(
                    Timing(name, phase, batch, num_tokens, least, num_tokens / least, _ratio(own, full), *used[name])
                )
    return results


def _run(
    evaluator: Evaluator, pieces: Sequence[npt.NDArray[np.int64]], rows: tuple[int, int], phase: Phase, prompt: int
) -> tuple[list[float], tuple[float, float | None]]:
    """Seconds of each step in the session; average k and reads over the steps.

    Args:
        evaluator: the engine.
        pieces: prompts to read, or the sequences to decode.
        rows: of both phases.
        phase: what is timed.
        prompt: tokens of each sequence before the first decoded one.
    """
    seconds: list[float] = []
    ks: list[float] = []
    reads: list[float] = []

    def timed(tokens: npt.NDArray[np.int64], past: int) -> None:
        own = np.full(tokens.shape, rows[phase == "decode"], np.int32)
        wanted = np.arange(1, len(tokens) + 1) * tokens.shape[1] - 1
        started = time.perf_counter()
        output = evaluator.step(tokens, own, wanted, past=past)
        seconds.append(time.perf_counter() - started)
        ks.append(float(output.k.mean()))
        if output.reads is not None:
            reads.append(float(output.reads.mean()))

    if phase == "prefill":
        for piece in pieces:
            timed(piece, 0)
    else:
        (tokens,) = pieces
        evaluator.prefill(tokens[:, :prompt], rows[0])
        for past in range(prompt, tokens.shape[1]):
            timed(tokens[:, past : past + 1], past)
    return seconds, (float(np.mean(ks)), float(np.mean(reads)) if reads else None)


def _ratio(own: npt.NDArray[np.float64], full: npt.NDArray[np.float64]) -> Interval:
    """Ratio of the least times; own and full are [rounds, steps], resampled by round together."""
    picks = np.random.default_rng(0).integers(len(own), size=(1000, len(own)))
    ratios = own[picks].min(axis=1).sum(axis=-1) / full[picks].min(axis=1).sum(axis=-1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Interval(float(own.min(axis=0).sum() / full.min(axis=0).sum()), float(low), float(high))
