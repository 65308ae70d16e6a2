# SPDX-License-Identifier: Apache-2.0
"""A model of what adaptive k can save on a GPU, and of where it cannot. It computes; it measures nothing.

    python benchmarks/roofline.py                        # H100, every weight format
    python benchmarks/roofline.py --gpu all --weights bf16
    python benchmarks/roofline.py --load load.json       # with the experts' measured shares of the work
    python benchmarks/roofline.py --scan                 # Mamba2 in place of the experts

Every kernel of the operator moves so many bytes and makes so many operations; its time is the longer of the
two at the device's data-sheet rates (scaled by what kernels commonly reach of them), plus the gap that a
launch leaves. What decides the saving of a smaller k:

- The expert weights are read once a step, however many tokens share them. With few tokens, a smaller k reads
  fewer experts. With more, the union of the tokens' experts soon is all of them at any k, and nothing is saved
  until the step has so many tokens that arithmetic takes longer than reading.
- Routing, planning, combining and the launches cost the same at any k.
- The router's product and a shared expert are outside the operator, but in the layer.

Not modelled: tiles of a matrix product that an expert's rows fill in part, caches (all traffic counts as
memory traffic), clocks that fall under load, and how evenly blocks fill the machine.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

MARK = "model, not a measurement"


@dataclass(frozen=True)
class Gpu:
    """Data-sheet rates of one device.

    Attributes:
        bandwidth: memory, bytes per second.
        tensor_flops: dense bfloat16 with float32 sums, operations per second.
        mma_flops: the same by mma.sync, which since Hopper is not the way to the full rate. No sheet has it.
        vector_flops: float32 outside the tensor cores, operations per second.
        source: where the figures are from.
    """

    name: str
    bandwidth: float
    tensor_flops: float
    mma_flops: float
    vector_flops: float
    source: str


# Where a sheet gives tensor rates with sparsity, half of them is entered here. mma_flops of Hopper is assumed at
# 0.62 of its peak, of the order that microbenchmarks find; that of B200 at Hopper's rate for each multiprocessor.
GPUS = {
    "h100": Gpu("H100 SXM", 3.35e12, 989e12, 613e12, 67e12, "NVIDIA H100 Tensor Core GPU data sheet"),
    "h200": Gpu("H200 SXM", 4.8e12, 989e12, 613e12, 67e12, "NVIDIA H200 Tensor Core GPU data sheet"),
    "l40s": Gpu("L40S", 864e9, 362e12, 362e12, 91.6e12, "NVIDIA L40S data sheet"),
    "rtx4090": Gpu(
        "RTX 4090", 1008e9, 165.2e12, 165.2e12, 82.6e12, "NVIDIA Ada GPU architecture white paper, appendix A"
    ),
    "b200": Gpu("B200 SXM", 8e12, 2250e12, 687e12, 75e12, "NVIDIA Blackwell data sheet (HGX B200, one of eight)"),
}


@dataclass(frozen=True)
class Model:
    """The MoE layer of a model.

    Attributes:
        intermediate: of one expert.
        top_k: that the model was trained with; also the most that a step makes room for.
        gated: whether the up-projection has a gate beside it.
        shared_intermediate: of the expert that every token runs beside the routed ones, 0 for none.
        choices: average numbers of experts to compare with top_k.
    """

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    gated: bool
    shared_intermediate: int
    choices: tuple[float, ...]

    @property
    def up_rows(self) -> int:
        """Rows of an expert's up-projection, with the gate's."""
        return 2 * self.intermediate if self.gated else self.intermediate


MODELS = {
    "mixtral-8x7b": Model("Mixtral 8x7B", 4096, 14336, 8, 2, True, 0, (1.5, 1.0)),
    "nemotron-3-nano": Model("Nemotron 3 Nano 30B-A3B", 2688, 1856, 128, 6, False, 3712, (5.0, 4.0, 3.0, 2.0, 1.0)),
}


@dataclass(frozen=True)
class MambaLayer:
    """The Mamba-2 layer of a model: heads of `head_dim`, each with a state of `state_size` rows, `n_groups` B and C."""

    name: str
    heads: int
    head_dim: int
    state_size: int
    n_groups: int
    taps: int

    @property
    def width(self) -> int:
        """Of all heads."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Of the convolution: x, B and C side by side."""
        return self.width + 2 * self.n_groups * self.state_size

    @property
    def state_bytes(self) -> int:
        """Of one sequence's scan state, in float32."""
        return 4 * self.width * self.state_size


MAMBA_LAYERS = {"nemotron-3-nano": MambaLayer("Nemotron 3 Nano 30B-A3B", 64, 64, 128, 8, 4)}


@dataclass(frozen=True)
class Weights:
    """How expert weights are stored.

    Attributes:
        bits: of one value.
        group_size: neighbours along a row that share a 16-bit scale, 0 for the whole row, -1 for no scales.
    """

    name: str
    bits: int
    group_size: int

    @property
    def quantised(self) -> bool:
        """Whether values have scales."""
        return self.group_size >= 0

    def matrix_bytes(self, rows: int, columns: int) -> float:
        """Bytes of one [rows, columns] matrix with its scales."""
        scales = 0 if not self.quantised else columns // self.group_size if self.group_size else 1
        return rows * (columns * self.bits / 8 + 2 * scales)


WEIGHTS = {"bf16": Weights("bf16", 16, -1), "int8": Weights("int8", 8, 0), "int4": Weights("int4", 4, 32)}


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says.

    Attributes:
        bandwidth_efficiency: share of the memory's rate that a kernel reaches.
        compute_efficiency: share of the arithmetic rate that a kernel reaches.
        launch_seconds: the gap between two kernels of a CUDA graph.
    """

    bandwidth_efficiency: float = 0.8
    compute_efficiency: float = 0.7
    launch_seconds: float = 2e-6


# The launcher's choice between its two paths (plugin/cuda/moe/launcher.cu).
DECODE_TOKENS = 8
MOST_DECODE_TOKENS = 128
DECODE_ROWS_PER_EXPERT = 4
PLAN_TOKENS = 128
FEW_ROWS, MANY_ROWS = 32, 128  # of a tile of plugin/cuda/moe/mixed.cu

# Instructions of a thread for each weight in decode_integers_product, for up to so many rows an expert, counted in the
# machine code for sm_90a (tests/cuda/test_cuda_library.py holds the library to them; docs/cuda.md has the table).
INTEGER_INSTRUCTIONS = {8: ((2, 4.4), (4, 5.0), (8, 9.7)), 4: ((2, 3.0), (4, 3.4), (8, 4.6))}
# The same of mixed_product for each mma.sync, which makes 4,096 operations for 32 threads.
MIXED_INSTRUCTIONS = 13.1
MMA_FLOPS = 4096

ELEMENT_BYTES = 2  # of activations

# The scan's (plugin/cuda/mamba/kernels.h, chunks.cu).
RECURRENT_TOKENS = 4
SCAN_CHUNK = 32
SCAN_COLUMNS = 32


def inclusion_probabilities(load: Sequence[float], k: float) -> list[float]:
    """How likely a token is to run each expert, for k experts a token and experts loaded unequally.

    In proportion to the load where that stays below 1; what is cut off an expert that every token runs goes
    to the others. The probabilities add up to k.

    Args:
        load: each expert's share of the work, in any unit.
        k: experts a token runs on average, from 0 to their number.

    Raises:
        ValueError: a load is negative, or there are fewer than k experts with any.
    """
    if min(load) < 0 or sum(value > 0 for value in load) < k:
        raise ValueError(f"a load of {len(load)} experts must not be negative, and at least {k} must have some")
    full: set[int] = set()
    while True:
        rest = sum(value for i, value in enumerate(load) if i not in full)
        scale = (k - len(full)) / rest if rest else 0.0
        over = {i for i, value in enumerate(load) if i not in full and value * scale > 1 + 1e-12}
        if not over:
            return [1.0 if i in full else value * scale for i, value in enumerate(load)]
        full |= over


def distinct_experts(experts: int, k: float, tokens: int, load: Sequence[float] | None = None) -> float:
    """Expected number of experts that a step touches when its tokens choose independently.

    Args:
        experts: of the layer.
        k: experts a token runs on average.
        tokens: of the step.
        load: each expert's share of the work; uniform without it.
    """
    if load is None:
        return experts * (1 - (1 - k / experts) ** tokens)
    return sum(1 - (1 - p) ** tokens for p in inclusion_probabilities(load, k))


def takes_decode_path(model: Model, tokens: int) -> bool:
    """The launcher's choice, by the tokens and the most experts that they may run."""
    few_rows = tokens * model.top_k <= DECODE_ROWS_PER_EXPERT * model.experts
    return tokens <= DECODE_TOKENS or (tokens <= MOST_DECODE_TOKENS and few_rows)


@dataclass(frozen=True)
class Kernel:
    """The work of one kernel of a step.

    Attributes:
        bytes: read and written.
        flops: operations, two for a multiplication with addition.
        instructions: of all threads, where they may take longer than the operations.
        unit: what does them: "vector", "tensor", or "mma" for tensor cores by mma.sync.
        launches: kernels that it takes.
        inside: whether it is part of the operator, rather than of the layer around it.
        product: whether it is an expert's matrix product.
    """

    name: str
    bytes: float
    flops: float = 0.0
    unit: str = "vector"
    launches: int = 1
    inside: bool = True
    product: bool = False
    instructions: float = 0.0

    def times(self, gpu: Gpu, assumed: Assumptions) -> dict[str, float]:
        """Seconds by what takes them, were it alone; the first two overlap."""
        peak = {"tensor": gpu.tensor_flops, "mma": gpu.mma_flops, "vector": gpu.vector_flops}[self.unit]
        return {
            "memory": self.bytes / (gpu.bandwidth * assumed.bandwidth_efficiency),
            # A thread's instruction takes as long as its multiplication with addition, which is two operations.
            "compute": max(self.flops / peak, self.instructions / (gpu.vector_flops / 2)) / assumed.compute_efficiency,
            "launch": self.launches * assumed.launch_seconds,
        }

    def seconds(self, gpu: Gpu, assumed: Assumptions) -> float:
        """The kernel's time with the gap that its launches leave."""
        t = self.times(gpu, assumed)
        return max(t["memory"], t["compute"]) + t["launch"]


def integer_work(weights: Weights, count: float, rows: float) -> dict[str, Any]:
    """What decode_integers_product does for `count` weights and `rows` rows an expert, eight of them in a pass."""
    passes = max(1, math.ceil(rows / 8))
    in_pass = rows / passes
    each = next(many for most, many in INTEGER_INSTRUCTIONS[weights.bits] if in_pass <= most)
    # Two rows fill the eight columns of a product.
    flops = 2.0 * 8 * math.ceil(rows / 2) * count
    return {"flops": flops, "unit": "mma", "instructions": passes * each * count}


def mixed_work(flops: float) -> dict[str, Any]:
    """What mixed_product does for so many operations."""
    return {"flops": flops, "unit": "mma", "instructions": 32 * MIXED_INSTRUCTIONS * flops / MMA_FLOPS}


def kernels(model: Model, weights: Weights, tokens: int, k: float, load: Sequence[float] | None = None) -> list[Kernel]:
    """The work of one step of the layer.

    Args:
        model: the layer's sizes.
        weights: how its experts are stored.
        tokens: of the step.
        k: experts a token runs on average.
        load: each expert's share of the work; uniform without it.
    """
    t, h, i, e = tokens, model.hidden, model.intermediate, model.experts
    x = ELEMENT_BYTES
    rows = t * k
    touched = distinct_experts(e, k, tokens, load)
    up_bytes = touched * weights.matrix_bytes(model.up_rows, h)
    down_bytes = touched * weights.matrix_bytes(h, i)
    up_flops, down_flops = 2.0 * rows * model.up_rows * h, 2.0 * rows * h * i
    found = [
        Kernel("router", e * h * x + t * h * x + 4 * t * e, 2.0 * t * h * e, unit="tensor", inside=False),
        # Logits in; k, entropy and room for top_k experts and weights out.
        Kernel("route", t * (4 * e + 4 + 8 + 8 * model.top_k)),
        Kernel("plan", t * (4 + 4 * model.top_k) + 8 * rows + 12 * e, launches=1 if t <= PLAN_TOKENS else 3),
    ]
    if takes_decode_path(model, tokens):
        up_work: dict[str, Any] = {"flops": up_flops}
        down_work: dict[str, Any] = {"flops": down_flops}
        if weights.quantised:
            up_work = integer_work(weights, touched * model.up_rows * h, rows / touched)
            down_work = integer_work(weights, touched * h * i, rows / touched)
        found += [
            Kernel("decode up", up_bytes + t * h * x + rows * i * x, product=True, **up_work),
            Kernel("decode down", down_bytes + rows * i * x + 4 * rows * h, product=True, **down_work),
            Kernel("combine", 4 * rows * h + t * h * x),
        ]
    elif weights.quantised:
        tile_rows = FEW_ROWS if t * model.top_k <= FEW_ROWS * e else MANY_ROWS
        found += [
            Kernel("tiles", 8 * e + 12 * (touched + rows / tile_rows)),
            Kernel("mixed up", up_bytes + rows * (h + i) * x, product=True, **mixed_work(up_flops)),
            Kernel("mixed down", down_bytes + rows * (i + h) * x, product=True, **mixed_work(down_flops)),
            Kernel("combine", rows * h * x + t * h * x),
        ]
    else:
        u = model.up_rows
        found += [
            Kernel("gather", t * h * x + rows * h * x),
            Kernel("gemm up", up_bytes + rows * (h + u) * x, up_flops, "tensor", 2, product=True),
            Kernel("activate", rows * (u + i) * x),
            Kernel("gemm down", down_bytes + rows * (i + h) * x, down_flops, "tensor", 2, product=True),
            Kernel("combine", rows * h * x + t * h * x),
        ]
    if model.shared_intermediate:
        s = model.shared_intermediate
        plain = WEIGHTS["bf16"]
        up = plain.matrix_bytes(2 * s if model.gated else s, h)
        flops = 2.0 * t * h * s
        gate = 2 if model.gated else 1
        found += [
            Kernel("shared up", up + t * (h + s) * x, gate * flops, unit="tensor", inside=False),
            Kernel("shared down", plain.matrix_bytes(h, s) + t * (h + s) * x, flops, unit="tensor", inside=False),
        ]
    return found


def scan_kernels(layer: MambaLayer, sequences: int, tokens: int) -> list[Kernel]:
    """The work of one step of Mamba2, every sequence having `tokens` new tokens.

    Bytes are those of the layer's own arrays; what a chunk's blocks read in common comes from the cache once. A
    sequence's chunks follow one another, and what a block waits for between them is not modelled: a long prompt
    alone takes longer than this.
    """
    t, x = sequences * tokens, ELEMENT_BYTES
    columns = -(-layer.head_dim // SCAN_COLUMNS) * layer.heads  # blocks of a sequence
    conv = 2 * sequences * (layer.taps - 1) * layer.channels * x + 4 * (layer.taps + 1) * layer.channels
    found = [Kernel("convolve", 2 * t * layer.channels * x + conv, 2.0 * t * layer.taps * layer.channels)]
    rows = t * (layer.channels + layer.heads + layer.width) * x  # mixed and dt in, y out
    states = 2 * sequences * layer.state_bytes
    update = 5.0 * t * layer.width * layer.state_size  # decay, take in, read out
    recurs = tokens <= RECURRENT_TOKENS
    # A step with more tokens than sequences launches both, of which one has nothing to do.
    work = (rows + states, update if recurs else 0.0)
    found.append(Kernel("recur", *(work if recurs else (0.0, 0.0))))
    if t > sequences and t > RECURRENT_TOKENS:
        chunks = sequences * -(-tokens // SCAN_CHUNK)
        # For each block and chunk: C B, what the state gives, the state's update, and what the chunk itself gives.
        n, p, c = layer.state_size, SCAN_COLUMNS, SCAN_CHUNK
        flops = 2.0 * chunks * columns * (c * c * n + 2 * c * n * p + c * c * p)
        found.append(Kernel("chunks", 0.0 if recurs else rows + states, 0.0 if recurs else flops, "mma"))
    return found


def scan_table(gpu: Gpu, layer: MambaLayer, steps: Sequence[tuple[int, int]], assumed: Assumptions) -> str:
    """One device: a line for each step of so many sequences with so many tokens each."""
    lines = [["sequences", "tokens each", "us", "MB", "of which states", "bound"]]
    for sequences, tokens in steps:
        work = scan_kernels(layer, sequences, tokens)
        times = [kernel.times(gpu, assumed) for kernel in work]
        bound = max(("memory", "compute", "launch"), key=lambda cause: sum(t[cause] for t in times))
        states = 2 * sequences * layer.state_bytes
        lines.append(
            [
                *(str(sequences), str(tokens)),
                f"{sum(kernel.seconds(gpu, assumed) for kernel in work) * 1e6:.1f}",
                f"{sum(kernel.bytes for kernel in work) / 1e6:.1f}",
                f"{states / sum(kernel.bytes for kernel in work):.0%}",
                bound,
            ]
        )
    widths = [max(len(line[c]) for line in lines) for c in range(len(lines[0]))]
    body = ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([f"Mamba2, one layer of {layer.name}, bf16, {gpu.name} ({MARK})", *body])


SCAN_STEPS = ((1, 1), (4, 1), (16, 1), (64, 1), (1, 64), (1, 512), (1, 4096), (8, 512))


@dataclass(frozen=True)
class Estimate:
    """One step of one layer on one device.

    Attributes:
        distinct_experts: expected number of experts that the step touches.
        operator_seconds: of AdaptiveKMoe.
        layer_seconds: with the router's product and the shared expert.
        overhead: share of the operator's time that its matrix products do not take.
        bound: what its matrix products take most of their time for: memory, compute or launch.
    """

    gpu: str
    model: str
    weights: str
    tokens: int
    k: float
    path: str
    distinct_experts: float
    bytes: float
    flops: float
    operator_seconds: float
    layer_seconds: float
    overhead: float
    bound: str
    kernel_seconds: dict[str, float]


def estimate(
    gpu: Gpu,
    model: Model,
    weights: Weights,
    tokens: int,
    k: float,
    assumed: Assumptions,
    load: Sequence[float] | None = None,
) -> Estimate:
    """What a step takes by the model."""
    work = kernels(model, weights, tokens, k, load)
    seconds = {kernel.name: kernel.seconds(gpu, assumed) for kernel in work}
    inside = [kernel for kernel in work if kernel.inside]
    products = [kernel for kernel in inside if kernel.product]
    operator = sum(seconds[kernel.name] for kernel in inside)
    by_cause = {
        cause: sum(kernel.times(gpu, assumed)[cause] for kernel in products)
        for cause in ("memory", "compute", "launch")
    }
    return Estimate(
        gpu=gpu.name,
        model=model.name,
        weights=weights.name,
        tokens=tokens,
        k=k,
        path="decode" if takes_decode_path(model, tokens) else "prefill",
        distinct_experts=distinct_experts(model.experts, k, tokens, load),
        bytes=sum(kernel.bytes for kernel in inside),
        flops=sum(kernel.flops for kernel in inside),
        operator_seconds=operator,
        layer_seconds=sum(seconds.values()),
        overhead=1 - sum(seconds[kernel.name] for kernel in products) / operator,
        bound=max(by_cause, key=lambda cause: by_cause[cause]),
        kernel_seconds=seconds,
    )


def saved(fixed: float, adaptive: float) -> float:
    """Share of the fixed top-k's time that a smaller k saves."""
    return 1 - adaptive / fixed


def table(gpu: Gpu, model: Model, weights: Weights, rows: Sequence[dict[str, Any]]) -> str:
    """One device, model and weight format: a line for each number of tokens."""
    ks = [s["k"] for s in rows[0]["smaller"]]
    head = ["tokens", "path", "bound", f"experts k={model.top_k}", f"us k={model.top_k}", "overhead"]
    head += [f"k={k:g}: experts, saved" for k in ks]
    lines = [head]
    for row in rows:
        fixed = row["fixed"]
        line = [str(fixed["tokens"]), fixed["path"], fixed["bound"], f"{fixed['distinct_experts']:.1f}"]
        line += [f"{fixed['operator_seconds'] * 1e6:.1f}", f"{fixed['overhead']:.0%}"]
        line += [
            f"{s['distinct_experts']:.1f}, {s['operator_saved']:.0%} ({s['layer_saved']:.0%})" for s in row["smaller"]
        ]
        lines.append(line)
    widths = [max(len(line[c]) for line in lines) for c in range(len(head))]
    ideal = ", ".join(f"k={k:g} {1 - k / model.top_k:.0%}" for k in ks)
    title = (
        f"{model.name}, {weights.name} weights, {gpu.name} ({MARK})\n"
        f"saved: share of the operator's time (of the whole MoE layer's); by count it would be {ideal}"
    )
    body = ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines]
    slower = [row["fixed"]["tokens"] for row in rows if row["fixed"]["operator_seconds"] > row["bf16_operator_seconds"]]
    if slower:
        body.append(
            f"From {slower[0]} tokens on, {weights.name} takes longer than bf16 would: its products use mma.sync. "
            "A share saved of that is no gain over bf16."
        )
    return "\n".join([title, *body])


def compare(
    gpu: Gpu,
    model: Model,
    weights: Weights,
    tokens: Sequence[int],
    ks: Sequence[float],
    assumed: Assumptions,
    load: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """For each number of tokens: the fixed top-k's estimate and those of smaller k with what they save."""
    rows = []
    for t in tokens:
        fixed = estimate(gpu, model, weights, t, model.top_k, assumed, load)
        smaller = []
        for k in ks:
            other = estimate(gpu, model, weights, t, k, assumed, load)
            smaller.append(
                {
                    **asdict(other),
                    "operator_saved": saved(fixed.operator_seconds, other.operator_seconds),
                    "layer_saved": saved(fixed.layer_seconds, other.layer_seconds),
                    "count_saved": 1 - k / model.top_k,
                }
            )
        plain = estimate(gpu, model, WEIGHTS["bf16"], t, model.top_k, assumed, load)
        rows.append({"fixed": asdict(fixed), "smaller": smaller, "bf16_operator_seconds": plain.operator_seconds})
    return rows


def read_load(path: Path) -> list[float]:
    """A JSON list with one number an expert."""
    load = json.loads(path.read_text())
    if not isinstance(load, list) or not all(isinstance(value, int | float) for value in load):
        raise SystemExit(f"{path} must hold a JSON list with one number an expert")
    return [float(value) for value in load]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    assumed = Assumptions()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", nargs="+", choices=[*GPUS, "all"], default=["h100"])
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--weights", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096])
    parser.add_argument("--k", nargs="+", type=float, help="average numbers of experts to compare with the trained one")
    parser.add_argument("--scan", action="store_true", help="what Mamba2 takes, for models that have it")
    parser.add_argument("--load", type=Path, help="JSON list: each expert's measured share of the work")
    parser.add_argument("--bandwidth_efficiency", type=float, default=assumed.bandwidth_efficiency)
    parser.add_argument("--compute_efficiency", type=float, default=assumed.compute_efficiency)
    parser.add_argument("--launch_us", type=float, default=assumed.launch_seconds * 1e6)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/roofline.json"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    assumed = replace(
        Assumptions(),
        bandwidth_efficiency=args.bandwidth_efficiency,
        compute_efficiency=args.compute_efficiency,
        launch_seconds=args.launch_us * 1e-6,
    )
    load = read_load(args.load) if args.load else None
    gpus = list(GPUS) if "all" in args.gpu else args.gpu
    results = []
    if args.scan:
        for name in args.model:
            for gpu in (GPUS[name] for name in gpus) if name in MAMBA_LAYERS else ():
                print(scan_table(gpu, MAMBA_LAYERS[name], SCAN_STEPS, assumed), end="\n\n")
        return
    for model in (MODELS[name] for name in args.model):
        if load is not None and len(load) != model.experts:
            print(f"{model.name} left out: it has {model.experts} experts and {args.load} has {len(load)}")
            continue
        for weights in (WEIGHTS[name] for name in args.weights):
            for gpu in (GPUS[name] for name in gpus):
                rows = compare(gpu, model, weights, args.tokens, args.k or model.choices, assumed, load)
                results += rows
                print(table(gpu, model, weights, rows), end="\n\n")
    print(
        f"Assumed: {assumed.bandwidth_efficiency:.0%} of the memory's rate, {assumed.compute_efficiency:.0%} of the "
        f"arithmetic's, {assumed.launch_seconds * 1e6:g} us a launch, "
        + ("experts loaded as measured." if load else "tokens that choose experts evenly and independently.")
    )
    for name in gpus:
        print(f"{GPUS[name].name}: {GPUS[name].source}")
    content = {
        "kind": MARK,
        "assumptions": asdict(assumed),
        "load": load,
        "gpus": {name: asdict(GPUS[name]) for name in gpus},
        "results": results,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content, indent=2) + "\n")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
