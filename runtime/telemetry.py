# SPDX-License-Identifier: Apache-2.0
"""What the runtime reports about itself: totals to ask for, and an observer that is called as things happen."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.runtime.outputs import NO_CONTEXT, Enrollment, ErrorKind, RequestContext, RequestOutput

logger = logging.getLogger("adaptive_k_moe.runtime")

_T = TypeVar("_T")


class StepRecord(NamedTuple):
    """One step of the engine, as a tuple, which is made quickly. T tokens in the step, L MoE layers.

    Attributes:
        num_sequences: sequences in the step.
        num_prefill_tokens: prompt tokens (and tokens recomputed after a preemption) in the step.
        num_decode_tokens: generated tokens that were fed back, one a decoding sequence.
        num_generated_tokens: tokens that the step produced.
        num_preempted: sequences that lost their KV blocks when the step was planned.
        session_seconds: time in the session, that is in the model.
        total_seconds: time of the whole step: planning, model, sampling, text.
        token_intervals: seconds since the token before, for each sequence that got one and had one.
        k: [T, L] experts that ran for each token; a token computed again after a preemption is there again.
        entropy: [T, L] the routers' entropies, in nats.
        policy_index: [T] the policy that each token followed, into `policies`; never one of the kind `by_load`, whose
            requests follow another.
        policies: names of the engine's policies in this step.
        reads: [L] experts whose weights the step read; None where the session does not know.
    """

    num_sequences: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_generated_tokens: int
    num_preempted: int
    session_seconds: float
    total_seconds: float
    token_intervals: list[float]
    k: npt.NDArray[np.int32]
    entropy: npt.NDArray[np.float32]
    policy_index: npt.NDArray[np.int32]
    policies: Sequence[str]
    reads: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that was not accepted.

    Attributes:
        request_id: the runtime's id; "" where it had none yet.
        policy: the policy that it named, which need not exist; None is the default.
        error: the sentence.
        error_kind: what was wrong.
        enrollment: its place in an A/B test; None if it is in none.
        context: what the caller said of the request.
        time: when it was refused, in seconds of `time.monotonic()`.
    """

    request_id: str
    policy: str | None
    error: str
    error_kind: ErrorKind
    enrollment: Enrollment | None = None
    context: RequestContext = NO_CONTEXT
    time: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine at one moment; totals count from its start.

    Attributes:
        num_running: sequences that hold KV blocks.
        num_waiting: sequences that wait for them.
        max_batch_size: most sequences in a step.
        kv_block_size: tokens that a KV block holds.
        kv_blocks_total: KV blocks that exist.
        kv_blocks_used: KV blocks in use.
        requests_total: requests accepted.
        finished_total: requests ended, for whatever reason.
        cancellations_total: requests ended by an abort or a shutdown.
        errors_total: requests ended by an error.
        preemptions_total: times that a sequence lost its blocks.
        prompt_tokens_total: prompt tokens of the requests accepted.
        generation_tokens_total: tokens generated.
        steps_total: steps run.
        last_batch_size: sequences in the latest step; 0 before the first.
        last_num_tokens: tokens in the latest step.
        load_steps: of each policy of the kind `by_load` the step that its requests take now, from 0.
    """

    num_running: int
    num_waiting: int
    max_batch_size: int
    kv_block_size: int
    kv_blocks_total: int
    kv_blocks_used: int
    requests_total: int
    finished_total: int
    cancellations_total: int
    errors_total: int
    preemptions_total: int
    prompt_tokens_total: int
    generation_tokens_total: int
    steps_total: int
    last_batch_size: int
    last_num_tokens: int
    load_steps: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Counters:
    """The totals of `EngineStats`; only the engine's thread writes them."""

    requests_total: int = 0
    finished_total: int = 0
    cancellations_total: int = 0
    errors_total: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    steps_total: int = 0
    last_batch_size: int = 0
    last_num_tokens: int = 0


class Observer:
    """Called for each step and each ended request, on the engine's thread: be quick, do not block.

    A subclass has the methods for what it cares about. An exception from an observer is logged and otherwise
    ignored.
    """

    def on_request_finished(self, output: RequestOutput) -> None:
        """A request ended; `output` is its last."""

    def on_step(self, record: StepRecord) -> None:
        """A step is done."""

    def on_request_refused(self, refusal: Refusal) -> None:
        """A request was not accepted; called on the thread that asked."""


class Observers:
    """The registered observers; with none, telling them costs one comparison."""

    def __init__(self) -> None:
        self._observers: tuple[Observer, ...] = ()
        self._lock = threading.Lock()

    def add(self, observer: Observer) -> None:
        """Tell this observer too, from now on."""
        with self._lock:
            self._observers = (*self._observers, observer)

    def remove(self, observer: Observer) -> None:
        """Stop calling this observer; harmless if it is not among them."""
        with self._lock:
            self._observers = tuple(other for other in self._observers if other is not observer)

    def __bool__(self) -> bool:
        return bool(self._observers)

    def request_finished(self, output: RequestOutput) -> None:
        """Pass on that a request ended."""
        for observer in self._observers:
            _tell(observer.on_request_finished, output)

    def step(self, record: StepRecord) -> None:
        """Pass on that a step is done."""
        for observer in self._observers:
            _tell(observer.on_step, record)

    def request_refused(self, refusal: Refusal) -> None:
        """Pass on that a request was not accepted."""
        for observer in self._observers:
            _tell(observer.on_request_refused, refusal)


def _tell(method: Callable[[_T], None], news: _T) -> None:
    try:
        method(news)
    except Exception:
        logger.exception("an observer failed")
