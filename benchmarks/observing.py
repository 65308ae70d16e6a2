# SPDX-License-Identifier: Apache-2.0
"""What being observed costs: throughput of an engine with and without metrics, a request log and spans.

    python benchmarks/observing.py --engine_dir engine

One `LLM` answers requests without a pause, as many at a time as the batch size, each followed by the next. Windows
in which it is observed alternate with windows in which it is not, in pairs whose order changes, so a slow minute
of a shared machine falls on both (two `LLM`s of one engine differ by more than what is measured). The cost is the
median over the pairs of the ratio of their times for a token, and of their processor times (of the whole process, all
threads), with an interval of 95 % by the ranks of the ratios, which assumes no distribution. Each row has more than
the one before it, and the first has nothing: what the method finds where there is nothing to be found.

The metrics are collected every second, as a server's exporter does. Spans of every request are encoded for OTLP, and
sent nowhere. With --ab_test the observed requests are also part of an A/B test, of two variants of one policy, and are
written to its database. Answers are not scored: that is done in idle time, of which there is none here.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from rich.console import Console
from rich.table import Table

from adaptive_k_moe.observability.ab_test import ABTest, Guardrail
from adaptive_k_moe.observability.ab_test.service import ABService
from adaptive_k_moe.observability.logs import file_handler, get_logger
from adaptive_k_moe.observability.recorder import Recorder
from adaptive_k_moe.observability.request_records import RequestRecords, Sink
from adaptive_k_moe.observability.spans import RequestSpans
from adaptive_k_moe.runtime import LLM, SamplingParams
from adaptive_k_moe.runtime.telemetry import Observer

from _results import write_results

PROMPT, MEAN_ANSWER = 16, 48
WINDOW_SECONDS, WARM_UP_SECONDS, COLLECT_SECONDS = 0.5, 1.0, 1.0


@dataclass(frozen=True)
class Setup:
    """A row of the table: who observes, and the A/B test that the requests take part in."""

    name: str
    observers: Sequence[Observer]
    ab_test: ABService | None = None


class Encoded(SpanExporter):
    """Encodes spans as for the wire, and sends them nowhere."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Encode spans."""
        encode_spans(spans).SerializeToString()
        return SpanExportResult.SUCCESS


class Load:
    """Requests without a pause, `batch_size` at a time.

    Attributes:
        ab_test: the A/B test that requests are enrolled in from now on.
    """

    def __init__(self, llm: LLM, batch_size: int) -> None:
        self.ab_test: ABService | None = None
        self._llm = llm
        self._params = SamplingParams(max_tokens=MEAN_ANSWER, end_id=-1, adaptive_k_policy=llm.policies.names[-1])
        self._ending = threading.Event()
        self._units = itertools.count()
        self._clients = [threading.Thread(target=self._ask, args=(client,)) for client in range(batch_size)]
        for client in self._clients:
            client.start()

    def close(self) -> None:
        """Let the running requests end, and start no more."""
        self._ending.set()
        for client in self._clients:
            client.join()

    def _ask(self, client: int) -> None:
        vocab = self._llm.config.pretrained_config.vocab_size
        for turn in itertools.count():
            if self._ending.is_set():
                return
            prompt = [3 + (7 * client + 13 * column + turn) % (vocab - 3) for column in range(PROMPT)]
            length = MEAN_ANSWER - 16 + (7 * turn + 5 * client) % 33
            params, enrollment = replace(self._params, max_tokens=length), None
            if self.ab_test is not None:
                unnamed = replace(params, adaptive_k_policy=None)
                params, enrollment = self.ab_test.enroll(unnamed, str(next(self._units)))
            self._llm.generate_async(prompt, params, enrollment=enrollment).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine_dir", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--ab_test", action="store_true", help="a row with an A/B test, too")
    parser.add_argument("--num_threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/observability.json"))
    args = parser.parse_args()
    table = Table("observed by", "tokens/s without", "requests/s", "time", "processor time")
    rows = []
    with LLM(args.engine_dir, num_threads=args.num_threads) as llm, tempfile.TemporaryDirectory() as scratch:
        load = Load(llm, args.batch_size)
        with contextlib.closing(load), setups(llm, Path(scratch), args.ab_test) as all_setups:
            time.sleep(WARM_UP_SECONDS)
            for setup in all_setups:
                rows.append(row := measure(llm, load, setup, args.pairs))
                table.add_row(
                    setup.name,
                    f"{row['tokens_per_second_off']:.0f}",
                    f"{row['requests_per_second']:.0f}",
                    *(_interval(row[name]) for name in ("time_cost", "processor_cost")),
                )
        model = llm.config.pretrained_config.architecture
    Console().print(table)
    facts = {"model": model, "batch_size": args.batch_size, "pairs": args.pairs, "num_threads": args.num_threads}
    write_results(args.output, {**facts, "results": rows})


@contextlib.contextmanager
def setups(llm: LLM, scratch: Path, with_ab_test: bool) -> Iterator[list[Setup]]:
    """What is measured, one after the other."""
    with contextlib.ExitStack() as stack:
        recorder = Recorder.of(llm)
        stopping = threading.Event()
        collecting = threading.Thread(target=_collect, args=(recorder, stopping))
        collecting.start()
        stack.callback(collecting.join)
        stack.callback(stopping.set)
        handler = stack.enter_context(contextlib.closing(file_handler(scratch / "requests.jsonl")))
        logger = get_logger("benchmark")
        logger.logger.propagate = False
        logger.logger.addHandler(handler)
        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(Encoded()))
        stack.callback(provider.shutdown)

        def records(*sinks: Sink) -> RequestRecords:
            return stack.enter_context(contextlib.closing(RequestRecords(sinks)))

        all_records = records(logger.log_inference, RequestSpans(provider, "benchmark").export)
        found = [
            Setup("nothing", []),
            Setup("metrics", [recorder]),
            Setup("metrics, log", [recorder, records(logger.log_inference)]),
            Setup("metrics, log, spans", [recorder, all_records]),
        ]
        if with_ab_test:
            service = stack.enter_context(contextlib.closing(_ab_test(llm, scratch / "ab.db")))
            found.append(Setup("metrics, log, spans, A/B test", [recorder, all_records, service], service))
        yield found


def measure(llm: LLM, load: Load, setup: Setup, pairs: int) -> dict[str, object]:
    """What a setup costs."""
    nobody = Setup("", [])
    time_ratios, processor_ratios, without, requests = [], [], [], 0
    for pair in range(pairs):
        order = (setup, nobody) if pair % 2 else (nobody, setup)
        finished = llm.stats().finished_total
        costs = {each.name: _window(llm, load, each) for each in order}
        requests += llm.stats().finished_total - finished
        time_ratios.append(costs[setup.name][0] / costs[""][0])
        processor_ratios.append(costs[setup.name][1] / costs[""][1])
        without.append(costs[""][0])
    return {
        "observed_by": setup.name,
        "tokens_per_second_off": 1 / statistics.median(without),
        "requests_per_second": requests / (2 * pairs * WINDOW_SECONDS),
        "time_cost": _cost(time_ratios),
        "processor_cost": _cost(processor_ratios),
    }


def _window(llm: LLM, load: Load, setup: Setup) -> tuple[float, float]:
    """Time and processor time for a token, in seconds."""
    for observer in setup.observers:
        llm.add_observer(observer)
    load.ab_test = setup.ab_test
    began = llm.stats().generation_tokens_total, time.perf_counter(), time.process_time()
    time.sleep(WINDOW_SECONDS)
    ended = llm.stats().generation_tokens_total, time.perf_counter(), time.process_time()
    load.ab_test = None
    for observer in setup.observers:
        llm.remove_observer(observer)
    tokens = ended[0] - began[0]
    return (ended[1] - began[1]) / tokens, (ended[2] - began[2]) / tokens


def _ab_test(llm: LLM, path: Path) -> ABService:
    policy = llm.policies.names[-1]
    variants = [f"{name}={policy}" for name in ("control", "same")]
    ABTest.start(path, "benchmark", variants, score_share=0.0, guardrails=(Guardrail("latency", 10.0),)).close()
    service = ABService(llm, path, log_error=print)
    llm.remove_observer(service)  # until its turn
    return service


def _collect(recorder: Recorder, stopping: threading.Event) -> None:
    news: object = None
    while not stopping.wait(COLLECT_SECONDS):
        if recorder.news() != news:
            news = recorder.news()
            list(recorder.collect())


def _cost(ratios: list[float]) -> dict[str, float]:
    """The median of ratios less 1, and the ranks' interval of 95 % around it."""
    ordered = sorted(ratios)
    count = len(ordered)
    # The largest rank whose binomial tail is at most 2.5 % on each side.
    tail, rank = 0.0, 0
    while (tail := tail + math.comb(count, rank) / 2**count) <= 0.025:
        rank += 1
    low = ordered[max(rank - 1, 0)]
    high = ordered[min(count - rank, count - 1)]
    return {"median": statistics.median(ordered) - 1, "low": low - 1, "high": high - 1}


def _interval(cost: object) -> str:
    assert isinstance(cost, dict)
    return f"{cost['median']:+.2%} ({cost['low']:+.2%} to {cost['high']:+.2%})"


if __name__ == "__main__":
    main()
