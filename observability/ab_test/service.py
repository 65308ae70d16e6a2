# SPDX-License-Identifier: Apache-2.0
"""An A/B test on an engine that serves: enrols requests, records how they end, scores some, stops what does harm."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adaptive_k_moe.errors import ExperimentError
from adaptive_k_moe.observability.ab_test.abtest import apply_guardrails
from adaptive_k_moe.observability.ab_test.assignment import Assigner
from adaptive_k_moe.observability.ab_test.experiment import Experiment
from adaptive_k_moe.observability.ab_test.records import RequestRecord, ScoreRecord, record_of
from adaptive_k_moe.observability.ab_test.scoring import Scorer
from adaptive_k_moe.observability.ab_test.store import Store
from adaptive_k_moe.runtime.outputs import Enrollment, RequestOutput
from adaptive_k_moe.runtime.telemetry import Observer

if TYPE_CHECKING:
    from adaptive_k_moe.runtime import LLM, SamplingParams

logger = logging.getLogger("adaptive_k_moe.ab_test")

POLL_SECONDS = 1.0
"""How soon a start, a stop or a guardrail of another process is seen."""

PAUSE_SECONDS = 30.0
"""A test whose file cannot be used for so long is not watched over, so no request is enrolled any more."""

_SECONDS_BETWEEN_WRITES = 0.5
_MAX_QUEUED = 100_000
_MAX_BATCH = 500
_CLOSE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Running:
    """The experiment that is running, ready to assign."""

    experiment: Experiment
    assigner: Assigner


class ABService(Observer):
    """Runs the experiment of a file on an engine; with none running it does nothing.

    Nothing here makes a request wait: ended requests are queued, and a thread of its own writes them, reads what
    other processes changed, and applies the guardrails. A request that ends within half a second of the last that
    was written waits for the rest of it, and is written together with all that ended meanwhile; batches that are full
    do not wait. Whatever is wrong with the file is one sentence in the log; requests are served all the same, and
    after `PAUSE_SECONDS` none is enrolled until the file can be used again. It keeps the engine alive until it is
    closed.

    Args:
        llm: the engine.
        path: the file; it need not exist yet.
        log: takes sentences of what is new.
        log_error: takes sentences of what is wrong.
        poll_seconds: how often to look at the file.
        pause_seconds: as `PAUSE_SECONDS`.
    """

    def __init__(
        self,
        llm: LLM,
        path: str | Path,
        *,
        log: Callable[[str], None] = logger.info,
        log_error: Callable[[str], None] = logger.error,
        poll_seconds: float = POLL_SECONDS,
        pause_seconds: float = PAUSE_SECONDS,
    ) -> None:
        self._llm = llm
        self._path = Path(path)
        self._log = log
        self._log_error = log_error
        self._poll_seconds = poll_seconds
        self._pause_seconds = pause_seconds
        self._queue: queue.Queue[RequestRecord | ScoreRecord | RequestOutput | None] = queue.Queue(_MAX_QUEUED)
        self._dropped = 0
        self._scorer = Scorer(llm, self._put)
        self._running: _Running | None = None
        self._store: Store | None = None
        self._store_inode = 0
        self._guarded_version = -1
        self._failing_since: float | None = None
        self._said: set[str] = set()
        self._unwritten: list[RequestRecord | ScoreRecord] = []
        self._closing = threading.Event()
        self._poll()
        llm.add_observer(self)
        self._thread = threading.Thread(target=self._run, name="adaptive-k-ab-test", daemon=True)
        self._thread.start()

    def enroll(self, params: SamplingParams, unit: str) -> tuple[SamplingParams, Enrollment | None]:
        """Give a request its policy by the experiment that is running.

        Args:
            params: the request's; one that names a policy is not part of any test.
            unit: what is assigned: the request's id, or its user.

        Returns:
            The parameters to use, and the place to give to `LLM.generate_async`; None if it is in no test.
        """
        running = self._running
        if running is None or params.adaptive_k_policy is not None:
            return params, None
        experiment = running.experiment
        assigned = experiment.variants[running.assigner.assign(unit)]
        variant = experiment.control if assigned.stopped_at is not None else assigned
        if variant.policy not in self._llm.policies.names:
            self._say(
                f"the experiment {experiment.name!r} enrols no request for the variant {variant.name!r}: this "
                f"engine has no policy {variant.policy!r}."
            )
            return params, None
        enrollment = Enrollment(experiment.name, variant.name, unit, counted=variant is assigned)
        return replace(params, adaptive_k_policy=variant.policy), enrollment

    def on_request_finished(self, output: RequestOutput) -> None:
        """An engine's request ended."""
        if output.enrollment is None:
            return
        self._put(record_of(output, output.enrollment))
        running = self._running
        if (
            running is not None
            and running.experiment.name == output.enrollment.experiment
            and output.enrollment.counted
            and running.experiment.is_scored(output.request_id)
        ):
            self._put(output)

    def close(self) -> None:
        """Write what is queued, within a few seconds, and end the thread; the engine goes on without a test."""
        self._closing.set()
        self._put(None)  # wakes the thread
        self._thread.join(_CLOSE_SECONDS)
        self._llm.remove_observer(self)

    def _put(self, record: RequestRecord | ScoreRecord | RequestOutput | None) -> None:
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    # On the thread

    def _run(self) -> None:
        next_write = time.monotonic()
        next_poll = next_write + self._poll_seconds
        while not self._closing.is_set():
            fresh = self._take(max(0.0, next_poll - time.monotonic()))
            if fresh and self._failing_since is None:
                if len(self._unwritten) < _MAX_BATCH:
                    self._closing.wait(min(next_write, next_poll) - time.monotonic())
                    self._take(0.0)
                self._write()
                next_write = time.monotonic() + _SECONDS_BETWEEN_WRITES
            if time.monotonic() >= next_poll:
                self._poll()
                next_poll = time.monotonic() + self._poll_seconds
        deadline = time.monotonic() + _CLOSE_SECONDS
        while (self._take(0.0) or self._unwritten) and time.monotonic() < deadline:
            if not self._write():
                break
        self._running = None
        self._close_store()

    def _take(self, seconds: float) -> bool:
        """Add a batch of what is queued to what is not written yet; wait so long for the first."""
        if len(self._unwritten) >= _MAX_BATCH:  # the file cannot be written at the moment
            self._closing.wait(seconds)
            return True
        with contextlib.suppress(queue.Empty):
            self._accept(self._queue.get(timeout=seconds) if seconds else self._queue.get_nowait())
            while len(self._unwritten) < _MAX_BATCH:
                self._accept(self._queue.get_nowait())
        return bool(self._unwritten)

    def _accept(self, item: RequestRecord | ScoreRecord | RequestOutput | None) -> None:
        if isinstance(item, RequestOutput):
            self._scorer.score(item)  # its record came before it
        elif item is not None:
            self._unwritten.append(item)

    def _write(self) -> bool:
        """Write what is not written yet; whether that went well."""
        if not self._unwritten:
            return True
        store = self._store
        if store is None:
            return False
        records = self._unwritten
        if self._try(lambda: store.record(records)):
            self._unwritten = []
            return True
        return False

    def _poll(self) -> None:
        """Look at the file: is an experiment running, and does a variant do harm?"""
        if self._try(self._look):
            if self._dropped:
                self._log_error(
                    f"{self._dropped} requests were not recorded in the A/B database: it could not be written."
                )
                self._dropped = 0
        elif self._failing_since is not None and time.monotonic() - self._failing_since > self._pause_seconds:
            if self._running is not None:
                self._log_error(
                    f"the experiment {self._running.experiment.name!r} pauses: requests follow the default policy."
                )
            self._running = None

    def _look(self) -> None:
        self._open_store()
        store = self._store
        if store is None:
            self._running = None
            self._unwritten = []
            return
        if self._unwritten:
            store.record(self._unwritten)
            self._unwritten = []
        experiment = store.running()
        if experiment is not None and (version := store.version()) != self._guarded_version:
            for sentence in apply_guardrails(store, experiment.name):
                self._log(sentence)
            self._guarded_version = version
            experiment = store.running()
        previous = self._running and self._running.experiment
        if experiment is None:
            self._running = None
        elif experiment != previous:
            self._running = _Running(experiment, experiment.assigner())
        if (previous and previous.name) != (experiment and experiment.name):
            self._said.clear()
            if previous:
                self._log(f"the experiment {previous.name!r} is over.")
            if experiment:
                shares = ", ".join(f"{one.name} = {one.policy} ({one.weight:g})" for one in experiment.variants)
                self._log(f"the experiment {experiment.name!r} is running: {shares}.")

    def _open_store(self) -> None:
        """The file as it is now: it may have come, gone, or been replaced."""
        try:
            inode = os.stat(self._path).st_ino
        except FileNotFoundError:
            self._close_store()
            return
        except OSError as error:
            raise ExperimentError(f"the A/B database {self._path} cannot be opened: {error.strerror}.") from None
        if self._store is not None and inode != self._store_inode:
            self._close_store()
        if self._store is None:
            self._store = Store(self._path, create=False)
            self._store_inode = inode
            self._guarded_version = -1

    def _close_store(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None

    def _try(self, action: Callable[[], None]) -> bool:
        """Whether an action on the file went well; if not, say why, once."""
        try:
            action()
        except Exception as error:  # the thread outlives whatever is wrong with the file
            self._failing_since = self._failing_since or time.monotonic()
            known = isinstance(error, ExperimentError)
            self._say(str(error) if known else f"the A/B test failed: {type(error).__name__}: {error}")
            return False
        if self._failing_since is not None:
            self._failing_since = None
            self._said.clear()
            self._log(f"the A/B database {self._path} can be used again.")
        return True

    def _say(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            self._log_error(sentence)
