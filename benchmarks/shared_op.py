# SPDX-License-Identifier: Apache-2.0
"""Time of the operator in decode against the experts that a step reads, at layer shapes of published models.

    python benchmarks/shared_op.py [--layers olmoe,mixtral] [--dtypes bfloat16,int8,int4] [--batch_sizes 1,4,16,64]

Weights are random in the published layer's shape. Routing is real: the router logits of the bundled trained model with
as many experts, which read its held-out text; a decode step is one position of as many windows as the batch has. So
skew and correlation are a trained model's, and the time is that of a layer as large as the published one. What a policy
costs in quality says `adaptive-k eval` on the bundled model; it is no figure of the published one.

Policies: the trained top-k; `ratio` rules that leave experts out token by token; prices of `shared`. All are timed in
turns with a read of memory. Prints a table and writes benchmarks/results/shared_op.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from moe_op import Layer, random_weights

from adaptive_k_moe.plugin import instruction_set, moe, route
from adaptive_k_moe.policy_kinds import KINDS

from _results import write_results
from _roofline import BITS, ReadProbe
from _roofline import seconds as one_run

ROOT = Path(__file__).resolve().parents[1]
Array = npt.NDArray[Any]
Rows = tuple[Array, Array, Array]

# A published layer's shape, and the bundled model with as many experts whose routing it is given.
LAYERS = {
    "olmoe": (Layer("olmoe", 64, 2048, 1024, "swiglu", 8), "olmoe-small", {"norm_topk_prob": False}),
    "mixtral": (Layer("mixtral", 8, 4096, 14336, "swiglu", 2), "mixtral-small", {}),
}
RATIOS = (0.1, 0.2, 0.4)
PRICES = (0.01, 0.03, 0.1)
WINDOW, FIRST = 192, 64  # steps are positions from FIRST on


@dataclass
class Row:
    """One policy at one batch size."""

    layer: str
    dtype: str
    batch: int
    policy: str
    avg_k: float
    reads: float
    milliseconds: float
    milliseconds_of_full: float
    time_share: float
    reads_share: float
    gigabytes_per_second: float
    share_of_bandwidth: float


def step_logits(model: str, batch: int, steps: int) -> list[Array]:
    """[batch, E] router logits of `steps` decode steps, over the trained model's layers in turn."""
    import torch
    import transformers

    directory = ROOT / "examples" / "models" / model
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    trained = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = tokenizer(directory.joinpath("heldout.txt").read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    starts = np.linspace(0, len(tokens) - WINDOW, batch).astype(int)
    windows = torch.stack([tokens[start : start + WINDOW] for start in starts])
    with torch.no_grad():
        by_layer = trained(windows, output_router_logits=True).router_logits  # each [batch * WINDOW, E]
    logits = [one.reshape(batch, WINDOW, -1).numpy() for one in by_layer]
    positions = np.linspace(FIRST, WINDOW - 1, steps).astype(int)
    return [np.ascontiguousarray(logits[i % len(logits)][:, at]) for i, at in enumerate(positions)]


def policies(top_k: int) -> dict[str, Rows]:
    """Rows of one policy each."""

    def rows(kind: int, parameter: float, k_min: int, k_max: int) -> Rows:
        return np.array([kind], np.int32), np.array([[parameter]], np.float32), np.array([[k_min, k_max]], np.int32)

    found = {"full": rows(KINDS["fixed"].number, np.inf, top_k, top_k)}
    found |= {f"ratio {ratio:g}": rows(KINDS["ratio"].number, ratio, 1, top_k) for ratio in RATIOS}
    return found | {f"price {price:g}": rows(KINDS["shared"].number, price, 1, top_k) for price in PRICES}


def measure(name: str, dtype: str, batch: int, steps: int, repeats: int, threads: int) -> list[Row]:
    """Every policy on the same steps, in turns."""
    layer, model, routing = LAYERS[name]
    weights = random_weights(layer, dtype)
    logits = step_logits(model, batch, steps)
    hidden = np.random.default_rng(1).standard_normal((batch, layer.hidden)).astype(np.float32)
    index = np.zeros(batch, np.int32)
    tables = policies(layer.top_k)
    seconds: dict[str, list[float]] = {policy: [] for policy in tables}
    probe = ReadProbe(threads)
    bandwidths = []
    for _ in range(repeats):
        bandwidths.append(probe.num_bytes / one_run(probe.run) / 1e9)
        for step in logits:
            for policy, table in tables.items():
                started = time.perf_counter()
                moe(hidden, step, index, *table, weights.up, weights.down, activation=layer.activation,
                    num_threads=threads, **weights.arguments, **routing)  # fmt: skip
                seconds[policy].append(time.perf_counter() - started)
    expert_bytes = layer.matrices * layer.hidden * layer.intermediate * BITS[dtype] / 8
    found: list[Row] = []
    full: Row | None = None
    for policy, table in tables.items():
        routed = [route(step, index, *table, **routing) for step in logits]
        reads = statistics.mean(len(set(one.experts[one.experts >= 0].tolist())) for one in routed)
        taken = statistics.median(seconds[policy])
        rate = reads * expert_bytes / taken / 1e9
        row = Row(
            name, dtype, batch, policy, float(np.mean([one.k.mean() for one in routed])), reads, 1e3 * taken,
            1e3 * taken, 1.0, 1.0, rate, rate / statistics.median(bandwidths),
        )  # fmt: skip
        full = full or row
        row.milliseconds_of_full, row.time_share = full.milliseconds, row.milliseconds / full.milliseconds
        row.reads_share = row.reads / full.reads
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="olmoe,mixtral")
    parser.add_argument("--dtypes", default="bfloat16,int8,int4")
    parser.add_argument("--batch_sizes", default="1,4,16,64")
    parser.add_argument("--steps", type=int, default=12, help="decode steps of a case")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "shared_op.json")
    args = parser.parse_args()
    rows: list[Row] = []
    print("| layer | weights | batch | policy | k | reads | ms | time, of full's | reads, of full's | of bandwidth |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in args.layers.split(","):
        for dtype in args.dtypes.split(","):
            for batch in map(int, args.batch_sizes.split(",")):
                for row in measure(name, dtype, batch, args.steps, args.repeats, args.threads):
                    rows.append(row)
                    print(
                        f"| {row.layer} | {row.dtype} | {row.batch} | {row.policy} | {row.avg_k:.2f} | {row.reads:.1f} "
                        f"| {row.milliseconds:.2f} | {row.time_share:.2f} | {row.reads_share:.2f} "
                        f"| {row.share_of_bandwidth:.0%} |",
                        flush=True,
                    )
    content = {"instruction_set": instruction_set(), "threads": args.threads, "rows": [asdict(row) for row in rows]}
    write_results(args.output, content)


if __name__ == "__main__":
    main()
