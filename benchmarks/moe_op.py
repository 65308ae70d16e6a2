# SPDX-License-Identifier: Apache-2.0
"""Time of the AdaptiveKMoe operator at the layer shapes of Mixtral 8x7B and Nemotron 3 Nano.

    python benchmarks/moe_op.py [--quick] [--layers mixtral,nemotron] [--dtypes float32,bfloat16,int8,int4]
                                [--tokens 1,4,16,128,512] [--k 1,2,4,6] [--threads N] [--no-peer]

Every case is timed in turns with a read of memory, a matrix product in the type that is computed in (float32, or
bfloat16 for bfloat16 weights on AMX) and, where torch and transformers are installed, transformers' experts (the best
of its implementations), so that all see the same machine. Weights are random, those of int8 with a scale a row and
those of int4 with one for 64 values, and have no peer; a layer takes up to 5.6 GB. Prints a table and writes
benchmarks/results/moe_op.json.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.plugin import instruction_set, moe, route

from _results import cpu_name, write_results
from _roofline import BITS, GemmProbe, ReadProbe

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Layer:
    """The shape of one MoE layer."""

    name: str
    experts: int
    hidden: int
    intermediate: int
    activation: str
    top_k: int

    @property
    def matrices(self) -> int:
        """[hidden, intermediate] matrices of an expert."""
        return 3 if self.activation == "swiglu" else 2


LAYERS = {
    "mixtral": Layer("mixtral", 8, 4096, 14336, "swiglu", 2),
    "nemotron": Layer("nemotron", 128, 2688, 1856, "relu2", 6),
    "small": Layer("small", 8, 192, 384, "swiglu", 2),
}


@dataclass
class Result:
    """One case; times in milliseconds, shares of what was measured in turns with it."""

    layer: str
    dtype: str
    tokens: int
    k: int
    experts_used: int
    milliseconds: float
    gigabytes_per_second: float
    share_of_bandwidth: float
    gflops: float
    share_of_gemm: float
    peer: str | None = None
    peer_milliseconds: float | None = None
    times_faster_than_peer: float | None = None
    relative_to_twice_k: float | None = None


INT4_GROUP = 64


@dataclass(frozen=True)
class Weights:
    """A layer's weights in one format, and the operator's other arguments about them."""

    up: Array
    down: Array
    arguments: dict[str, Any]


def random_weights(layer: Layer, dtype: str) -> Weights:
    rows = layer.intermediate * (layer.matrices - 1)
    shapes = (layer.experts, rows, layer.hidden), (layer.experts, layer.hidden, layer.intermediate)
    up, down = (random_array(shape, dtype) for shape in shapes)
    if not dtype.startswith("int"):
        return Weights(up, down, {})
    scales = [
        np.full((*shape[:2], shape[2] // INT4_GROUP if dtype == "int4" else 1), 1e-3, np.float32) for shape in shapes
    ]
    return Weights(up, down, {"gate_up_scales": scales[0], "down_scales": scales[1], "weight_bits": BITS[dtype]})


def random_array(shape: tuple[int, ...], dtype: str) -> Array:
    """Weights that repeat one block of random numbers; making 5 GB of fresh ones takes minutes."""
    if dtype == "int4":
        shape = (*shape[:-1], shape[-1] // 2)
    count = int(np.prod(shape))
    rng = np.random.default_rng(0)
    block: Array = rng.standard_normal(1 << 22, dtype=np.float32) / np.float32(50)
    if dtype == "bfloat16":
        block = (block.view(np.uint32) >> 16).astype(np.uint16)
    elif dtype != "float32":
        block = rng.integers(-127, 128, 1 << 22, dtype=np.int8)
    storage = np.empty(count + 64, block.dtype)
    start = (-storage.ctypes.data % 64) // block.itemsize
    weights = storage[start : start + count]
    for begin in range(0, count, len(block)):
        weights[begin : begin + len(block)] = block[: count - begin]
    return weights.reshape(shape)


def peers(layer: Layer, dtype: str, up: Array, down: Array, threads: int) -> dict[str, Callable[..., object]]:
    """Transformers' implementations of this layer's experts over the same memory, by name."""
    import torch
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHExperts

    torch.set_num_threads(threads)

    def tensor(array: Array) -> torch.Tensor:
        shared = torch.from_numpy(array)
        return shared.view(torch.bfloat16) if dtype == "bfloat16" else shared

    calls: dict[str, Callable[..., object]] = {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        with torch.device("meta"):
            if layer.activation == "swiglu":
                experts = MixtralExperts(
                    MixtralConfig(
                        hidden_size=layer.hidden,
                        intermediate_size=layer.intermediate,
                        num_local_experts=layer.experts,
                        experts_implementation=implementation,
                    )
                )
            else:
                experts = NemotronHExperts(
                    NemotronHConfig(
                        hidden_size=layer.hidden,
                        moe_intermediate_size=layer.intermediate,
                        n_routed_experts=layer.experts,
                        experts_implementation=implementation,
                    )
                )
        experts.config._experts_implementation = implementation
        name = "gate_up_proj" if layer.activation == "swiglu" else "up_proj"
        setattr(experts, name, torch.nn.Parameter(tensor(up), requires_grad=False))
        experts.down_proj = torch.nn.Parameter(tensor(down), requires_grad=False)

        def call(
            x: Array,
            chosen: Array,
            weights: Array,
            experts: torch.nn.Module = experts,
        ) -> object:
            kind = experts.down_proj.dtype
            with torch.no_grad():
                return experts(
                    torch.from_numpy(x).to(kind),
                    torch.from_numpy(chosen).long(),
                    torch.from_numpy(weights).to(kind),
                )

        calls[implementation] = call
    return calls


@dataclass(frozen=True)
class Clock:
    """Wall time, or the processor time of all threads over their number, which others' work disturbs less."""

    name: str
    threads: int

    def time(self, call: Callable[[], object]) -> float:
        """Seconds that a call takes by this clock."""
        now, share = (time.perf_counter, 1) if self.name == "wall" else (time.process_time, self.threads)
        start = now()
        call()
        return (now() - start) / share


def run_case(
    layer: Layer,
    dtype: str,
    tokens: int,
    k: int,
    stored: Weights,
    clock: Clock,
    probes: tuple[ReadProbe, GemmProbe],
    peer_calls: dict[str, Callable[..., object]],
    repeats: int,
) -> Result:
    rng = np.random.default_rng(tokens * 100 + k)
    x = rng.standard_normal((tokens, layer.hidden), dtype=np.float32)
    logits = rng.standard_normal((tokens, layer.experts), dtype=np.float32)
    policy = (
        np.zeros(tokens, np.int32),
        np.zeros(1, np.int32),
        np.zeros((1, 0), np.float32),
        np.array([[k]], np.int32),
    )
    max_k = max(k, layer.top_k)  # the room that an engine with these policies has
    routing = route(logits, *policy, max_k=max_k)
    chosen, weights = routing.experts[:, :k].copy(), routing.weights[:, :k].copy()
    used = len(np.unique(chosen))

    def ours() -> object:
        return moe(
            x,
            logits,
            *policy,
            stored.up,
            stored.down,
            activation=layer.activation,
            max_k=max_k,
            num_threads=clock.threads,
            **stored.arguments,
        )

    # The fastest of the peer's implementations at one try is the one that is timed.
    tried: dict[str, float] = {}
    for name, call in peer_calls.items():
        copied = 4 * tokens * k * layer.matrices * layer.hidden * layer.intermediate
        if name == "batched_mm" and copied > 4e9:
            continue  # gathers a copy of the weights for each token and expert: beyond memory
        call(x, chosen, weights)
        tried[name] = clock.time(functools.partial(call, x, chosen, weights))
    peer = min(tried, key=lambda name: tried[name]) if tried else None

    ours()
    read, gemm = probes
    times: dict[str, list[float]] = {"ours": [], "read": [], "gemm": [], "peer": []}
    for _ in range(repeats):
        times["ours"].append(clock.time(ours))
        times["read"].append(clock.time(read.run))
        times["gemm"].append(clock.time(gemm.run))
        if peer:
            times["peer"].append(clock.time(functools.partial(peer_calls[peer], x, chosen, weights)))
    seconds = {name: statistics.median(values) for name, values in times.items() if values}

    matrix = layer.hidden * layer.intermediate
    rate = used * layer.matrices * matrix * BITS[dtype] / 8 / seconds["ours"]
    flops = 2 * tokens * k * layer.matrices * matrix / seconds["ours"]
    return Result(
        layer=layer.name,
        dtype=dtype,
        tokens=tokens,
        k=k,
        experts_used=used,
        milliseconds=seconds["ours"] * 1e3,
        gigabytes_per_second=rate / 1e9,
        share_of_bandwidth=rate / (read.num_bytes / seconds["read"]),
        gflops=flops / 1e9,
        share_of_gemm=flops / (gemm.operations / seconds["gemm"]),
        peer=peer,
        peer_milliseconds=seconds["peer"] * 1e3 if peer else None,
        times_faster_than_peer=seconds["peer"] / seconds["ours"] if peer else None,
    )


HEADER = (
    f"{'layer':9} {'weights':8} {'tokens':>6} {'k':>2} {'used':>4} {'ms':>9} {'GB/s':>6} {'of read':>7} "
    f"{'GFLOPS':>7} {'of gemm':>7} {'to 2k':>6} {'peer':>10} {'peer ms':>9} {'faster':>6}"
)


def line(r: Result) -> str:
    halved = f"{r.relative_to_twice_k:6.2f}" if r.relative_to_twice_k else f"{'':6}"
    text = (
        f"{r.layer:9} {r.dtype:8} {r.tokens:6} {r.k:2} {r.experts_used:4} {r.milliseconds:9.2f} "
        f"{r.gigabytes_per_second:6.1f} {r.share_of_bandwidth:7.2f} {r.gflops:7.0f} {r.share_of_gemm:7.2f} {halved}"
    )
    if r.peer:
        text += f" {r.peer:>10} {r.peer_milliseconds:9.2f} {r.times_faster_than_peer:6.2f}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="mixtral,nemotron", help="of " + ", ".join(LAYERS))
    parser.add_argument("--dtypes", default="float32,bfloat16,int8,int4", help="of the weights; default: %(default)s")
    parser.add_argument("--tokens", default="1,4,16,128,512")
    parser.add_argument("--k", default="1,2,4,6")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for a machine that others use"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--quick", action="store_true", help="1 and 128 tokens, k 1 and 2, 3 repeats")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "moe_op.json")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.k, args.repeats = "1,128", "1,2", 3
    for name, known in (("layers", LAYERS), ("dtypes", BITS)):
        unknown = set(getattr(args, name).split(",")) - set(known)
        if unknown:
            parser.error(f"--{name}: there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")

    if not args.no_peer:
        try:
            import torch  # noqa: F401
            import transformers  # noqa: F401
        except ImportError as error:
            print(f"The peer is left out: {error}", file=sys.stderr)
            args.no_peer = True

    clock = Clock(args.clock, args.threads)
    read = ReadProbe(args.threads)
    products = {in_bfloat16: GemmProbe(args.threads, bfloat16=in_bfloat16) for in_bfloat16 in (False, True)}
    print(f"{args.threads} threads, {args.clock} time, {instruction_set()}, {cpu_name()}")
    print(HEADER, flush=True)
    results: list[Result] = []
    for layer in (LAYERS[name] for name in args.layers.split(",")):
        for dtype in args.dtypes.split(","):
            stored = random_weights(layer, dtype)
            probes = read, products[dtype == "bfloat16" and instruction_set() == "amx"]
            peer_calls = {}
            if not args.no_peer and not stored.arguments:
                peer_calls = peers(layer, dtype, stored.up, stored.down, args.threads)
            for tokens in map(int, args.tokens.split(",")):
                of_this: dict[int, Result] = {}
                # From the largest k down, so that each line can be set against the one with twice its k.
                for k in sorted({min(int(k), layer.experts) for k in args.k.split(",")}, reverse=True):
                    result = run_case(layer, dtype, tokens, k, stored, clock, probes, peer_calls, args.repeats)
                    if 2 * k in of_this:
                        result.relative_to_twice_k = result.milliseconds / of_this[2 * k].milliseconds
                    of_this[k] = result
                    results.append(result)
                    print(line(result), flush=True)
            del stored, peer_calls

    settings = {"threads": args.threads, "clock": args.clock, "instruction_set": instruction_set()}
    write_results(args.output, {**settings, "results": [asdict(r) for r in results]})


if __name__ == "__main__":
    main()
