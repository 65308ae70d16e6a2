# SPDX-License-Identifier: Apache-2.0
"""Makes docs/results/decode.md: policies that read fewer experts in decode, for the bundled models, against opponents.

    python examples/results_decode.py --timing_rounds 12

The policies go into examples/policies. A run that was stopped goes on where it was; `--timing_rounds 0` takes no times,
for a machine that does other things, and the tables then have no column for them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from pathlib import Path
from typing import Any

from results import ROOT, cpu_name, run

from results_page import command_block, markdown_table, number, percent

PAGE = ROOT / "docs" / "results" / "decode.md"
TARGETS = {
    "mixtral-small": {1: 0.75, 4: 0.75, 16: 0.88, 64: 0.95},
    "nemotron-small": {1: 0.75, 4: 0.75, 16: 0.75, 64: 0.85},
    "olmoe-small": {1: 0.75, 4: 0.75, 16: 0.65, 64: 0.85},
}
"""Share of the full model's reads by model and batch size."""

SHORT = 128
"""Tokens of a window in steps of 64 sequences: each part of the held-out text has to fill 64 windows."""


def commands(model: str, arguments: argparse.Namespace) -> dict[int, str]:
    """The steps by batch size."""
    checkpoint, work = f"examples/models/{model}", f"build/results/{model}"
    return {
        batch: f"calibrate --checkpoint_dir {checkpoint} --text {checkpoint}/heldout.txt --batch_size {batch} "
        f"--target_reads {target} --policy_name decode_{batch} --output examples/policies/{model}.json "
        f"--work_dir {work}/decode_{batch} --report {work}/decode_{batch}/report --max_steps {arguments.max_steps} "
        f"--layer_rounds {arguments.layer_rounds} --timing_rounds {arguments.timing_rounds}"
        + (f" --window {SHORT}" if batch == 64 else "")
        + (f" --num_threads {arguments.num_threads}" if arguments.num_threads else "")
        for batch, target in TARGETS[model].items()
        if batch in arguments.batch_size
    }


def rows_of(model: str, result: dict[str, Any], timed: bool) -> list[list[str]]:
    """One calibration's policies on the reported part."""
    rows = []
    for each in result["reported"]:
        row = [model, str(each["batch"]), f"`{each['policy']}`", f"{each['avg_k']:.3f}", f"{each['reads']:.2f}"]
        row += [f"{100 * each['reads_share']:.1f} %", number(each["kl_to_full_nats"], 5)]
        row += [f"{each['perplexity']:.3f}", percent(each["perplexity_change"])]
        if timed:
            row.append("" if each["timing"] is None else number(each["timing"]["ratio"], 3))
        rows.append(row)
    return rows


def main() -> None:
    """Calibrate, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--batch_size", nargs="+", type=int, default=[1, 4, 16, 64], choices=[1, 4, 16, 64])
    parser.add_argument("--max_steps", type=int, default=1024, help="decode steps of a pass over the fitted part")
    parser.add_argument("--layer_rounds", type=int, default=4, help="rounds of prices by layer")
    parser.add_argument("--timing_rounds", type=int, default=12, help="0 takes no times (default: 12)")
    parser.add_argument("--num_threads", type=int, help="CPU threads (default: all)")
    arguments = parser.parse_args()
    steps = {model: commands(model, arguments) for model in arguments.model}
    results = []
    with contextlib.chdir(ROOT):
        for model, by_batch in steps.items():
            for batch, step in by_batch.items():
                run(step)
                report = Path(f"build/results/{model}/decode_{batch}/report/decode.json")
                results.append((model, json.loads(report.read_text(encoding="utf-8"))))
    timed = any(each["timing"] is not None for _, result in results for each in result["reported"])
    header = ["model", "batch", "policy", "average k", "reads", "of full's", "KL to full, nats", "perplexity", "change"]
    rows = [row for model, result in results for row in rows_of(model, result, timed)]
    first = next(iter(next(iter(steps.values())).values()))
    parts = [
        "# Decode that reads fewer experts",
        f"Made by `python examples/results_decode.py` on {cpu_name()}, {len(os.sched_getaffinity(0))} cores, with, for "
        "the first rows,",
        command_block(first),
        "On the part of the text that was not fitted on; how it is measured is in [calibration.md](../calibration.md). "
        "Reads are the experts of a layer that one decode step reads. Opponents are at equal reads, those whose names "
        "end in `_time` at equal time. Intervals are 95 %." + ("" if timed else " No times were taken."),
        markdown_table([*header, "time against `full`"] if timed else header, rows),
    ]
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"page: {PAGE}")


if __name__ == "__main__":
    main()
