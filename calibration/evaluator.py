# SPDX-License-Identifier: Apache-2.0
"""Runs windows of text through an engine's session, under any policy, and scores what comes out.

Policies are inputs of the engine, so a candidate costs one pass over the text and no rebuild. The session
is driven directly: there is nothing to schedule or to sample when whole windows are read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.calibration.windows import Windows
from adaptive_k_moe.policy import FULL, Policy, PolicySet, PolicyTables, compile_policies

if TYPE_CHECKING:
    from adaptive_k_moe.engine_config import EngineConfig
    from adaptive_k_moe.runtime.session import Session, StepOutput

FloatArray = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Progress = Callable[[int], None]

TOP_TOKENS = 256
"""Next-token probabilities that are kept of the full model at each position."""


@dataclass(frozen=True, eq=False)
class Reference:
    """What the full model predicts, as far as it is kept. m is `TOP_TOKENS` or the vocabulary's size.

    Attributes:
        ids: [W, n - first, m] the likeliest tokens, the likeliest one first, the others in any order.
        log_probs: [W, n - first, m] their log-probabilities.
    """

    ids: npt.NDArray[np.int32]
    log_probs: FloatArray


@dataclass(frozen=True, eq=False)
class Scores:
    """A policy's scores by window, so that windows can be resampled. W windows, L MoE layers.

    Attributes:
        nll: [W] mean negative log-likelihood of a predicted token, nats.
        kl: [W] mean KL divergence from the full model's prediction, nats. Over the kept tokens and one
            bucket for all others, which makes it a lower bound of the whole divergence, exact where all
            tokens are kept. NaN without a reference.
        agreement: [W] share of positions whose likeliest token is the full model's. NaN without a reference.
        k: [W, L] mean number of experts run.
        reads: [W, L] mean number of experts that a window's decode steps read, by any of their sequences; None where
            windows were read whole.
    """

    nll: Float64Array
    kl: Float64Array
    agreement: Float64Array
    k: Float64Array
    reads: Float64Array | None = None

    @property
    def avg_k(self) -> float:
        """Mean over windows and layers."""
        return float(self.k.mean())

    @property
    def avg_reads(self) -> float:
        """Mean over windows and layers."""
        assert self.reads is not None
        return float(self.reads.mean())

    @property
    def mean_kl(self) -> float:
        """Mean over windows, nats a token."""
        return float(self.kl.mean())

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log-likelihood."""
        return float(np.exp(self.nll.mean()))

    def to_json(self) -> dict[str, list[float]]:
        """Exact: a float's shortest representation reads back as the same float."""
        content = {
            "nll": self.nll.tolist(),
            "kl": self.kl.tolist(),
            "agreement": self.agreement.tolist(),
            "k": self.k.ravel().tolist(),
        }
        return content if self.reads is None else {**content, "reads": self.reads.ravel().tolist()}

    @classmethod
    def from_json(cls, content: Mapping[str, list[float]]) -> Scores:
        """The reverse of `to_json`."""
        arrays = {name: np.array(values, np.float64) for name, values in content.items()}
        for name in {"k", "reads"} & arrays.keys():
            arrays[name] = arrays[name].reshape(len(arrays["nll"]), -1)
        return cls(**arrays)


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step said about some whole windows.

    Attributes:
        windows: their rows in `Windows.tokens`.
        log_probs: [w, n - first, V] log-probabilities of the token after each position that predicts one.
        k: [w, n, L] experts run.
        entropy: [w, n, L] the routers' entropies, nats.
    """

    windows: slice
    log_probs: FloatArray
    k: npt.NDArray[np.int32]
    entropy: FloatArray


class Evaluator:
    """An engine opened for reading windows of text.

    Args:
        engine_dir: a directory written by `adaptive-k build`.
        num_threads: CPU threads; None is all.

    Attributes:
        expert_norms: [L][E] for the policies that are evaluated; the engine's own unless calibration measures others.
    """

    def __init__(self, engine_dir: str | Path, *, num_threads: int | None = None) -> None:
        from adaptive_k_moe.engine_config import read_engine_config
        from adaptive_k_moe.runtime.tokenizer import Tokenizer

        self.config: EngineConfig = read_engine_config(engine_dir)
        self.tokenizer = Tokenizer.from_dir(engine_dir)
        self.expert_norms = self.config.adaptive_k.expert_norms
        self._engine_dir = engine_dir
        self._num_threads = num_threads
        self._session: Session | None = None

    @property
    def session(self) -> Session:
        """The engine's session, opened when it is first needed."""
        from adaptive_k_moe.runtime.session import create_session

        if self._session is None:
            self._session = create_session(self._engine_dir, self.config, num_threads=self._num_threads)
        return self._session

    @contextmanager
    def with_session(self, kind: Callable[..., Session]) -> Iterator[Session]:
        """Run everything on another session of the engine; the own one is closed first, since two may be too large.

        Args:
            kind: called with the engine directory, its configuration and `num_threads`.
        """
        self.close()
        self._session = kind(self._engine_dir, self.config, num_threads=self._num_threads)
        try:
            yield self._session
        finally:
            self.close()

    @property
    def full_k(self) -> int:
        """The trained top-k."""
        return self.config.pretrained_config.num_experts_per_tok

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return self.config.pretrained_config.num_moe_layers

    def close(self) -> None:
        """Free the engine; it is opened again where it is needed again."""
        if self._session is not None:
            self._session.close()
        self._session = None

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def tables(self, policies: Mapping[str, Policy]) -> PolicyTables:
        """Policies as the engine's inputs, with `expert_norms`; row 0 is `full`."""
        return policy_tables(self.config, policies, self.expert_norms)

    def check_window(self, window: int) -> None:
        """Refuse windows that the engine cannot read in one step.

        Raises:
            CalibrationError: saying how long a window may be.
        """
        build = self.config.build_config
        longest = min(build.max_seq_len, build.max_num_tokens)
        if not 2 <= window <= longest:
            raise CalibrationError(f"the window is {window} tokens, but this engine reads 2 to {longest} in one step.")

    def batches(
        self, windows: Windows, tables: PolicyTables, rows: int | npt.NDArray[np.int32], *, start: int = 0
    ) -> Iterator[Batch]:
        """Read the windows, as many in a step as the engine takes.

        Args:
            windows: W windows of n tokens.
            tables: the policies.
            rows: the policy's row, or [W, n] one for each token.
            start: the first window to read.
        """
        self.check_window(windows.window)
        self.session.set_policies(tables)
        build, count, n = self.config.build_config, len(windows), windows.window
        at_once = max(1, min(build.max_num_tokens // n, build.max_batch_size, self.session.num_state_slots or count))
        for begin in range(start, count, at_once):
            chosen = slice(begin, min(begin + at_once, count))
            tokens = windows.tokens[chosen]
            indices = rows if isinstance(rows, int) else rows[chosen]
            predicting = np.arange(windows.first - 1, n - 1)
            wanted = (np.arange(len(tokens))[:, None] * n + predicting).ravel()
            output = self.step(tokens, np.broadcast_to(np.asarray(indices, np.int32), tokens.shape), wanted)
            shape = (len(tokens), n, self.num_layers)
            yield Batch(
                chosen,
                log_softmax(output.logits).reshape(len(tokens), len(predicting), -1),
                output.k.reshape(shape),
                output.entropy.reshape(shape),
            )

    def step(
        self,
        tokens: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int32],
        logits_indices: npt.NDArray[np.int64],
        *,
        past: int = 0,
    ) -> StepOutput:
        """One step over equal pieces of several sequences, each in KV blocks of its own.

        Args:
            tokens: [S, n] the new tokens of S sequences.
            rows: [S, n] policy rows.
            logits_indices: rows of the packed tokens whose logits are wanted.
            past: tokens of each sequence that earlier steps have put into the same blocks.
        """
        from adaptive_k_moe.runtime.session import StepInput

        count, n = tokens.shape
        size = self.session.block_size
        # A sequence's blocks do not depend on the step, so that decoding finds what prefill wrote.
        own = -(-self.config.build_config.max_seq_len // size)
        needed = -(-(past + n) // size)
        if count * own > self.session.num_blocks:
            raise CalibrationError(
                f"{count} sequences at a time do not fit this engine's KV cache: use a smaller batch."
            )
        slots = self.session.num_state_slots
        # Copies, since the session wants arrays that are its own.
        return self.session.step(
            StepInput(
                input_ids=np.array(tokens, np.int64).ravel(),
                position_ids=np.tile(np.arange(past, past + n, dtype=np.int64), count),
                policy_index=np.array(rows, np.int32).ravel(),
                past_lens=np.full(count, past, np.int32),
                subsequence_begins=np.arange(count + 1, dtype=np.int32) * n,
                block_tables=[list(range(slot * own, slot * own + needed)) for slot in range(count)],
                state_slots=np.arange(count, dtype=np.int32) if slots else None,
                logits_indices=np.array(logits_indices, np.int64),
            )
        )

    def prefill(self, tokens: npt.NDArray[np.int64], row: int) -> None:
        """Read prompts, in steps of at most `max_num_tokens` tokens.

        Args:
            tokens: [S, n] those of S sequences.
            row: the policy's row.
        """
        piece = max(1, self.config.build_config.max_num_tokens // len(tokens))
        for past in range(0, tokens.shape[1], piece):
            part = tokens[:, past : past + piece]
            self.step(part, np.full(part.shape, row, np.int32), np.arange(0), past=past)

    def scores(
        self,
        windows: Windows,
        tables: PolicyTables,
        rows: int | npt.NDArray[np.int32],
        reference: Reference | None = None,
        *,
        progress: Progress | None = None,
    ) -> Scores:
        """A policy's scores on each window.

        Args:
            windows: W windows of n tokens.
            tables: the policies.
            rows: the policy's row, or [W, n] one for each token.
            reference: the full model's predictions of the same windows.
            progress: called with the number of windows read.
        """
        count = len(windows)
        nll, kl, agreement = (np.full(count, np.nan) for _ in range(3))
        k = np.empty((count, self.num_layers))
        for batch in self.batches(windows, tables, rows):
            chosen = batch.windows
            targets = windows.tokens[chosen, windows.first :]
            nll[chosen] = -take(batch.log_probs, targets[..., None])[..., 0].mean(axis=1, dtype=np.float64)
            k[chosen] = batch.k.mean(axis=1)
            if reference is not None:
                ids = reference.ids[chosen]
                kl[chosen] = kl_divergence(reference.log_probs[chosen], take(batch.log_probs, ids)).mean(axis=1)
                agreement[chosen] = (batch.log_probs.argmax(axis=-1) == ids[..., 0]).mean(axis=1)
            if progress is not None:
                progress(chosen.stop)
        return Scores(nll, kl, agreement, k)


def policy_tables(
    config: EngineConfig, policies: Mapping[str, Policy], expert_norms: list[list[float]] | None = None
) -> PolicyTables:
    """Policies as an engine's inputs, `full` in row 0.

    Raises:
        PolicyError: a policy does not fit the model.
    """
    model = config.pretrained_config
    with warnings.catch_warnings():
        # A k above the trained top-k is capped, which whoever made the policy has been told.
        warnings.simplefilter("ignore", UserWarning)
        rules = {name: rule for name, rule in policies.items() if name != FULL}
        fitted = model.fit_policies(PolicySet(policies=rules, expert_norms=expert_norms))
    return compile_policies(
        fitted,
        num_experts=model.num_experts,
        num_experts_per_tok=model.num_experts_per_tok,
        num_moe_layers=model.num_moe_layers,
    )


def log_softmax(logits: FloatArray) -> FloatArray:
    """Log softmax over the last axis, in float32; `logits` is overwritten."""
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return logits


def take(values: FloatArray, ids: npt.NDArray[np.int32] | npt.NDArray[np.int64]) -> FloatArray:
    """Entries of the last axis."""
    taken: FloatArray = np.take_along_axis(values, ids.astype(np.int64), axis=-1)
    return taken


def kl_divergence(full: FloatArray, other: FloatArray) -> Float64Array:
    """KL(full || other) over m kept outcomes and one bucket for the rest, nats.

    Args:
        full: [..., m] log-probabilities.
        other: [..., m] log-probabilities of the same outcomes.
    """
    p, q = np.exp(full, dtype=np.float64), np.exp(other, dtype=np.float64)
    kept = (p * (full.astype(np.float64) - other)).sum(axis=-1)
    # Rounding can leave the rest at or below nothing; a float32 sum is right to about 1e-7.
    p_rest, q_rest = (np.maximum(1.0 - part.sum(axis=-1), 1e-7) for part in (p, q))
    divergence: Float64Array = kept + p_rest * np.log(p_rest / q_rest)
    return np.maximum(divergence, 0.0)


def random_rows(shape: Sequence[int], share: float, seed: int) -> npt.NDArray[np.int32]:
    """Row 1 for a random share of the tokens and row 2 for the others: the control of every choice of tokens."""
    draws = np.random.default_rng(seed).random(tuple(shape))
    return np.where(draws < share, 1, 2).astype(np.int32)
