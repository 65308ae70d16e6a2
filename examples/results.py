# SPDX-License-Identifier: Apache-2.0
"""Makes everything that docs/results says of a bundled model: its policy file, figures, and tables.

    python examples/results.py --model mixtral-small

Each step is a command that can be run alone; the file of tables names them. Times mean something only on a machine
that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

from adaptive_k_moe.cli import main as adaptive_k

from results_page import SETS, page

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from _results import cpu_name  # noqa: E402

FIGURES = ("quality_by_k.png", "quality_by_time.png", "damage.png")


def commands(model: str, timing_rounds: int) -> dict[str, str]:
    """The steps by what they are for, in order, relative to the repository's root."""
    checkpoint, work = f"examples/models/{model}", f"build/results/{model}"
    policies = f"examples/policies/{model}.json"
    facts = json.loads((ROOT / checkpoint / "training.json").read_text(encoding="utf-8"))
    top_k, layers = facts["model"]["top_k"], len(facts["routers"])

    def average(share: float) -> str:
        """About this share of the trained top-k, an average that a fixed k by layer can have as well."""
        return f"{math.ceil(round(share * top_k * layers, 6)) / layers:.4f}"

    calibrate = (
        f"calibrate --checkpoint_dir {checkpoint} --text {checkpoint}/heldout.txt --work_dir {work}/calibration "
        f"--k_values {' '.join(map(str, range(1, top_k + 1)))}"
    )
    three_quarters = f"{calibrate} --target_avg_k {average(3 / 4)}"
    evaluate = f"eval --engine_dir {work}/engine"
    return {
        "balanced": f"{three_quarters} --policy_name balanced --default --output {policies} --report {work}/report",
        "balanced_entropy": f"{three_quarters} --policy_kind entropy entropy_per_layer --policy_name balanced_entropy "
        f"--no_opponent --output {policies}",
        "fast": f"{calibrate} --target_avg_k {average(7 / 12)} --policy_name fast --no_opponent --refine_passes 0 "
        f"--output {policies}",
        "one_per_cent": f"{calibrate} --max_perplexity_increase 1 --policy_name one_per_cent --refine_passes 0 "
        f"--output {work}/one_per_cent.json",
        "build": f"build --checkpoint_dir {checkpoint} --policy {policies} --max_seq_len 512 "
        f"--output_dir {work}/engine --force",
        "eval": f"{evaluate} --text {checkpoint}/heldout.txt --rounds {timing_rounds} --output {work}/eval.json",
        **{
            name: f"{evaluate} --text calibration/texts/{name}.txt --window 64 --rounds 0 --output {work}/{name}.json"
            for name in SETS
        },
        "validate": f"validate --checkpoint_dir {checkpoint} --output {work}/validation.json",
    }


def run(command: str) -> str:
    """What a command printed, with how long it took.

    Raises:
        SystemExit: it failed.
    """
    printed, start = io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(printed):
        status = adaptive_k(command.split())
    text = f"$ adaptive-k {command}\n{printed.getvalue()}({time.monotonic() - start:.0f} s)\n"
    print(text, flush=True)
    if status:
        sys.exit(status)
    return text


def main() -> None:
    """Run all steps of one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of examples/models")
    parser.add_argument("--timing_rounds", type=int, default=12, help="of the evaluation (default: 12)")
    parser.add_argument("--page_only", action="store_true", help="write the page of figures that are there already")
    arguments = parser.parse_args()
    if not (ROOT / "examples" / "models" / arguments.model / "heldout.txt").is_file():
        parser.error(f"there is no bundled model {arguments.model} with a held-out text")
    work = ROOT / "build" / "results" / arguments.model
    work.mkdir(parents=True, exist_ok=True)
    steps = commands(arguments.model, arguments.timing_rounds)
    if not arguments.page_only:
        with contextlib.chdir(ROOT):
            tables = [run(command) for command in steps.values()]
        (work / "tables.txt").write_text("\n".join(tables), encoding="utf-8")
    figures = ROOT / "docs" / "results" / arguments.model
    figures.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        shutil.copyfile(work / "report" / name, figures / name)
    processor = f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores"
    (figures / "README.md").write_text(page(work, arguments.model, steps, processor), encoding="utf-8")
    print(f"tables: {work / 'tables.txt'}\npage and figures: {figures}")


if __name__ == "__main__":
    main()
