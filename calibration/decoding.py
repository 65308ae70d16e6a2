# SPDX-License-Identifier: Apache-2.0
"""Texts read in decode steps: what a policy costs and reads where several sequences generate at once.

One position of B windows is one step, with the text's own next tokens (teacher forcing). A window's first tokens are
its prompt and follow the policy's rule for prompts; all others are decoded, a token of every window in each step. So a
policy that looks at the whole step sees the company that it has in a server.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.calibration import bootstrap
from adaptive_k_moe.calibration.bootstrap import Interval
from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.calibration.evaluator import (
    TOP_TOKENS,
    Evaluator,
    Float64Array,
    FloatArray,
    Progress,
    Reference,
    Scores,
    kl_divergence,
    log_softmax,
    take,
)
from adaptive_k_moe.calibration.recording import top_tokens
from adaptive_k_moe.calibration.timing import Timing
from adaptive_k_moe.calibration.windows import Windows
from adaptive_k_moe.policy import PolicyTables

MAX_STEPS = 1024
"""Decode steps of a reading, at most: enough tokens for a figure, and at batch 1 not the whole text."""

ALONE_AT_ONCE = 16
"""Steps of one sequence that are taken together where they cannot tell: a step of 16 takes far less than 16 of one."""


@dataclass(frozen=True, eq=False)
class DecodeStep:
    """What one step said. B sequences, L MoE layers, V the vocabulary.

    Attributes:
        windows: [B] their rows in `Windows.tokens`.
        position: of the token that each of them decoded; the next one is predicted.
        log_probs: [B, V] log-probabilities of the next token.
        k: [B, L] experts run.
        reads: [L] experts that some sequence ran; [B, L] where each sequence stands for a step of its own.
    """

    windows: npt.NDArray[np.int64]
    position: int
    log_probs: FloatArray
    k: npt.NDArray[np.int32]
    reads: npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Decoding:
    """One policy in decode steps of one batch size.

    Attributes:
        policy: its name.
        batch: sequences in a step.
        scores: by window, with reads.
        full: `full`'s scores of the same windows at the same batch.
        timing: decode steps against `full`'s; None where no times were taken.
    """

    policy: str
    batch: int
    scores: Scores
    full: Scores
    timing: Timing | None = None

    @property
    def reads_share(self) -> float:
        """Experts read, of those that `full` reads."""
        return self.scores.avg_reads / self.full.avg_reads

    @property
    def perplexity_change(self) -> Interval:
        """Against `full`, paired by window."""
        return bootstrap.perplexity_change(self.scores.nll, self.full.nll)

    @property
    def kl(self) -> Interval:
        """To `full`, nats a token."""
        return bootstrap.mean(self.scores.kl)

    def to_json(self) -> dict[str, Any]:
        """Figures with their 95 % intervals."""
        assert self.scores.reads is not None
        return {
            "policy": self.policy,
            "batch": self.batch,
            "windows": len(self.scores.nll),
            "avg_k": self.scores.avg_k,
            "reads": self.scores.avg_reads,
            "reads_share": self.reads_share,
            "reads_by_layer": self.scores.reads.mean(axis=0).tolist(),
            "kl_to_full_nats": self.kl.to_json(),
            "perplexity": self.scores.perplexity,
            "perplexity_change": self.perplexity_change.to_json(),
            "timing": None if self.timing is None else self.timing.to_json(),
        }


def why_too_large(evaluator: Evaluator, windows: Windows, batch: int) -> str | None:
    """Why steps of so many sequences cannot be read; None where they can."""
    most = evaluator.config.build_config.max_batch_size
    if batch < 1:
        return "a step has at least 1 sequence"
    if batch > most:
        return f"this engine takes at most {most} sequences in a step"
    if batch > len(windows):
        return f"the text fills only {len(windows)} windows of {windows.window} tokens"
    return None


class DecodeReader:
    """Reads windows in decode steps of B sequences; the windows that do not fill a group of B are left out.

    The windows of a group lie far apart in the text, as requests that meet in a server have little to do with each
    other. Steps of one sequence are taken many at a time where the rule does not look at the others.

    Args:
        evaluator: the engine.
        windows: the text.
        batch: B.
        max_steps: most decode steps of a reading; at least one group is read.

    Attributes:
        windows: the W windows that are read, group after group.
        batch: B.
        prompt: tokens of each window that are its prompt, the first half.

    Raises:
        CalibrationError: the engine or the text is too small for B, or the windows for prompt and answer.
    """

    def __init__(self, evaluator: Evaluator, windows: Windows, batch: int, *, max_steps: int = MAX_STEPS) -> None:
        evaluator.check_window(windows.window)
        reason = why_too_large(evaluator, windows, batch)
        if reason is not None:
            raise CalibrationError(f"decode steps of {batch} sequences cannot be read: {reason}.")
        self.prompt = max(windows.first, windows.window // 2)
        self._steps = windows.window - 1 - self.prompt
        if self._steps < 1:
            raise CalibrationError(
                f"a window of {windows.window} tokens has no room for a prompt and an answer: give a larger --window."
            )
        groups = max(1, min(len(windows) // batch, max_steps // self._steps))
        chosen = np.linspace(0, len(windows) - 1, groups * batch).astype(np.int64)
        self.windows = windows.take(chosen.reshape(batch, groups).T.ravel())
        self.batch = batch
        self._evaluator = evaluator
        self._reference: Reference | None = None

    def steps(self, tables: PolicyTables, policy: int) -> Iterator[DecodeStep]:
        """All decode steps, group after group.

        Args:
            tables: the policies.
            policy: index of the policy; prompts follow its own row, decoded tokens the one for them.
        """
        evaluator = self._evaluator
        evaluator.session.set_policies(tables)
        alone = self.batch == 1 and not tables.sees_step(policy)
        at_once = min(ALONE_AT_ONCE, evaluator.config.build_config.max_batch_size) if alone else self.batch
        for begin in range(0, len(self.windows), at_once):
            rows = np.arange(begin, min(begin + at_once, len(self.windows)))
            tokens = self.windows.tokens[rows]
            evaluator.prefill(tokens[:, : self.prompt], policy)
            for position in range(self.prompt, self.windows.window - 1):
                part = tokens[:, position : position + 1]
                decode = np.full(part.shape, tables.decode_row[policy], np.int32)
                output = evaluator.step(part, decode, np.arange(len(rows)), past=position)
                if output.reads is None:
                    raise CalibrationError("this engine's session does not say which experts a step reads.")
                reads = output.k if alone else output.reads
                yield DecodeStep(rows, position, log_softmax(output.logits), output.k, reads)

    def full(self) -> Scores:
        """The full model's scores; what it predicts is kept for those of the others."""
        config = self._evaluator.config
        shape = (len(self.windows), self._steps, min(TOP_TOKENS, config.pretrained_config.vocab_size))
        reference = Reference(np.empty(shape, np.int32), np.empty(shape, np.float32))
        tables = self._evaluator.tables({})
        scores = self._scores(tables, 0, reference, fill=True)
        self._reference = reference
        return scores

    def scores(self, tables: PolicyTables, policy: int, *, progress: Progress | None = None) -> Scores:
        """A policy's scores on each window, over the predictions that decode steps make.

        Args:
            tables: the policies.
            policy: index of the policy.
            progress: called with the number of windows read.
        """
        if self._reference is None:
            self.full()
        assert self._reference is not None
        return self._scores(tables, policy, self._reference, progress=progress)

    def _scores(
        self,
        tables: PolicyTables,
        policy: int,
        reference: Reference,
        *,
        fill: bool = False,
        progress: Progress | None = None,
    ) -> Scores:
        count, layers, steps = len(self.windows), self._evaluator.num_layers, self._steps
        nll, kl, agreement = (np.zeros(count) for _ in range(3))
        k, reads = (np.zeros((count, layers)) for _ in range(2))
        for step in self.steps(tables, policy):
            rows, at = step.windows, step.position - self.prompt
            if fill:
                top = top_tokens(step.log_probs, reference.ids.shape[-1])
                reference.ids[rows, at], reference.log_probs[rows, at] = top.ids, top.log_probs
            ids = reference.ids[rows, at]
            targets = self.windows.tokens[rows, step.position + 1]
            nll[rows] -= take(step.log_probs, targets[:, None])[:, 0]
            kl[rows] += kl_divergence(reference.log_probs[rows, at], take(step.log_probs, ids))
            agreement[rows] += step.log_probs.argmax(axis=-1) == ids[:, 0]
            k[rows] += step.k
            reads[rows] += step.reads
            if progress is not None and at == steps - 1:
                progress(int(rows[-1]) + 1)
        totals: list[Float64Array] = [nll, kl, agreement, k, reads]
        return Scores(*(total / steps for total in totals))


def decode_policies(
    evaluator: Evaluator,
    windows: Windows,
    policies: dict[str, int],
    tables: PolicyTables,
    batch: int,
    timings: Sequence[Timing],
    *,
    max_steps: int = MAX_STEPS,
    progress: Progress | None = None,
) -> list[Decoding]:
    """Policies in decode steps of one batch size, `full` first.

    Args:
        evaluator: the engine.
        windows: the text.
        policies: names and indices in `tables`.
        tables: the policies.
        batch: sequences in a step.
        timings: those of decode at this batch are shown beside; may be empty.
        max_steps: as for `DecodeReader`.
        progress: called with the number of policies read.
    """
    reader = DecodeReader(evaluator, windows, batch, max_steps=max_steps)
    full = reader.full()
    found = []
    for done, (name, index) in enumerate(policies.items()):
        if progress is not None:
            progress(done)
        scores = full if index == 0 else reader.scores(tables, index)
        own = [t for t in timings if (t.policy, t.phase, t.batch) == (name, "decode", batch)]
        found.append(Decoding(name, batch, scores, full, own[0] if own else None))
    return found


def decode_table(found: Sequence[Decoding]) -> str:
    """Decode steps of one or more batch sizes, as text; the column of times only where times were taken."""
    width = max(6, *(len(each.policy) for each in found))
    timed = any(each.timing is not None for each in found)
    lines = []
    for batch in dict.fromkeys(each.batch for each in found):
        mine = [each for each in found if each.batch == batch]
        lines.append(
            f"\ndecode, steps of {batch}: {len(mine[0].scores.nll)} windows; reads are experts of a layer and step\n"
            f"{'policy':<{width}}  {'avg k':>6}  {'reads':>7}  {'of full':>7}  {'KL to full, nats':>26}  "
            f"{'perplexity':>10}  {'change':>24}" + ("  time against full" if timed else "")
        )
        for each in mine:
            kl, change = each.kl, each.perplexity_change
            line = (
                f"{each.policy:<{width}}  {each.scores.avg_k:>6.3f}  {each.scores.avg_reads:>7.3f}  "
                f"{each.reads_share:>7.1%}  {kl.value:>8.5f} ({kl.low:.5f} {kl.high:.5f})  "
                f"{each.scores.perplexity:>10.3f}  {change.value:>+8.2%} ({change.low:+.2%} {change.high:+.2%})"
            )
            if each.timing is not None:
                ratio = each.timing.ratio
                line += f"  {ratio.value:.3f} ({ratio.low:.3f} {ratio.high:.3f})"
            lines.append(line)
    return "\n".join(lines)
