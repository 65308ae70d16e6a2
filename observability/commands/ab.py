# SPDX-License-Identifier: Apache-2.0
"""``adaptive-k ab``: start an A/B test, see what it has shown, stop it."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptive_k_moe.observability.ab_test.results import Comparison, Results, VariantResults


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    start = actions.add_parser("start", help="start a test; servers with this --ab_db take it up within seconds")
    status = actions.add_parser("status", help="show what a test has shown so far")
    stop = actions.add_parser("stop", help="end a test: requests follow the default policy again")
    for action in (start, status, stop):
        action.add_argument("--db", type=Path, required=True, metavar="FILE", help="the database of A/B tests")
    for action, what in (
        (status, "the test (default: the one started last)"),
        (stop, "the test (default: the running one)"),
    ):
        action.add_argument("--experiment", metavar="NAME", help=what)
    start.add_argument(
        "--experiment", required=True, metavar="NAME", help="a new name; it decides who gets which variant"
    )
    start.add_argument(
        "--variant",
        action="append",
        required=True,
        metavar="NAME=POLICY[:WEIGHT]",
        help="one arm; give two or more: the control is the one named control, or the first",
    )
    start.add_argument(
        "--guardrail",
        action="append",
        metavar="METRIC:MARGIN",
        help="stop a variant whose harm is sure to be above the margin; none: nothing stops one "
        "(default: quality:0.05 and error_rate:0.05)",
    )
    start.add_argument(
        "--score_share",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of the answers whose quality is measured in idle time (default: %(default)s)",
    )
    start.add_argument(
        "--alpha", type=float, default=0.05, help="probability that an interval ever misses (default: %(default)s)"
    )
    start.add_argument("--max_rows", type=int, metavar="N", help="requests that are kept one by one (default: 200000)")
    status.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Do what the action says."""
    from adaptive_k_moe.observability.ab_test.store import Store

    if args.action == "start":
        return _start(args)
    with Store(args.db, create=False) as store:
        if args.action == "stop":
            print(f"the experiment {store.stop(args.experiment).name!r} is stopped.")
            return 0
        stored = store.read(args.experiment)
    from adaptive_k_moe.observability.ab_test.results import compute

    results = compute(stored)
    print(json.dumps(results.to_dict(), indent=2) if args.json else table(results))
    return 0


def _start(args: argparse.Namespace) -> int:
    from adaptive_k_moe.observability.ab_test.experiment import (
        DEFAULT_GUARDRAILS,
        MAX_ROWS,
        Experiment,
        Guardrail,
        Variant,
    )
    from adaptive_k_moe.observability.ab_test.store import Store

    guardrails = [] if args.guardrail == ["none"] else args.guardrail or DEFAULT_GUARDRAILS
    experiment = Experiment(
        args.experiment,
        tuple(Variant.parse(text) for text in args.variant),
        tuple(Guardrail.parse(text) for text in guardrails),
        alpha=args.alpha,
        score_share=args.score_share,
        max_rows=MAX_ROWS if args.max_rows is None else args.max_rows,
    )
    with Store(args.db) as store:
        started = store.start(experiment)
    print(f"the experiment {started.name!r} is running: servers with --ab_db {args.db} take it up within seconds.")
    return 0


def table(results: Results) -> str:
    """Results as text."""
    from adaptive_k_moe.observability.ab_test.results import SUSPICIOUS

    experiment = results.experiment
    state = "running" if experiment.stopped_at is None else f"stopped {_when(experiment.stopped_at)}"
    guardrails = ", ".join(map(str, experiment.guardrails)) or "none"
    lines = [
        f"experiment {experiment.name}: started {_when(experiment.started_at)}, {state}; guardrails {guardrails}",
        f"intervals hold at all looks together with probability {1 - experiment.alpha:.0%}",
        "",
        f"{'variant':<16}  {'policy':<16}  {'weight':>6}  {'requests':>8}",
    ]
    for result in results.variants:
        variant = result.variant
        note = "  (control)" if not result.comparisons else ""
        # A policy may have any name; control characters would act on the terminal.
        policy = "".join(one if one.isprintable() else repr(one)[1:-1] for one in variant.policy)
        lines.append(f"{variant.name:<16}  {policy:<16}  {variant.weight:>6g}  {result.num_requests:>8}{note}")
    if results.share_mismatch < SUSPICIOUS:
        lines.append(
            f"the shares of requests are not what the weights say (p = {results.share_mismatch:.1g}): "
            "look for ids that repeat, or requests that are not recorded."
        )
    for result in results.treatments:
        lines += ["", *_variant_lines(result, results.variants[0].variant.name)]
    return "\n".join(lines)


def _variant_lines(result: VariantResults, control: str) -> list[str]:
    lines = [f"{result.variant.name} against {control}"]
    if result.variant.stop_reason and result.variant.stopped_at:
        lines.append(f"  stopped {_when(result.variant.stopped_at)}: {result.variant.stop_reason}")
    lines.append(f"  {'':<16}  {'measured on':>13}  {control[:10]:>10}  {result.variant.name[:10]:>10}  difference")
    for name, comparison in result.comparisons.items():
        counts = f"{comparison.control_count}+{comparison.count}"
        values = (_value(comparison, one) for one in (comparison.control_value, comparison.value))
        lines.append(
            f"  {name:<16}  {counts:>13}  {'  '.join(f'{one:>10}' for one in values)}  {_difference(comparison)}"
        )
    if result.comparisons["time_per_token"].known:
        lines.append("  time saved a token: {:+.1%} ({:+.1%} to {:+.1%})".format(*result.time_saved))
    lines.append(f"  {result}")
    return lines


def _value(comparison: Comparison, value: float) -> str:
    if not comparison.count or not comparison.control_count:
        return "-"
    if comparison.metric.percent:
        return f"{value:.2%}"
    return f"{1000 * value:.4g} ms" if comparison.metric.kind == "ratio" else f"{value:.4g}"


def _difference(comparison: Comparison) -> str:
    if not comparison.count or not comparison.control_count:
        return "not measured yet"
    form = "{:+.2%}" if comparison.metric.percent or comparison.metric.kind == "ratio" else "{:+.4g}"
    text = form.format(comparison.estimate)
    if not comparison.known:
        return f"{text} (too few requests yet)"
    return f"{text} ({form.format(comparison.low)} to {form.format(comparison.high)})"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
