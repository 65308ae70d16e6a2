# SPDX-License-Identifier: Apache-2.0
"""The counts behind the metrics, against `prometheus_client`'s own histograms and against plain sums."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import numpy as np
import prometheus_client
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from observed import make_output

from adaptive_k_moe.observability import definitions
from adaptive_k_moe.observability.definitions import MAX_POLICY_LABELS, OTHER_POLICIES
from adaptive_k_moe.observability.histogram import Histograms, HistogramValue
from adaptive_k_moe.observability.recorder import Recorder
from adaptive_k_moe.runtime.telemetry import Refusal, StepRecord


def recorder(num_layers: int = 2, **options: Any) -> Recorder:
    return Recorder(num_layers=num_layers, num_experts=8, full_k=4, max_k=4, stats=lambda: None, **options)


def step(k: Any, entropy: Any, policy_index: Any, policies: Any, intervals: tuple[float, ...] = ()) -> StepRecord:
    return StepRecord(
        num_sequences=1,
        num_prefill_tokens=0,
        num_decode_tokens=len(k),
        num_generated_tokens=len(k),
        num_preempted=0,
        session_seconds=0.01,
        total_seconds=0.02,
        token_intervals=list(intervals),
        k=np.asarray(k, np.int32),
        entropy=np.asarray(entropy, np.float32),
        policy_index=np.asarray(policy_index, np.int32),
        policies=policies,
    )


def samples(of: Recorder, metric: definitions.Metric) -> dict[tuple[str, ...], Any]:
    return {sample.labels: sample.value for sample in of.collect() if sample.metric is metric}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 10, width=32) | st.sampled_from([0.1, 0.2, 1.0, 2.0]), max_size=50), st.booleans())
def test_histograms_count_as_prometheus_clients_own_do(values: list[float], at_once: bool) -> None:
    limits = (0.1, 0.2, 1.0, 2.0, 5.0)
    theirs = prometheus_client.Histogram("name", "help", buckets=limits, registry=None)
    ours = Histograms(limits)
    for value in values:
        theirs.observe(value)
        if not at_once:
            ours.observe(value)
    if at_once:
        ours.observe_many(np.array(values, np.float64), np.zeros(len(values), np.int64))
    found = {sample.labels.get("le", sample.name): sample.value for sample in next(iter(theirs.collect())).samples}
    value = ours.value()
    assert {definitions.format_limit(limit): count for limit, count in value.cumulative()} == {
        le: count for le, count in found.items() if not le.startswith("name")
    }
    assert value.count == found["name_count"]
    assert value.sum == pytest.approx(found["name_sum"])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 4))
def test_steps_are_counted_by_layer_and_policy(seed: int, num_layers: int, num_steps: int) -> None:
    rng = np.random.default_rng(seed)
    tables = [["full", "fast"], ["fast", "new", "full"]]  # policies change place, and one comes
    ours = recorder(num_layers)
    ks: Counter[tuple[str, str]] = Counter()
    tokens: Counter[tuple[str, str]] = Counter()
    entropies = np.zeros(num_layers)
    for _ in range(num_steps):
        policies = tables[int(rng.integers(2))]
        num_tokens = int(rng.integers(0, 6))
        k = rng.integers(1, 7, (num_tokens, num_layers))
        entropy = rng.uniform(0, 3, (num_tokens, num_layers)).astype(np.float32)
        index = rng.integers(0, len(policies), num_tokens)
        ours.on_step(step(k, entropy, index, policies))
        entropies += entropy.sum(axis=0)
        for row, policy in zip(k, index, strict=True):
            for layer, experts in enumerate(row):
                ks[str(layer), policies[policy]] += int(experts)
                tokens[str(layer), policies[policy]] += 1
    found = samples(ours, definitions.EXPERTS_PER_TOKEN)
    assert {labels: value.sum for labels, value in found.items() if value.count} == dict(ks)
    assert {labels: value.count for labels, value in found.items() if value.count} == dict(tokens)
    by_layer = samples(ours, definitions.ROUTER_ENTROPY)
    assert [by_layer[str(layer),].sum for layer in range(num_layers)] == pytest.approx(entropies.tolist())
    assert samples(ours, definitions.BATCH_SIZE)[()].count == num_steps
    for policy in {policy for _, policy in tokens}:
        mean = sum(n for (_, p), n in ks.items() if p == policy) / sum(n for (_, p), n in tokens.items() if p == policy)
        assert samples(ours, definitions.AVG_K)[policy,] == pytest.approx(mean)
        assert samples(ours, definitions.COMPUTE_SAVED)[policy,] == pytest.approx(1 - mean / 4)


def test_reads_are_counted_by_layer_where_they_are_known() -> None:
    ours = recorder(2)
    steps = [step([[1, 2]], [[0.1, 0.2]], [0], ["full"])._replace(reads=reads) for reads in ([1, 8], None, [3, 7])]
    for each in steps:
        ours.on_step(each if each.reads is None else each._replace(reads=np.asarray(each.reads, np.int32)))
    found = samples(ours, definitions.EXPERT_READS)
    assert {labels: (value.count, value.sum) for labels, value in found.items()} == {("0",): (2, 4), ("1",): (2, 15)}
    assert found["0",].limits == (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)  # a layer has 8 experts
    unknown = recorder(2)
    unknown.on_step(steps[1])
    assert samples(unknown, definitions.EXPERT_READS) == {}


def test_a_nan_entropy_counts_beyond_the_last_limit() -> None:
    ours = recorder(1)
    ours.on_step(step([[4], [1]], [[np.nan], [0.3]], [0, 0], ["full"]))
    value = samples(ours, definitions.ROUTER_ENTROPY)["0",]
    assert value.counts[-1] == 1
    assert value.sum == pytest.approx(0.3)


def test_limits_that_the_model_cannot_reach_are_left_out() -> None:
    ours = recorder(1)
    ours.on_step(step([[2]], [[1.0]], [0], ["full"]))
    assert max(samples(ours, definitions.ROUTER_ENTROPY)["0",].limits) == 2.0  # ln 8 is 2.08
    assert samples(ours, definitions.EXPERTS_PER_TOKEN)["0", "full"].limits == (1.0, 2.0, 3.0, 4.0)


def test_requests_are_counted_by_policy_outcome_and_kind_of_error() -> None:
    ours = recorder(keep_observations=True)
    ours.on_request_finished(make_output())
    ours.on_request_finished(make_output(policy="full", error="the engine failed: x", error_kind="engine"))
    ours.on_request_refused(Refusal("", "no such", "sentence", "policy"))
    assert samples(ours, definitions.REQUESTS) == {
        ("balanced", "stop"): 1, ("full", "error"): 1, ("-", "refused"): 1,
    }  # fmt: skip
    assert samples(ours, definitions.ERRORS) == {("engine",): 1, ("policy",): 1}
    latency = samples(ours, definitions.LATENCY)
    assert latency["balanced",].sum == pytest.approx(1.0)
    assert samples(ours, definitions.TIME_TO_FIRST_TOKEN)["balanced",].sum == pytest.approx(0.5)
    assert samples(ours, definitions.QUEUE_TIME)["balanced",].sum == pytest.approx(0.25)
    # An exporter of single observations gets each of them once.
    taken = ours.take_observations()
    assert Counter(observation.metric for observation in taken)[definitions.LATENCY] == 2
    assert ours.take_observations() == []


def test_policy_labels_are_bounded() -> None:
    ours = recorder(1)
    for number in range(3 * MAX_POLICY_LABELS):
        ours.on_step(step([[1]], [[0.0]], [0], [f"policy-{number}"]))
        ours.on_request_finished(make_output(policy=f"policy-{number}"))
    counted = samples(ours, definitions.EXPERTS_PER_TOKEN)
    assert len(counted) == MAX_POLICY_LABELS + 1
    assert counted["0", OTHER_POLICIES].count == 2 * MAX_POLICY_LABELS
    assert samples(ours, definitions.REQUESTS)[OTHER_POLICIES, "stop"] == 2 * MAX_POLICY_LABELS


def test_nothing_is_lost_between_threads() -> None:
    ours = recorder(1)
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            list(ours.collect())

    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in readers:
        thread.start()
    policies = ["full"]
    for number in range(3000):
        shape = (number % 5, 1)
        ours.on_step(step(np.ones(shape), np.full(shape, 0.5), np.zeros(shape[0]), policies, (0.001,)))
    done.set()
    for thread in readers:
        thread.join()
    assert samples(ours, definitions.EXPERTS_PER_TOKEN)["0", "full"].count == 3000 * 2
    assert samples(ours, definitions.STEP_TIME)[()].count == 3000
    assert samples(ours, definitions.TIME_BETWEEN_TOKENS)[()].count == 3000


def test_news_tells_whether_anything_has_changed() -> None:
    ours = recorder(1)
    before = ours.news()
    assert ours.news() == before
    ours.on_step(step([[1]], [[0.0]], [0], ["full"]))
    after = ours.news()
    assert after != before
    ours.on_request_refused(Refusal("", None, "sentence", "request"))
    assert ours.news() != after


def test_a_histogram_value_does_not_change_later() -> None:
    histograms = Histograms((1.0,))
    histograms.observe(0.5)
    value = histograms.value()
    histograms.observe(0.5)
    assert isinstance(value, HistogramValue) and value.count == 1
