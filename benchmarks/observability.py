# SPDX-License-Identifier: Apache-2.0
"""What being observed costs: throughput of an engine with and without metrics, a request log and spans.

    python benchmarks/observability.py --engine_dir engine

One `LLM` is observed and not observed in turns, at the same requests, in pairs whose order alternates, so a slow
minute of a shared machine falls on both (two `LLM`s of one engine differ by more than what is measured). The cost is
the median over the pairs of the ratio of their processor times (of the whole process, all threads: logs and spans are
written while the next request is computed) and of their times, with an interval of 95 % by the ranks of the ratios,
which assumes no distribution. The metrics are collected every second, as a server's exporter does; spans go to an
exporter that drops them.

With --ab_test the observed one's requests are also part of an A/B test, of two variants of one policy, and are
written to its database. Answers are not scored: that is done in idle time, of which there is none here.

"Observer" is what the engine's own thread spends in observers, over its time in steps.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from rich.console import Console
from rich.table import Table

from adaptive_k_moe.observability.ab_test import ABTest, Guardrail
from adaptive_k_moe.observability.ab_test.service import ABService
from adaptive_k_moe.observability.logs import file_handler, get_logger
from adaptive_k_moe.observability.recorder import Recorder
from adaptive_k_moe.observability.request_records import RequestRecords
from adaptive_k_moe.observability.spans import RequestSpans
from adaptive_k_moe.runtime import LLM, GenerationHandle, RequestOutput, SamplingParams, StepRecord
from adaptive_k_moe.runtime.telemetry import Observer

from _results import write_results

PROMPT, ANSWER = 16, 48


class Dropped(SpanExporter):
    """Takes spans and keeps none."""

    def export(self, spans: object) -> SpanExportResult:  # noqa: ARG002
        """Say that all is well."""
        return SpanExportResult.SUCCESS


class Timed(Observer):
    """Passes everything on and notes how long that takes, and how long the steps take."""

    def __init__(self, observers: list[Observer]) -> None:
        self._observers = observers
        self.in_observers = 0.0
        self.in_steps = 0.0

    def on_step(self, record: StepRecord) -> None:
        """Pass a step on."""
        self.in_steps += record.total_seconds
        began = time.perf_counter()
        for observer in self._observers:
            observer.on_step(record)
        self.in_observers += time.perf_counter() - began

    def on_request_finished(self, output: RequestOutput) -> None:
        """Pass a request's end on."""
        began = time.perf_counter()
        for observer in self._observers:
            observer.on_request_finished(output)
        self.in_observers += time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine_dir", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--ab_test", action="store_true", help="have the requests take part in an A/B test, too")
    parser.add_argument("--num_threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/observability.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = run(args, Path(scratch))
    table = Table("batch", "tokens/s without", "processor time", "time", "observer")
    for row in rows:
        table.add_row(
            str(row["batch_size"]),
            f"{row['tokens_per_second_off']:.0f}",
            *(_interval(row[name]) for name in ("processor_cost", "time_cost")),
            f"{row['observer_share']:.2%}",
        )
    Console().print(table)
    write_results(args.output, {"pairs": args.pairs, "num_threads": args.num_threads, "results": rows})


def run(args: argparse.Namespace, scratch: Path) -> list[dict[str, object]]:
    handler = file_handler(scratch / "requests.jsonl")
    logger = get_logger("benchmark")
    logger.logger.propagate = False
    logger.logger.addHandler(handler)
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(Dropped()))
    stopping = threading.Event()
    with LLM(args.engine_dir, num_threads=args.num_threads) as llm:
        recorder = Recorder.of(llm)
        records = RequestRecords([logger.log_inference, RequestSpans(provider, "benchmark").export])
        timed = Timed([recorder, records])
        ab_test = _ab_test(llm, scratch / "ab.db") if args.ab_test else None
        collecting = threading.Thread(target=_collect, args=(recorder, stopping))
        collecting.start()
        try:
            rows = [_measure(batch_size, args.pairs, llm, timed, ab_test) for batch_size in args.batch_sizes]
        finally:
            if ab_test is not None:
                ab_test.close()
            stopping.set()
            collecting.join()
            records.close()
            provider.shutdown()
            handler.close()
    return rows


def _ab_test(llm: LLM, path: Path) -> ABService:
    policy = llm.policies.names[-1]
    variants = [f"{name}={policy}" for name in ("control", "same")]
    ABTest.start(path, "benchmark", variants, score_share=0.0, guardrails=(Guardrail("latency", 10.0),)).close()
    service = ABService(llm, path, log_error=print)
    llm.remove_observer(service)  # until its turn
    return service


def _collect(recorder: Recorder, stopping: threading.Event) -> None:
    news: object = None
    while not stopping.wait(1.0):
        if recorder.news() != news:
            news = recorder.news()
            list(recorder.collect())


def _measure(batch_size: int, pairs: int, llm: LLM, timed: Timed, ab_test: ABService | None) -> dict[str, object]:
    vocab = llm.config.pretrained_config.vocab_size
    prompts = [[3 + (7 * row + 13 * column) % (vocab - 3) for column in range(PROMPT)] for row in range(batch_size)]
    named = SamplingParams(max_tokens=ANSWER, end_id=-1, adaptive_k_policy=llm.policies.names[-1])
    unnamed = replace(named, adaptive_k_policy=None)
    units = itertools.count()

    observers = [timed] if ab_test is None else [timed, ab_test]

    def start(observed: bool, prompt: list[int]) -> GenerationHandle:
        if not observed or ab_test is None:
            return llm.generate_async(prompt, named)
        params, enrollment = ab_test.enroll(unnamed, str(next(units)))
        return llm.generate_async(prompt, params, enrollment=enrollment)

    def once(observed: bool) -> tuple[float, float]:
        for observer in observers if observed else []:
            llm.add_observer(observer)
        began = time.process_time(), time.perf_counter()
        for handle in [start(observed, prompt) for prompt in prompts]:
            handle.result()
        cost = time.process_time() - began[0], time.perf_counter() - began[1]
        for observer in observers:
            llm.remove_observer(observer)
        return cost

    once(False), once(True)
    timed.in_observers = timed.in_steps = 0.0
    processor_ratios, time_ratios, without = [], [], []
    for pair in range(pairs):
        if pair % 2:
            with_cost, without_cost = once(True), once(False)
        else:
            without_cost, with_cost = once(False), once(True)
        processor_ratios.append(with_cost[0] / without_cost[0])
        time_ratios.append(with_cost[1] / without_cost[1])
        without.append(without_cost[1])
    return {
        "batch_size": batch_size,
        "tokens_per_second_off": batch_size * ANSWER / statistics.median(without),
        "processor_cost": _cost(processor_ratios),
        "time_cost": _cost(time_ratios),
        "observer_share": timed.in_observers / timed.in_steps,
    }


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
