# SPDX-License-Identifier: Apache-2.0
"""Decode of whole engines at published layer shapes, under policies that do the same damage to a trained model.

    python benchmarks/decode.py                                           # all of it
    python benchmarks/decode.py --shapes olmoe --weights int8 --batch_sizes 16
    python benchmarks/decode.py --prepare                                 # before: damage and engines, no times
    python benchmarks/decode.py --table                                   # print the file

Two models stand behind every row, and no figure is of both:

- Damage is of a bundled trained model, `adaptive-k calibrate`'s: KL divergence from its full top-k in decode steps of
  the batch. For each rule the number is found that costs `--kl`, the same number in all layers; for fixed k the best
  by layer.
- Time, k and reads are of a random model of a published layer shape with the bundled model's routing (`_models.py`).
  Where shape and bundled model have as many experts, the rule's number is the same. A shape with more experts gets the
  number with which its tokens lose as much: the share of the squared weights of their own top-k that they do not run.

Rules: `full`; `static`, a fixed k by layer; the better of `ratio` and `top_p` by reads; `shared` with the trained k_max
and with lower ones. All are timed in turns on the same tokens (`calibration/timing.py`). Then steps are profiled, in
turns again: time in AdaptiveKMoe, and in everything else. Contexts are short, so attention over the cache takes next
to nothing. "time over bytes" is the experts' time over the bytes of the experts read, both as shares of full's: 1 where
fewer bytes are as much less time. A fit over a batch's policies says what an expert read and an expert run take.

Damage takes no times, so it is measured once and kept in --rules. Checkpoints and engines (1 to 3 GB each) are kept in
--work_dir. Results are added to --output, in place of those of the same shape, weights and batch; those of another
machine are dropped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _models import (
    SHAPES,
    WINDOWS,
    Shape,
    TrainedRouting,
    damage_laboratory,
    shape_checkpoint,
    shape_routing,
    shape_tokens,
    small_engine,
    trained_routing,
)

from adaptive_k_moe.calibration.calibrate_decode import meet, scaled, static_at
from adaptive_k_moe.calibration.evaluator import Evaluator, policy_tables
from adaptive_k_moe.calibration.laboratory import Budget, Measured
from adaptive_k_moe.calibration.solve import best_of
from adaptive_k_moe.calibration.timing import time_policies
from adaptive_k_moe.calibration.windows import Windows
from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_config import EngineConfig, read_engine_config
from adaptive_k_moe.plugin import instruction_set, route
from adaptive_k_moe.plugin.description import GATED_ACTIVATIONS
from adaptive_k_moe.policy import (
    FULL,
    FixedPolicy,
    PhasesPolicy,
    PolicySet,
    PolicyTables,
    RatioPolicy,
    SharedPolicy,
    TopPPolicy,
)
from adaptive_k_moe.runtime.session.openvino import OpenVinoSession

from _results import cpu_name, write_results
from _roofline import BITS, read_bandwidth

ROOT = Path(__file__).resolve().parents[1]
PROMPT, STEPS = 8, 12
"""Tokens of each sequence before and in the steps that are timed."""

LOST_STEPS = 32
"""Steps in which it is counted what a rule leaves out."""

PROFILE_ROUNDS = 3


@dataclass(frozen=True)
class Machine:
    """What measured: rows of two are not in one file."""

    cpu: str
    instruction_set: str
    threads: int
    target_kl: float


@dataclass
class Row:
    """One policy on one shape. Damage is of `damage_of`, all other figures of the shape's random model."""

    shape: str
    weights: str
    batch: int
    policy: str
    rule: dict[str, Any]
    avg_k: float
    reads: float
    reads_share: float
    milliseconds: float
    tokens_per_second: float
    time_share: float
    time_share_low: float
    time_share_high: float
    experts_milliseconds: float
    other_milliseconds: float
    experts_time_share: float
    experts_bytes: float
    read_bandwidth: float
    damage_of: str
    kl: float
    reads_share_there: float

    @property
    def time_over_bytes(self) -> float:
        """The experts' time over their bytes, each as a share of full's."""
        return self.experts_time_share / self.reads_share

    @property
    def share_of_bandwidth(self) -> float:
        """At which the experts' bytes come, of the bandwidth that was measured beside it."""
        return self.experts_bytes / (self.experts_milliseconds / 1e3) / self.read_bandwidth


@dataclass(frozen=True)
class Damaging:
    """A rule that costs the bundled model the asked KL.

    Attributes:
        rule: of decode.
        kl: nats a token.
        reads_share: of full's, on the bundled model.
    """

    rule: Any
    kl: float
    reads_share: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--weights", nargs="+", choices=tuple(BITS), default=["int8"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--kl", type=float, default=0.02, help="damage of every rule, nats a token")
    parser.add_argument("--tokens", type=int, default=1520, help="decoded in a measurement of damage, at least")
    parser.add_argument("--rounds", type=int, default=5, help="how often each policy is timed")
    parser.add_argument("--num_threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work_dir", type=Path, default=ROOT / "build" / "decode")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "decode.json")
    rules_file = ROOT / "benchmarks" / "results" / "decode_rules.json"
    parser.add_argument("--rules", type=Path, default=rules_file, help="keeps what was found of damage")
    parser.add_argument("--prepare", action="store_true", help="only measure damage and build engines")
    parser.add_argument("--table", action="store_true", help="print the file and measure nothing")
    args = parser.parse_args()
    machine = Machine(cpu_name(), instruction_set(), args.num_threads, args.kl)
    rows = kept_rows(args.output, None if args.table else machine)
    if not args.table:
        for name in args.shapes:
            shape = SHAPES[name]
            rules = {batch: rules_of_equal_damage(shape, batch, args) for batch in args.batch_sizes}
            for weights in args.weights:
                directory = shape_engine(name, weights, args.work_dir)
                if args.prepare:
                    continue
                for batch, found in rules.items():
                    measured = measure(name, weights, directory, batch, found, args)
                    print_table(measured)
                    rows = [each for each in rows if order(each) != order(measured[0])] + measured
                    rows.sort(key=order)
                    # After each, so that a run which is stopped has not been for nothing.
                    write_results(args.output, {**asdict(machine), "rows": [asdict(row) for row in rows]})
    if args.table:
        print_table(rows)
        print()
    if not args.prepare:
        print_summary(rows)


def kept_rows(path: Path, machine: Machine | None) -> list[Row]:
    """The rows of a file, if this machine measured them; None asks for no machine."""
    content = json.loads(path.read_text()) if path.exists() else {"rows": []}
    if machine is not None and any(content.get(name) != value for name, value in asdict(machine).items()):
        return []
    return [Row(**row) for row in content["rows"]]


def order(row: Row) -> tuple[Any, ...]:
    return list(SHAPES).index(row.shape), list(BITS).index(row.weights), row.batch


# Damage, on the bundled model. --------------------------------------------------------------------


def rules_of_equal_damage(shape: Shape, batch: int, args: argparse.Namespace) -> dict[str, Damaging]:
    """By name the rules that cost the bundled model the asked KL in decode steps of the batch."""
    key = f"{shape.model}, steps of {batch}, KL {args.kl:g}, {args.tokens} tokens"
    known = json.loads(args.rules.read_text()) if args.rules.exists() else {}
    if key in known:
        return {
            name: Damaging(parse_rule(each["rule"]), each["kl"], each["reads_share"])
            for name, each in known[key].items()
        }
    print(f"damage to {shape.model} in decode steps of {batch}", flush=True)
    with damage_laboratory(shape.model, batch, args.tokens, args.work_dir, args.num_threads) as laboratory:
        full_k, layers = laboratory.evaluator.full_k, laboratory.evaluator.num_layers
        budget, even = Budget(kl=args.kl), [1.0] * layers
        found: dict[str, Measured | None] = {"static": static_at(laboratory, budget)}
        starts: list[Any] = [RatioPolicy(kind="ratio", ratio=0.2), TopPPolicy(kind="top_p", p=0.6)]
        tokens = [each for each in (meet(laboratory, rule, even, budget) for rule in starts) if each is not None]
        found["per token"] = best_of(tokens, budget) if tokens else None
        for k_max in sorted({full_k, -(-3 * full_k // 4), -(-5 * full_k // 8)}, reverse=True):
            lower = {} if k_max == full_k else {"k_max": k_max}
            start = SharedPolicy(kind="shared", price=0.03, k_min=1, **lower)
            found["shared" + f", k at most {k_max}" * bool(lower)] = meet(laboratory, start, even, budget)
        reads = laboratory.full().scores.avg_reads
    rules = {FULL: Damaging(FixedPolicy(kind="fixed", k=full_k), 0.0, 1.0)}
    for name, each in found.items():
        if each is not None:
            assert isinstance(each.candidate.policy, PhasesPolicy)
            rules[name] = Damaging(each.candidate.policy.decode, each.scores.mean_kl, each.scores.avg_reads / reads)
    known = json.loads(args.rules.read_text()) if args.rules.exists() else {}  # others may have written meanwhile
    known[key] = {
        name: {"rule": rule_json(each.rule), "kl": each.kl, "reads_share": each.reads_share}
        for name, each in rules.items()
    }
    args.rules.write_text(json.dumps(known, indent=1) + "\n")
    return rules


def rule_json(rule: Any) -> dict[str, Any]:
    content: dict[str, Any] = rule.model_dump(mode="json", exclude_none=True)
    if not content.get("layers", True):
        del content["layers"]
    return content


def parse_rule(content: Mapping[str, Any]) -> Any:
    rules: Any = PolicySet.model_validate({"policies": {"asked": content}}).policies
    return rules["asked"]


# The rules on a shape. ----------------------------------------------------------------------------


def on_shape(shape: Shape, config: EngineConfig, rule: Any, batch: int, work_dir: Path) -> Any:
    """A rule of the bundled model, for the shape's layers and experts."""
    trained = trained_routing(shape.model, work_dir)
    _, _, layers, experts = trained.logits.shape
    full_k = config.pretrained_config.num_experts_per_tok
    if rule.layers:  # a fixed k
        by_layer = {
            layer: rule.choices(layer % layers, full_k).model_dump()
            for layer in range(config.pretrained_config.num_moe_layers)
        }
        return type(rule).model_validate({"kind": rule.kind, "layers": by_layer})
    if shape.num_experts == experts or isinstance(rule, FixedPolicy):
        return rule
    small = read_engine_config(small_engine(shape.model, work_dir), verify_files=False)
    wanted = lost(small, trained, rule, batch)
    here = shape_routing(shape, trained)
    low, high = -8.0, 8.0  # logarithm of what the number is multiplied by; the larger, the more is lost
    for _ in range(16):
        middle = (low + high) / 2
        missing = lost(config, here, scaled(rule, [math.exp(middle)], full_k), batch) < wanted
        low, high = (middle, high) if missing else (low, middle)
    return scaled(rule, [math.exp(low)], full_k)


def lost(config: EngineConfig, routing: TrainedRouting, rule: Any, batch: int) -> float:
    """The share of the squared weights of a token's own top-k that it does not run, in decode steps of a batch."""
    tables, moe = policy_tables(config, {"asked": rule}), config.pretrained_config.moe
    windows, positions, layers, experts = routing.logits.shape
    shares = []
    for step in range(LOST_STEPS):
        rows = (step * batch + np.arange(batch)) % windows
        for layer in range(layers):
            bias = routing.correction_bias
            own, run = (
                route(
                    np.ascontiguousarray(routing.logits[rows, 5 * step % positions, layer]),
                    np.full(batch, policy, np.int32), tables.policy_kind, tables.thresholds[layer],
                    tables.k_values[layer], correction_bias=None if bias is None else bias[layer],
                    scoring=moe.scoring, norm_topk_prob=moe.norm_topk_prob,
                    routed_scaling_factor=moe.routed_scaling_factor, n_group=moe.n_group, topk_group=moe.topk_group,
                )
                for policy in (0, 1)
            )  # fmt: skip
            runs = np.zeros((batch, experts + 1), np.bool_)  # -1 is the last column
            np.put_along_axis(runs, run.experts, True, axis=1)
            kept = np.take_along_axis(runs, own.experts, axis=1)
            squares = np.square(own.weights, dtype=np.float64)
            shares.append(1 - (squares * kept).sum(axis=1) / squares.sum(axis=1))
    return float(np.mean(shares))


# Time, on the shape's random model. ---------------------------------------------------------------


def shape_engine(name: str, weights: str, work_dir: Path) -> Path:
    """The engine of a shape, built where it is not there yet."""
    directory = work_dir / f"{name}-{weights}"
    if not directory.exists():
        checkpoint = shape_checkpoint(name, work_dir)
        print(f"engine of {name}'s shape, {weights}", flush=True)
        precision = weights if weights.startswith("int") else None
        dtype = "bfloat16" if precision else weights
        sizes = {"max_batch_size": WINDOWS, "max_seq_len": 128, "max_num_tokens": PROMPT * WINDOWS}
        build(checkpoint, directory, dtype=dtype, weight_only_precision=precision, **sizes)  # type: ignore[arg-type]
    return directory


def measure(
    name: str, weights: str, directory: Path, batch: int, found: Mapping[str, Damaging], args: argparse.Namespace
) -> list[Row]:
    """All policies at one batch size on one engine."""
    shape = SHAPES[name]
    tokens = shape_tokens(shape, PROMPT + STEPS)
    windows = Windows(tokens, 1, np.zeros(len(tokens), np.int64), [name])
    with Evaluator(directory, num_threads=args.num_threads) as evaluator:
        policies = {
            policy: on_shape(shape, evaluator.config, each.rule, batch, args.work_dir)
            for policy, each in found.items()
            if policy != FULL
        }
        tables = evaluator.tables(policies)
        bandwidth = read_bandwidth(args.num_threads)
        timings = time_policies(
            evaluator, windows, tables, list(policies), batches=(batch,), rounds=args.rounds, decode_steps=STEPS,
            phases=("decode",), prompt_tokens=PROMPT,
        )  # fmt: skip
        profiles = profile(evaluator, tokens[:batch], tables)
        moe = evaluator.config.pretrained_config.moe
        matrices = 3 if moe.activation in GATED_ACTIVATIONS else 2
        width = moe.latent_size or evaluator.config.pretrained_config.hidden_size
        expert_bytes = matrices * width * moe.intermediate_size * BITS[weights] / 8
    rows = []
    for timing in timings:
        assert timing.reads is not None and timings[0].reads is not None
        mine, others = profiles[timing.policy]
        ratio, damage = timing.ratio, found[timing.policy]
        rows.append(
            Row(
                shape=name, weights=weights, batch=batch, policy=timing.policy,
                rule=rule_json(policies.get(timing.policy, damage.rule)),
                avg_k=timing.avg_k, reads=timing.reads, reads_share=timing.reads / timings[0].reads,
                milliseconds=1e3 * timing.seconds / STEPS, tokens_per_second=timing.tokens_per_second,
                time_share=ratio.value, time_share_low=ratio.low, time_share_high=ratio.high,
                experts_milliseconds=1e3 * mine, other_milliseconds=1e3 * others,
                experts_time_share=mine / profiles[FULL][0],
                experts_bytes=timing.reads * shape.num_moe_layers * expert_bytes, read_bandwidth=bandwidth,
                damage_of=shape.model, kl=damage.kl, reads_share_there=damage.reads_share,
            )
        )  # fmt: skip
    return rows


def profile(evaluator: Evaluator, tokens: Any, tables: PolicyTables) -> dict[str, tuple[float, float]]:
    """By policy the mean seconds of a step in AdaptiveKMoe and in all other operators, of steps taken in turns."""
    sums = {name: np.zeros(2) for name in tables.names}
    # Of its own: the session tells means over all its steps in whole microseconds, and few steps make that exact.
    with evaluator.with_session(partial(OpenVinoSession, profile=True)) as session:
        assert isinstance(session, OpenVinoSession)
        session.set_policies(tables)
        evaluator.prefill(tokens[:, :PROMPT], 0)
        for turn in range(PROFILE_ROUNDS + 1):  # the first one warms up
            for name in tables.names:
                row = tables.decode_row[tables.index(name)]
                before = session.profile() if turn else {}
                for past in range(PROMPT, PROMPT + STEPS):
                    part = tokens[:, past : past + 1]
                    evaluator.step(part, np.full(part.shape, row, np.int32), np.arange(len(tokens)), past=past)
                if turn:
                    taken = {kind: total - before[kind] for kind, total in session.profile().items()}
                    experts = taken.pop("AdaptiveKMoe")
                    sums[name] += experts, sum(taken.values())
    steps = PROFILE_ROUNDS * STEPS
    return {name: (float(experts / steps), float(others / steps)) for name, (experts, others) in sums.items()}


def print_table(rows: Sequence[Row]) -> None:
    """As Markdown."""
    print(
        "| shape, weights | batch | policy | KL, of the bundled model | k | reads | of full's | ms a step | tokens/s "
        "| time, of full's | ms in experts, elsewhere | time over bytes | of bandwidth |"
    )
    print("|" + " --- |" * 13)
    for row in rows:
        bounds = f"{row.time_share_low:.2f} to {row.time_share_high:.2f}"
        print(
            f"| {row.shape}, {row.weights} | {row.batch} | {described(row)} | {row.kl:.4f}, {row.damage_of} "
            f"(reads {row.reads_share_there:.0%}) | {row.avg_k:.2f} | {row.reads:.1f} | {row.reads_share:.0%} "
            f"| {row.milliseconds:.1f} | {row.tokens_per_second:.0f} | {row.time_share:.2f} ({bounds}) "
            f"| {row.experts_milliseconds:.1f}, {row.other_milliseconds:.1f} | {row.time_over_bytes:.2f} "
            f"| {row.share_of_bandwidth:.0%} |",
            flush=True,
        )
    for _, group in itertools.groupby(rows, order):
        alike = list(group)
        if fit := fitted(alike):
            first = alike[0]
            print(
                f"{first.shape}, {first.weights}, {first.batch}: an expert read takes {fit[0]:.1f} us, one run for "
                f"a token {fit[1]:.2f} us; by these, times are within {fit[2]:.0%}"
            )


def print_summary(rows: Sequence[Row]) -> None:
    """As Markdown a line for each shape, weights and batch: time and, in brackets, reads as shares of full's."""
    names = list(dict.fromkeys(row.policy for row in rows if row.policy != FULL))
    print(f"| shape, weights | batch | {FULL}, ms a step | " + " | ".join(names) + " | time over bytes |")
    print("|" + " --- |" * (len(names) + 4))
    for _, group in itertools.groupby(rows, order):
        alike = {row.policy: row for row in group}
        full = alike[FULL]
        least = full.milliseconds / max(1.0, full.time_share)  # it was timed twice
        others = [alike.get(name) for name in names]
        cells = ["" if row is None else f"{row.milliseconds / least:.2f} ({row.reads_share:.0%})" for row in others]
        bytes_ = [row.time_over_bytes for row in others if row is not None]
        print(
            f"| {full.shape}, {full.weights} | {full.batch} | {least:.1f} | " + " | ".join(cells) + " | "
            f"{min(bytes_):.2f} to {max(bytes_):.2f} |"
        )


def fitted(rows: Sequence[Row]) -> tuple[float, float, float] | None:
    """Microseconds of an expert that a layer reads and of one run for a token; and the largest error, of a time.

    By least squares over policies at one batch, no term below 0; None of too few policies, or where reads are runs.
    """
    if len(rows) < 4 or rows[0].batch == 1:
        return None
    layers = SHAPES[rows[0].shape].num_moe_layers
    terms = np.array([(row.reads, row.avg_k * row.batch) for row in rows]) * layers
    times = np.array([1e3 * row.experts_milliseconds for row in rows])
    read, run = np.linalg.lstsq(terms / times[:, None], np.ones(len(rows)), rcond=None)[0]
    if run < 0:
        read, run = float(np.mean(times / terms[:, 0])), 0.0
    return float(read), float(run), float(np.abs(terms @ (read, run) / times - 1).max())


def described(row: Row) -> str:
    """The policy, with its number."""
    numbers = ", ".join(f"{name} {row.rule[name]:.3g}" for name in ("ratio", "p", "price") if name in row.rule)
    if row.policy == "static" and "layers" in row.rule:
        numbers = "k " + ", ".join(str(each["k"][0]) for each in row.rule["layers"].values())
    return row.policy + f" ({numbers})" * bool(numbers)


if __name__ == "__main__":
    main()
