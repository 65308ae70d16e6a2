# SPDX-License-Identifier: Apache-2.0
"""An open-loop load: requests that arrive whether or not others were answered, under `full` and under a policy by load.

    python benchmarks/load.py                                      # the bundled olmoe-small
    python benchmarks/load.py --shape olmoe --weights int8         # random layers of OLMoE-1B-7B's size
    python benchmarks/load.py --engine_dir engine --policy auto    # an engine and a policy by load of its own
    python benchmarks/load.py --serve                              # over gRPC, to a real server
    python benchmarks/load.py --prepare                            # before: damage and the engine, no load
    python benchmarks/load.py --quick                              # does it run? its figures say nothing

Damage and the engine take no times and are kept in --work_dir, so that only the load itself needs an idle machine.
Answers are sampled at temperature 1: with greedy decoding random weights soon repeat one token, whose experts lie in a
cache.

Arrivals are a Poisson process, the same one for both policies of a rate. Rates are given, or shares of what the engine
answers a second under `full` with a full batch, measured first (a closed loop). The two policies take turns. Requests
that are not done when a window ends are aborted, and one that has no token by then counts with the time that it has
waited; where that could raise a figure by more than a tenth, it has a ">=".

With --serve the clients' clocks tell the times and tokens/s, the queue is of requests that have no token yet, and the
server's metrics tell the rest, with a second of what comes after the window.

"grows": the queue has no end at this rate, as far as a window tells. In the window's second half it rises by at least
5 % of the arrivals (the slope of a line through it), and at the end at least a full batch waits.

The policy by load has two steps of the kind `shared`, whose prices cost the bundled model `--kl` in decode steps of a
full batch; they are found first. A row's KL is that of the policies that its tokens followed, by their shares. A random
model (`_models.py`) has no quality to lose: the KL beside its times is that of the bundled model whose routing it has.
Of an engine of your own `adaptive-k eval --output FILE` measures each policy, and `--eval FILE` prints its figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from _models import MODELS, SHAPES, damage_laboratory, shape_checkpoint
from rich.console import Console
from rich.table import Table

from adaptive_k_moe.calibration.calibrate_decode import meet
from adaptive_k_moe.calibration.laboratory import Budget
from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_config import EngineConfig, read_engine_config, write_engine_config
from adaptive_k_moe.policy import FULL, ByLoadPolicy, PhasesPolicy, PolicySet, SharedPolicy
from adaptive_k_moe.runtime import LLM, SamplingParams
from adaptive_k_moe.runtime.handle import GenerationHandle
from adaptive_k_moe.runtime.telemetry import Observer, StepRecord

from _results import cpu_name, write_results

ROOT = Path(__file__).resolve().parents[1]
PROMPT_TOKENS = (16, 64)
SECONDS_BETWEEN_SAMPLES = 0.1
GROWS = 0.05
EXPORT_SECONDS = 2.5  # by then a server's metrics have what came before


PRICES = {"shared": (0.05, None), "shared_more": (0.2, 2)}
"""Of each step: the price to begin with, and what the trained top-k is divided by for its k_max."""


def policies_for(top_k: int, decode: Mapping[str, Any]) -> dict[str, Any]:
    """What an engine that is built here gets: prompts at full k, and two rules of decode, by name."""
    prefill = {"kind": "fixed", "k": top_k}
    steps = [{"policy": FULL}, {"policy": "shared", "queue": 1}, {"policy": "shared_more", "queue": 8}]
    return {
        "policies": {
            **{name: {"kind": "phases", "prefill": prefill, "decode": rule} for name, rule in decode.items()},
            "by_load": {"kind": "by_load", "steps": steps, "leave_seconds": 1.0},
        }
    }


def calibrated(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, float]]:
    """The rules of the steps and what each policy costs the bundled model, nats a token."""
    rules: dict[str, Any] = {}
    damage = {FULL: 0.0}
    tokens = 0 if args.quick else 3000
    with damage_laboratory(args.model, args.max_batch_size, tokens, args.work_dir, args.num_threads) as laboratory:
        top_k, layers = laboratory.evaluator.full_k, laboratory.evaluator.num_layers
        for (name, (price, divisor)), kl in zip(PRICES.items(), args.kl, strict=True):
            k_max = top_k if divisor is None else -(-top_k // divisor)
            start = SharedPolicy(kind="shared", price=price, k_min=1, k_max=k_max)
            found = None if args.quick else meet(laboratory, start, [1.0] * layers, Budget(kl=kl))
            found = found or laboratory.decode("shared", start)
            assert isinstance(found.candidate.policy, PhasesPolicy)
            rules[name] = found.candidate.policy.decode.model_dump(mode="json", exclude_none=True)
            damage[name] = found.scores.mean_kl
    return rules, damage


@dataclass
class Figures:
    """What a window brought. Times to first token are from the moment at which a request was to arrive.

    Attributes:
        rate: requests a second that were to arrive.
        policy: of all of them.
        arrived, answered: requests.
        tokens_per_second: generated tokens.
        first_token_median, first_token_p95: seconds; None if no request arrived.
        median_is_bound, p95_is_bound: whether requests without a token could raise it by more than a tenth.
        queue_mean, queue_end: sequences that waited.
        queue_slope: sequences a second by which the queue rose in the second half.
        grows: see the module.
        batch: mean sequences of a step.
        avg_k: mean experts run a token and layer.
        reads: mean experts read a step and layer; None where the session does not count.
        followed: share of the tokens under each policy.
        kl: of the policies followed, nats a token; None where nobody has measured it.
    """

    rate: float
    policy: str
    arrived: int = 0
    answered: int = 0
    tokens_per_second: float = 0.0
    first_token_median: float | None = None
    first_token_p95: float | None = None
    median_is_bound: bool = False
    p95_is_bound: bool = False
    queue_mean: float = 0.0
    queue_end: int = 0
    queue_slope: float = 0.0
    grows: bool = False
    batch: float = 0.0
    avg_k: float = 0.0
    reads: float | None = None
    followed: dict[str, float] = field(default_factory=dict)
    kl: float | None = None


class StepSums(Observer):
    """Sums over the steps while `counting`."""

    def __init__(self) -> None:
        self.counting = False
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.steps = self.sequences = self.generated = self.choices = self.runs = 0
        self.reads: list[float] = []
        self.followed: Counter[str] = Counter()

    def on_step(self, record: StepRecord) -> None:
        """Add a step."""
        if not self.counting:
            return
        self.steps += 1
        self.sequences += record.num_sequences
        self.generated += record.num_generated_tokens
        self.choices += record.k.size
        self.runs += int(record.k.sum())
        if record.reads is not None:
            self.reads.append(float(record.reads.mean()))
        for index, tokens in enumerate(np.bincount(record.policy_index).tolist()):
            if tokens:
                self.followed[record.policies[index]] += tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", default="olmoe-small", help="a bundled model; default: %(default)s")
    source.add_argument("--shape", choices=("olmoe", "mixtral"), help="a random model of a published layer shape")
    source.add_argument("--engine_dir", type=Path, help="an engine with a policy by load")
    parser.add_argument("--policy", default="by_load", help="the policy to compare with `full`; default: %(default)s")
    parser.add_argument("--rates", type=float, nargs="+", help="requests a second")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.9, 1.1, 1.4], help="of full's capacity")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a window")
    parser.add_argument("--max_tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--max_batch_size", type=int, default=16)
    weights = ("float32", "bfloat16", "int8", "int4")
    parser.add_argument("--weights", choices=weights, default="bfloat16", help="of an engine that is built here")
    parser.add_argument(
        "--kl", type=float, nargs=2, default=[0.02, 0.1], help="of the two steps under load; default: 0.02 0.1"
    )
    parser.add_argument(
        "--work_dir", type=Path, default=ROOT / "build" / "decode", help="keeps engines and checkpoints"
    )
    parser.add_argument("--num_threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--serve", action="store_true", help="start a Triton server and ask it, and not an LLM in-process"
    )
    parser.add_argument("--eval", type=Path, metavar="FILE", help="what `adaptive-k eval --output FILE` wrote")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prepare", action="store_true", help="only measure damage and build the engine")
    parser.add_argument("--quick", action="store_true", help="windows of two seconds")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "load.json")
    args = parser.parse_args()
    if args.quick:
        args.seconds = 2.0
    if args.engine_dir:
        run(args, args.engine_dir, None)
        return
    args.model = SHAPES[args.shape].model if args.shape else args.model
    rules, damage = calibrated(args)
    directory = engine_for(args, rules)
    if not args.prepare:
        run(args, directory, damage)


def engine_for(args: argparse.Namespace, rules: Mapping[str, Any]) -> Path:
    """An engine with the policies of `policies_for`, built where it is not there yet."""
    max_seq_len = PROMPT_TOKENS[1] + args.max_tokens + 1
    directory: Path = (
        args.work_dir / f"load-{args.shape or args.model}-{args.weights}-{args.max_batch_size}-{max_seq_len}"
    )
    if not directory.exists():
        print(f"engine of {model_name(args, directory)}, {args.weights}", flush=True)
        integers = args.weights.startswith("int")
        build(
            shape_checkpoint(args.shape, args.work_dir) if args.shape else MODELS / args.model,
            directory,
            dtype="bfloat16" if integers else args.weights,
            weight_only_precision=args.weights if integers else None,
            max_batch_size=args.max_batch_size,
            max_seq_len=max_seq_len,
        )
    config = read_engine_config(directory, verify_files=False)
    policies = PolicySet.model_validate(policies_for(config.pretrained_config.num_experts_per_tok, rules))
    config = config.model_copy(update={"adaptive_k": config.pretrained_config.fit_policies(policies)})
    write_engine_config(directory, config)
    return directory


def run(args: argparse.Namespace, directory: Path, kl: Mapping[str, float] | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150)
    config = read_engine_config(directory, verify_files=False)
    policy = config.adaptive_k.policies.get(args.policy)
    if not isinstance(policy, ByLoadPolicy):
        sys.exit(f"{directory} has no policy {args.policy!r} of the kind by_load: name one with --policy.")
    with LLM(directory, skip_tokenizer_init=True, num_threads=args.num_threads) as llm:
        capacity = closed_loop_rate(llm, args)
        console.print(
            f"{args.num_threads} threads of {cpu_name()}; full answers {capacity:.2f} requests a second, of "
            f"{args.max_tokens} tokens each, with a full batch of {llm.stats().max_batch_size}; by load: "
            + ", ".join(describe_step(step) for step in policy.reachable)
        )
        turns: list[tuple[float, str]] = []
        for number, rate in enumerate(args.rates or [share * capacity for share in args.shares]):
            turns += [(rate, name) for name in ((args.policy, FULL) if number % 2 else (FULL, args.policy))]
        if not args.serve:
            sums = StepSums()
            llm.add_observer(sums)
            rows = [window(llm, sums, args, Arrivals.at(rate, llm.config, args), name) for rate, name in turns]
    if args.serve:
        rows = asyncio.run(served_windows(directory, config, args, turns))
    for row in rows if kl is not None else ():
        row.kl = sum(share * kl[name] for name, share in row.followed.items())
    print_table(console, rows, capacity)
    damage = damage_of(args.eval, [step.policy for step in policy.reachable]) if args.eval else None
    print_damage(console, args, policy, damage, kl)
    content = {"threads": args.num_threads, "model": model_name(args, directory), "full_requests_per_second": capacity}
    content |= {
        "weights": None if args.engine_dir else args.weights,
        "served": args.serve,
        "policy": policy.model_dump(exclude_none=True),
        "rules": {
            name: rule.model_dump(mode="json", exclude_none=True)
            for name, rule in config.adaptive_k.policies.items()
            if name in {step.policy for step in policy.reachable}
        },
        "kl": kl,
        "damage": damage,
        "quick": args.quick,
    }
    write_results(args.output, {**content, "seconds": args.seconds, "rows": [asdict(row) for row in rows]})


def describe_step(step: Any) -> str:
    """A step and where it begins."""
    limits = [f"queue {step.queue}"] if step.queue is not None else []
    limits += [f"{step.time_between_tokens} s between tokens"] if step.time_between_tokens is not None else []
    return f"{step.policy} from {' or '.join(limits)}" if limits else step.policy


def model_name(args: argparse.Namespace, directory: Path) -> str:
    """What ran, without this machine's paths."""
    if args.engine_dir:
        return str(directory.resolve().name)
    return f"random layers of {args.shape}'s shape" if args.shape else str(args.model)


def random_prompt(config: EngineConfig, rng: np.random.Generator) -> list[int]:
    longest = min(PROMPT_TOKENS[1], config.build_config.longest_prompt)
    length = int(rng.integers(min(PROMPT_TOKENS[0], longest), longest + 1))
    return [int(token) for token in rng.integers(3, config.pretrained_config.vocab_size, length)]


@dataclass(frozen=True)
class Arrivals:
    """Requests that are to arrive in a window, the same ones whatever the policy.

    Attributes:
        rate: requests a second.
        times: seconds from the window's start.
        prompts: token ids.
    """

    rate: float
    times: list[float]
    prompts: list[list[int]]

    @classmethod
    def at(cls, rate: float, config: EngineConfig, args: argparse.Namespace) -> Arrivals:
        """A Poisson process of a rate."""
        rng = np.random.default_rng([args.seed, round(1000 * rate)])
        times = []
        time_ = float(rng.exponential(1 / rate))
        while time_ < args.seconds:
            times.append(time_)
            time_ += float(rng.exponential(1 / rate))
        return cls(rate, times, [random_prompt(config, rng) for _ in times])


def closed_loop_rate(llm: LLM, args: argparse.Namespace) -> float:
    """Requests a second under `full` while there is always one to come; the first batch warms up."""
    rng = np.random.default_rng(args.seed)
    batch = llm.stats().max_batch_size
    params = SamplingParams(max_tokens=args.max_tokens, end_id=-1, temperature=1.0, adaptive_k_policy=FULL)
    llm.generate([random_prompt(llm.config, rng) for _ in range(batch)], params)
    count = (2 if args.quick else 6) * batch
    outputs = llm.generate([random_prompt(llm.config, rng) for _ in range(count)], params)
    # Until as many are left as run at a time, for then the batch empties.
    ends = sorted(output.metrics.finished_time or 0.0 for output in outputs)
    begin = min(output.metrics.first_scheduled_time or 0.0 for output in outputs)
    return (count - batch + 1) / (ends[count - batch] - begin)


def window(llm: LLM, sums: StepSums, args: argparse.Namespace, arrivals: Arrivals, policy: str) -> Figures:
    """Let requests arrive for some time, and see how they fare."""
    params = SamplingParams(max_tokens=args.max_tokens, end_id=-1, temperature=1.0, adaptive_k_policy=policy)
    handles: list[GenerationHandle] = []
    samples: list[tuple[float, float]] = []
    sums.clear()
    sums.counting = True
    start = time.monotonic()
    moments = [(at, number) for number, at in enumerate(arrivals.times)]
    moments += [(float(at), -1) for at in np.arange(SECONDS_BETWEEN_SAMPLES, args.seconds, SECONDS_BETWEEN_SAMPLES)]
    for at, number in sorted(moments):
        time.sleep(max(0.0, start + at - time.monotonic()))
        if number < 0:
            samples.append((at, llm.stats().num_waiting))
        else:
            handles.append(llm.generate_async(arrivals.prompts[number], params))
    time.sleep(max(0.0, start + args.seconds - time.monotonic()))
    samples.append((args.seconds, llm.stats().num_waiting))
    sums.counting = False
    end = time.monotonic()
    for handle in handles:
        handle.abort()
    outputs = [handle.result() for handle in handles]
    found = Figures(arrivals.rate, policy)
    found.answered = sum(output.outputs[0].finish_reason == "length" for output in outputs)
    found.tokens_per_second = sums.generated / (end - start)
    firsts = [output.metrics.first_token_time for output in outputs]
    fill_in_times(found, arrivals, start, end, firsts)
    fill_in_queue(found, samples, llm.stats().max_batch_size)
    found.batch = sums.sequences / max(sums.steps, 1)
    found.avg_k = sums.runs / max(sums.choices, 1)
    found.reads = float(np.mean(sums.reads)) if sums.reads else None
    fill_in_followed(found, sums.followed)
    return found


def fill_in_times(found: Figures, arrivals: Arrivals, start: float, end: float, firsts: Sequence[float | None]) -> None:
    """Times to first token, of requests from `start` on; those without one have waited until `end`."""
    known = [(end, True) if first is None or first > end else (first, False) for first in firsts]
    waits = [(moment - start - at, bound) for (moment, bound), at in zip(known, arrivals.times, strict=True)]
    found.arrived = len(waits)
    found.first_token_median, found.median_is_bound = quantile(waits, 0.5)
    found.first_token_p95, found.p95_is_bound = quantile(waits, 0.95)


def fill_in_queue(found: Figures, samples: list[tuple[float, float]], max_batch_size: int) -> None:
    """What the queue did: (when, how many waited), up to the end."""
    length, found.queue_end = samples[-1][0], int(samples[-1][1])
    found.queue_mean = float(np.mean([waiting for _, waiting in samples]))
    found.queue_slope = slope([each for each in samples if each[0] >= length / 2])
    found.grows = found.queue_slope >= GROWS * found.rate and found.queue_end >= max_batch_size


def fill_in_followed(found: Figures, tokens: Mapping[str, float]) -> None:
    """Shares of the tokens by policy, the largest first."""
    total = max(sum(tokens.values()), 1)
    ordered = sorted(tokens.items(), key=lambda item: -item[1])
    found.followed = {name: count / total for name, count in ordered if count}


async def served_windows(
    directory: Path, config: EngineConfig, args: argparse.Namespace, turns: list[tuple[float, str]]
) -> list[Figures]:
    """`window` for each turn, over gRPC to a server of the engine."""
    from adaptive_k_moe.client import AsyncClient
    from adaptive_k_moe.model_repository import TritonServer
    from adaptive_k_moe.runtime.tokenizer import Tokenizer

    decode = Tokenizer.from_dir(directory).decode
    ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
    with tempfile.TemporaryDirectory() as scratch:
        log_file = Path(scratch) / "triton.log"
        with TritonServer(directory, **ports, log_file=log_file, num_threads=args.num_threads) as server:
            async with AsyncClient(server.grpc_url) as client:
                rows = []
                for rate, policy in turns:
                    arrivals = Arrivals.at(rate, config, args)
                    texts = [decode(prompt, skip_special_tokens=True) for prompt in arrivals.prompts]
                    rows.append(await served_window(client, server.metrics_url, config, args, arrivals, texts, policy))
    return rows


async def served_window(
    client: Any,
    url: str,
    config: EngineConfig,
    args: argparse.Namespace,
    arrivals: Arrivals,
    texts: list[str],
    policy: str,
) -> Figures:
    """As `window`; the prompts are texts."""
    firsts: list[float | None] = [None] * len(texts)
    tokens = [0] * len(texts)
    samples: list[tuple[float, float]] = []
    options = {"max_tokens": args.max_tokens, "end_id": -1, "temperature": 1.0, "adaptive_k_policy": policy}
    before = await asyncio.to_thread(read_metrics, url)
    start = time.monotonic()

    async def ask(number: int) -> None:
        await asyncio.sleep(max(0.0, start + arrivals.times[number] - time.monotonic()))
        async with client.generate(texts[number], stream=True, **options) as stream:
            async for chunk in stream:
                if firsts[number] is None:
                    firsts[number] = time.monotonic()
                tokens[number] += chunk.num_output_tokens

    async def watch() -> None:
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_SAMPLES)
            now = time.monotonic() - start
            samples.append(
                (now, sum(at <= now and first is None for at, first in zip(arrivals.times, firsts, strict=True)))
            )

    tasks = [asyncio.create_task(ask(number)) for number in range(len(texts))]
    watching = asyncio.create_task(watch())
    await asyncio.sleep(max(0.0, start + args.seconds - time.monotonic()))
    end = time.monotonic()
    generated, answered = sum(tokens), sum(each >= args.max_tokens for each in tokens)
    for task in (*tasks, watching):
        task.cancel()
    ended = await asyncio.gather(*tasks, watching, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):  # a cancellation is none
            raise error
    await asyncio.sleep(EXPORT_SECONDS)
    while total(after := await asyncio.to_thread(read_metrics, url), "adaptive_k_queue_depth"):
        await asyncio.sleep(SECONDS_BETWEEN_SAMPLES)
    grown: Samples = Counter(after)
    grown.subtract(before)

    found = Figures(arrivals.rate, policy, answered=answered, tokens_per_second=generated / (end - start))
    fill_in_times(found, arrivals, start, end, firsts)
    fill_in_queue(found, samples, args.max_batch_size)
    found.batch = total(grown, "adaptive_k_batch_size_sum") / max(total(grown, "adaptive_k_batch_size_count"), 1)
    choices = total(grown, "adaptive_k_experts_per_token_count")
    found.avg_k = total(grown, "adaptive_k_experts_per_token_sum") / max(choices, 1)
    if steps := total(grown, "adaptive_k_expert_reads_count"):
        found.reads = total(grown, "adaptive_k_expert_reads_sum") / steps
    names = [FULL, *config.adaptive_k.policies]
    fill_in_followed(found, {name: total(grown, "adaptive_k_experts_per_token_count", policy=name) for name in names})
    return found


Samples = Counter[tuple[str, frozenset[tuple[str, str]]]]


def read_metrics(url: str) -> Samples:
    """The samples of a page of metrics: name and labels to value."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"http://{url}/metrics", timeout=10) as answer:
        page = answer.read().decode()
    found: Samples = Counter()
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name.startswith("adaptive_k_"):
                found[sample.name, frozenset(sample.labels.items())] = sample.value
    return found


def total(samples: Samples, name: str, **labels: str) -> float:
    """The sum of the samples of a name that have the labels."""
    return sum(value for (found, has), value in samples.items() if found == name and labels.items() <= has)


def quantile(values: list[tuple[float, bool]], share: float) -> tuple[float | None, bool]:
    """The quantile of values of which some are lower bounds, and whether these could raise it by more than a tenth."""
    if not values:
        return None, False
    place = min(len(values) - 1, int(share * len(values)))
    found = sorted(value for value, _ in values)[place]
    highest = sorted(math.inf if bound else value for value, bound in values)[place]
    return found, highest > 1.1 * found


def slope(samples: list[tuple[float, float]]) -> float:
    """By how much the queue rises a second: the line of least squares."""
    times, queue = np.array(samples, float).T
    return float(np.polyfit(times, queue, 1)[0])


def print_table(console: Console, rows: list[Figures], capacity: float) -> None:
    table = Table(
        "requests/s", "policy", "tokens/s", "answered", "first token, s\n50 %, 95 %", "queue\nmean, end", "batch",
        "mean k", "reads\na step", "tokens by policy", "KL",
    )  # fmt: skip
    for row in rows:
        median, p95 = (
            "" if seconds is None else f"{'>=' * bound}{seconds:.3f}"
            for seconds, bound in (
                (row.first_token_median, row.median_is_bound),
                (row.first_token_p95, row.p95_is_bound),
            )
        )
        table.add_row(
            f"{row.rate:.2f} ({row.rate / capacity:.0%})",
            row.policy,
            f"{row.tokens_per_second:.0f}",
            f"{row.answered} of {row.arrived}",
            f"{median}, {p95}",
            f"{row.queue_mean:.1f}, {row.queue_end}{', grows' * row.grows}",
            f"{row.batch:.1f}",
            f"{row.avg_k:.2f}",
            "" if row.reads is None else f"{row.reads:.1f}",
            ", ".join(f"{name} {share:.0%}" for name, share in row.followed.items()),
            "" if row.kl is None else f"{row.kl:.4f}",
        )
    console.print(table)


def damage_of(path: Path, policies: list[str]) -> dict[str, Any]:
    """What `adaptive-k eval` found for the policies."""
    measured = {each["policy"]: each for each in json.loads(path.read_text())["policies"]}
    return {
        name: {figure: measured[name][figure] for figure in ("kl_to_full_nats", "perplexity_change")}
        for name in policies
        if name in measured
    }


def print_damage(
    console: Console,
    args: argparse.Namespace,
    policy: ByLoadPolicy,
    damage: dict[str, Any] | None,
    kl: Mapping[str, float] | None,
) -> None:
    if kl is not None:
        costs = ", ".join(f"{step.policy} {kl[step.policy]:.4f}" for step in policy.reachable)
        console.print(f"KL to full, nats a token, of {args.model} in decode steps of {args.max_batch_size}: {costs}")
        if args.shape:
            console.print("Times, k and reads are of a random model with its routing, which has no quality to lose.")
    elif damage is None:
        console.print("Quality: not measured here; adaptive-k eval --output FILE measures it, --eval FILE prints it.")
    else:
        for step in policy.reachable:
            if step.policy in damage:
                value, change = (
                    damage[step.policy][name]["value"] for name in ("kl_to_full_nats", "perplexity_change")
                )
                console.print(f"{step.policy}: KL to full {value:.5f} nats, perplexity {change:+.2%} (adaptive-k eval)")
            elif step.policy != FULL:
                console.print(f"{step.policy}: its quality is not in the file of --eval.")


if __name__ == "__main__":
    main()
