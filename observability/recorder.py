# SPDX-License-Identifier: Apache-2.0
"""Counts what an engine does, by the definitions of `definitions`; the exporters ask for the counts.

A step or an ended request costs the engine's thread a few microseconds: what it brought is put aside, and counted
when an exporter asks or when enough has come together to be counted at once.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.observability import definitions
from adaptive_k_moe.observability.definitions import MAX_POLICY_LABELS, METRICS, NO_POLICY, OTHER_POLICIES, Metric
from adaptive_k_moe.observability.histogram import Histograms, HistogramValue
from adaptive_k_moe.runtime.expert_runs import ExpertRuns
from adaptive_k_moe.runtime.telemetry import EngineStats, Observer, Refusal, StepRecord

if TYPE_CHECKING:
    from adaptive_k_moe.runtime import LLM
    from adaptive_k_moe.runtime.outputs import RequestMetrics, RequestOutput

_TOKENS_TO_COUNT_AT_ONCE = 16_384
_REQUESTS_TO_COUNT_AT_ONCE = 1024
_REQUEST_HISTOGRAMS = (definitions.LATENCY, definitions.TIME_TO_FIRST_TOKEN, definitions.QUEUE_TIME)
_STEP_HISTOGRAMS = (definitions.TIME_BETWEEN_TOKENS, definitions.STEP_TIME, definitions.BATCH_SIZE)

Value = float | HistogramValue


class Sample(NamedTuple):
    """One series: a metric, the values of its labels in order, and its value."""

    metric: Metric
    labels: tuple[str, ...]
    value: Value


class HistogramSample(NamedTuple):
    """One observation of a histogram that is not `bulk`."""

    metric: Metric
    labels: tuple[str, ...]
    value: float


class _Ended(NamedTuple):
    """What is counted of a request that has ended."""

    policy: str
    outcome: str
    error_kind: str | None
    metrics: RequestMetrics


class Recorder(Observer):
    """All counts of one engine. Thread-safe.

    Args:
        num_layers: L, MoE layers of the model.
        num_experts: experts of a layer; bounds the entropy.
        full_k: the trained top-k.
        max_k: the largest k that gets a bucket of its own.
        stats: gives the engine's stats; None once it is gone.
        expert_load: gives the tokens [L, E] that each expert ran for; None where that is not known.
        keep_observations: keep each observation of histograms that are not `bulk` for `take_observations`.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_experts: int,
        full_k: int,
        max_k: int,
        stats: Callable[[], EngineStats | None],
        expert_load: Callable[[], npt.NDArray[np.int64] | None] = lambda: None,
        keep_observations: bool = False,
    ) -> None:
        self._num_layers = num_layers
        self._full_k = full_k
        self._stats = stats
        self._expert_load = expert_load
        self._steps: deque[StepRecord] = deque()
        self._ended: deque[_Ended] = deque()
        self._pending_tokens = 0
        self._num_events = 0
        self._observations: deque[HistogramSample] | None = deque() if keep_observations else None
        self._lock = threading.Lock()
        self._policies: dict[str, int] = {}
        self._requests: dict[tuple[str, str], int] = {}
        self._errors: dict[str, int] = {}
        self._by_policy = {metric: Histograms(metric.buckets, 0) for metric in _REQUEST_HISTOGRAMS}
        self._by_step = {metric: Histograms(metric.buckets) for metric in _STEP_HISTOGRAMS}
        largest_entropy = math.log(max(num_experts, 2))
        self._entropy = Histograms(
            [limit for limit in definitions.ROUTER_ENTROPY.buckets if limit < largest_entropy], num_layers
        )
        self._reads = Histograms(
            [limit for limit in definitions.EXPERT_READS.buckets if limit <= num_experts], num_layers
        )
        # One row for each policy and layer.
        self._experts = Histograms([limit for limit in definitions.EXPERTS_PER_TOKEN.buckets if limit <= max_k], 0)
        self.records_dropped: Callable[[], int] = lambda: 0

    @classmethod
    def of(cls, llm: LLM, *, keep_observations: bool = False) -> Recorder:
        """A recorder for an `LLM`, which it does not keep alive; it has yet to be added as an observer."""
        import weakref

        model = llm.config.pretrained_config
        reference = weakref.ref(llm)
        return cls(
            num_layers=len(model.moe.layers),
            num_experts=model.moe.num_experts,
            full_k=model.num_experts_per_tok,
            max_k=llm.config.build_config.capacity(model),
            stats=lambda: None if (living := reference()) is None else living.stats(),
            expert_load=lambda: None if (living := reference()) is None else living.expert_load(),
            keep_observations=keep_observations,
        )

    # What the runtime tells

    def on_step(self, record: StepRecord) -> None:
        """Put a step aside; now and then, count those that were."""
        self._steps.append(record)
        self._num_events += 1
        self._pending_tokens += len(record.k)
        if self._pending_tokens >= _TOKENS_TO_COUNT_AT_ONCE:
            with self._lock:
                self._count_steps()

    def on_request_finished(self, output: RequestOutput) -> None:
        """Put aside what is counted of a request that has ended; now and then, count it."""
        self._ended.append(_Ended(output.policy, outcome_of(output), output.error_kind, output.metrics))
        self._num_events += 1
        if len(self._ended) >= _REQUESTS_TO_COUNT_AT_ONCE:
            with self._lock:
                self._count_requests()

    def on_request_refused(self, refusal: Refusal) -> None:
        """Count a request that was not accepted."""
        with self._lock:
            self._num_events += 1
            self._count_end(NO_POLICY, "refused", refusal.error_kind)

    # What the exporters ask for

    def collect(self) -> Iterator[Sample]:
        """All series at this moment, in the order of `METRICS`; of the engine's state, only while it lives."""
        with self._lock:
            self._count_steps()
            self._count_requests()
            samples = [*self._request_samples(), *self._step_samples(), *self._policy_samples()]
        samples += _expert_samples(self._expert_load())
        stats = self._stats()
        if stats is not None:
            samples += _engine_samples(stats)
        samples.append(Sample(definitions.RECORDS_DROPPED, (), self.records_dropped()))
        order = {name: place for place, name in enumerate(METRICS)}
        return iter(sorted(samples, key=lambda sample: (order[sample.metric.name], sample.labels)))

    def news(self) -> object:
        """Something that equals the last of its kind if all samples are as they were."""
        return self._num_events, self._stats(), self.records_dropped()

    def take_observations(self) -> list[HistogramSample]:
        """The observations that `collect` has counted since the last call, if they are kept."""
        taken: list[HistogramSample] = []
        while self._observations:
            taken.append(self._observations.popleft())
        return taken

    # How it is counted; all with the lock held

    def _count_requests(self) -> None:
        while self._ended:
            ended = self._ended.popleft()
            metrics = ended.metrics
            policy = self._policy(ended.policy)
            self._count_end(policy, ended.outcome, ended.error_kind)
            times = (metrics.finished_time, metrics.first_token_time, metrics.first_scheduled_time)
            for metric, seconds in zip(_REQUEST_HISTOGRAMS, times, strict=True):
                if seconds is not None:
                    self._observe(metric, policy, seconds - metrics.arrival_time)

    def _count_end(self, policy: str, outcome: str, error_kind: str | None) -> None:
        self._requests[policy, outcome] = self._requests.get((policy, outcome), 0) + 1
        if error_kind is not None:
            self._errors[error_kind] = self._errors.get(error_kind, 0) + 1

    def _observe(self, metric: Metric, policy: str, value: float) -> None:
        histograms, row = self._by_policy[metric], self._policies[policy]
        histograms.grow(row + 1)
        histograms.observe(value, row)
        if self._observations is not None:
            self._observations.append(HistogramSample(metric, (policy,), value))

    def _policy(self, name: str) -> str:
        """The label for a policy's name, which is now known."""
        if name not in self._policies and len(self._policies) >= MAX_POLICY_LABELS:
            name = OTHER_POLICIES
        self._policies.setdefault(name, len(self._policies))
        return name

    def _count_steps(self) -> None:
        steps: list[StepRecord] = []
        while self._steps:
            steps.append(self._steps.popleft())
        self._pending_tokens = 0
        if not steps:
            return
        for metric, values in (
            (definitions.TIME_BETWEEN_TOKENS, [seconds for step in steps for seconds in step.token_intervals]),
            (definitions.STEP_TIME, [step.total_seconds for step in steps]),
            (definitions.BATCH_SIZE, [float(step.num_sequences) for step in steps]),
        ):
            self._by_step[metric].observe_many(np.array(values, np.float64), np.zeros(len(values), np.int64))
        layers = np.arange(self._num_layers)
        entropy = np.concatenate([step.entropy for step in steps])
        self._entropy.observe_many(entropy.ravel(), np.broadcast_to(layers, entropy.shape).ravel())
        if known := [step.reads for step in steps if step.reads is not None]:
            reads = np.stack(known)
            self._reads.observe_many(reads.ravel().astype(np.float64), np.broadcast_to(layers, reads.shape).ravel())
        rows = np.concatenate(
            [
                self._policy_rows(names)[np.concatenate([step.policy_index for step in same])]
                for names, same in _by_policies(steps)
            ]
        )
        self._experts.grow(len(self._policies) * self._num_layers)
        k = np.concatenate([step.k for step in steps])
        self._experts.observe_many(k.ravel().astype(np.float64), (rows[:, None] * self._num_layers + layers).ravel())

    def _policy_rows(self, names: Sequence[str]) -> npt.NDArray[np.int64]:
        """Our number of each of the engine's policies."""
        return np.array([self._policies[self._policy(name)] for name in names], np.int64)

    def _request_samples(self) -> Iterator[Sample]:
        for metric, histograms in self._by_policy.items():
            for policy, row in self._policies.items():
                if row < len(histograms) and (value := histograms.value(row)).count:
                    yield Sample(metric, (policy,), value)
        for (policy, outcome), count in self._requests.items():
            yield Sample(definitions.REQUESTS, (policy, outcome), count)
        for kind, count in self._errors.items():
            yield Sample(definitions.ERRORS, (kind,), count)

    def _step_samples(self) -> Iterator[Sample]:
        for metric, histograms in self._by_step.items():
            yield Sample(metric, (), histograms.value())
        for layer in range(self._num_layers):
            yield Sample(definitions.ROUTER_ENTROPY, (str(layer),), self._entropy.value(layer))
            if (reads := self._reads.value(layer)).count:
                yield Sample(definitions.EXPERT_READS, (str(layer),), reads)

    def _policy_samples(self) -> Iterator[Sample]:
        for policy, row in self._policies.items():
            values = [
                self._experts.value(row * self._num_layers + layer)
                for layer in range(self._num_layers)
                if row * self._num_layers + layer < len(self._experts)
            ]
            choices = sum(value.count for value in values)
            if not choices:
                continue
            for layer, value in enumerate(values):
                yield Sample(definitions.EXPERTS_PER_TOKEN, (str(layer), policy), value)
            runs = ExpertRuns(self._full_k, int(sum(value.sum for value in values)), choices)
            yield Sample(definitions.AVG_K, (policy,), runs.avg_k)
            yield Sample(definitions.COMPUTE_SAVED, (policy,), runs.compute_saved_ratio)


def _by_policies(steps: Sequence[StepRecord]) -> Iterator[tuple[Sequence[str], Sequence[StepRecord]]]:
    """The steps in runs of the same policies, which rarely change."""
    for _, same in itertools.groupby(steps, lambda step: id(step.policies)):
        run = list(same)
        yield run[0].policies, run


def outcome_of(output: RequestOutput) -> str:
    """How a request ended: "error", "cancelled", "length" or "stop", the gravest of its sequences'."""
    reasons = {completion.finish_reason for completion in output.outputs}
    if output.error:
        return "error"
    return next((reason for reason in ("error", "cancelled", "length") if reason in reasons), "stop")


def _expert_samples(load: npt.NDArray[np.int64] | None) -> Iterator[Sample]:
    if load is not None:
        for layer, row in enumerate(load.tolist()):
            for expert, tokens in enumerate(row):
                yield Sample(definitions.EXPERT_TOKENS, (str(layer), str(expert)), tokens)


def _engine_samples(stats: EngineStats) -> list[Sample]:
    return [
        Sample(definitions.QUEUE_DEPTH, ("running",), stats.num_running),
        Sample(definitions.QUEUE_DEPTH, ("waiting",), stats.num_waiting),
        Sample(definitions.KV_BLOCKS, (), stats.kv_blocks_total),
        Sample(definitions.KV_BLOCKS_USED, (), stats.kv_blocks_used),
        Sample(definitions.PROMPT_TOKENS, (), stats.prompt_tokens_total),
        Sample(definitions.GENERATION_TOKENS, (), stats.generation_tokens_total),
        Sample(definitions.PREEMPTIONS, (), stats.preemptions_total),
        Sample(definitions.CANCELLATIONS, (), stats.cancellations_total),
        Sample(definitions.STEPS, (), stats.steps_total),
        *(Sample(definitions.LOAD_STEP, (policy,), step) for policy, step in stats.load_steps.items()),
    ]
