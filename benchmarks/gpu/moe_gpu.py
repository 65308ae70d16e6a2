# SPDX-License-Identifier: Apache-2.0
"""Time of the CUDA operator on a GPU, adaptive against fixed k, with peers in the same run.

    python benchmarks/gpu/moe_gpu.py [--layers mixtral,nemotron] [--tokens 1,4,16,64,256,1024,4096]
                                     [--weights element,int8,int4] [--no-peers]

Each row is one layer at one number of tokens: the operator with a fixed k (every k up to the model's own), and
adaptive with half of the tokens at the lowest k and half at the model's own. Peers, where installed: torch's
grouped products, flashinfer's and vLLM's fused MoE, all at the fixed top-k of the model. A CUDA graph of several
launches with different logits is replayed, so that neither launch overhead nor a warm cache decides. For decode
the table tells which share of the device's measured copy bandwidth the weights were read at.

Needs build/cuda/libadaptive_k_cuda.so (make cuda) and a GPU. Prints a table and writes
benchmarks/results/moe_gpu.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "benchmarks")]

from gpu_device import DeviceLayer, Gpu, missing  # noqa: E402

from cuda_launcher import Layer  # noqa: E402 # isort: skip
from _results import write_results  # noqa: E402 # isort: skip

LAYERS: dict[str, dict[str, Any]] = {
    "mixtral": dict(hidden=4096, intermediate=14336, experts=8, max_k=2, activation="swiglu"),
    "nemotron": dict(
        hidden=2688, intermediate=1856, experts=128, max_k=6, activation="relu2", scoring="sigmoid",
        routed_scaling_factor=2.5,
    ),
}  # fmt: skip
ROUTINGS = 8  # launches in a graph, each with logits of its own
REPEATS = 20


def milliseconds(gpu: Gpu, launches: list[Callable[[int], None]]) -> float:
    """Median time of one launch, from replays of a graph of all of them."""
    for launch in launches:
        launch(gpu.stream)
    gpu.driver.synchronize(gpu.stream)
    gpu.driver.begin_capture(gpu.stream)
    for launch in launches:
        launch(gpu.stream)
    graph = gpu.driver.end_capture(gpu.stream)
    times = []
    for _ in range(REPEATS):
        begin, end = gpu.driver.event(), gpu.driver.event()
        gpu.driver.record(begin, gpu.stream)
        gpu.driver.launch_graph(graph, gpu.stream)
        gpu.driver.record(end, gpu.stream)
        times.append(gpu.driver.milliseconds(begin, end) / len(launches))
    return statistics.median(times)


class Bench:
    """A layer's random weights on the GPU, shared by every case."""

    def __init__(self, gpu: Gpu, layer: Layer) -> None:
        self.gpu, self.layer = gpu, layer
        rng = np.random.default_rng(0)
        wide = 2 if layer.activation in ("swiglu", "geglu") else 1
        bits = {"element": 16, "int8": 8, "int4": 4}[layer.weights]
        count = layer.experts * layer.hidden * layer.intermediate
        self.expert_bytes = (wide + 1) * layer.hidden * layer.intermediate * bits // 8
        self.shared: dict[str, int] = {}
        if bits == 16:
            piece = (rng.standard_normal(1 << 24) * 0.02).astype(np.float16)
        else:
            piece = rng.integers(0, 256, 1 << 25, np.uint8)
        for name, weights in (("up", wide * count), ("down", count)):
            size = weights * bits // 8
            self.shared[name] = gpu.driver.allocate(size)
            for at in range(0, size, piece.nbytes):
                gpu.driver.write(self.shared[name] + at, piece.view(np.uint8)[: min(piece.nbytes, size - at)])
            if bits < 16:
                scales = np.full(weights // (layer.group_size or 1), 1e-3, np.float16)
                self.shared[name + "_scales"] = gpu.driver.allocate(scales.nbytes)
                gpu.driver.write(self.shared[name + "_scales"], scales)

    def free(self) -> None:
        """Gives the weights back."""
        for address in self.shared.values():
            self.gpu.driver.free(address)

    def time(self, tokens: int, ks: list[int]) -> tuple[float, float]:
        """Milliseconds of a launch in which the tokens take these k in turn, and the experts it read on average."""
        layer = replace(self.layer, tokens=tokens, policies=len(ks), choices=1)
        rng = np.random.default_rng(1)
        cases = []
        experts = []
        for _ in range(ROUTINGS):
            inputs = {
                "hidden_states": rng.standard_normal((tokens, layer.hidden)).astype(np.float16),
                "router_logits": rng.standard_normal((tokens, layer.experts)).astype(np.float32),
                "policy_index": (np.arange(tokens) % len(ks)).astype(np.int32),
                "policy_kind": np.zeros(len(ks), np.int32),
                "k_values": np.array(ks, np.int32).reshape(-1, 1),
            }
            case = DeviceLayer(self.gpu, layer, inputs)
            case.pointers.update(self.shared)
            cases.append(case)
            case.launch(self.gpu.stream)
            self.gpu.driver.synchronize(self.gpu.stream)
            experts.append(len(case.result().active))
        time = milliseconds(self.gpu, [case.launch for case in cases])
        for case in cases:
            case.pointers = {name: address for name, address in case.pointers.items() if name not in self.shared}
            case.free()
        return time, float(np.mean(experts))


def copy_bandwidth(gpu: Gpu) -> float:
    """GB/s read and written by a fill-free copy of 1 GiB, the yardstick for streaming."""
    size = 1 << 30
    a, b = gpu.driver.allocate(size), gpu.driver.allocate(size)
    gpu.driver.fill(a, 1, size)

    def copy(stream: int) -> None:
        gpu.driver.copy(b, a, size, stream)

    time = milliseconds(gpu, [copy])
    gpu.driver.free(a)
    gpu.driver.free(b)
    return 2 * size / time / 1e6


def peers(layer: Layer, tokens: int) -> dict[str, float | str]:
    """Milliseconds of other implementations at the model's fixed top-k, bfloat16; a reason where there is none."""
    try:
        import torch
    except ImportError:
        return {"torch": "not installed"}
    if not torch.cuda.is_available():
        return {"torch": "without CUDA"}
    torch.manual_seed(0)
    wide = 2 if layer.activation == "swiglu" else 1
    k, experts = layer.max_k, layer.experts
    options = {"device": "cuda", "dtype": torch.bfloat16}
    up = torch.randn(experts, wide * layer.intermediate, layer.hidden, **options) * 0.02
    down = torch.randn(experts, layer.hidden, layer.intermediate, **options) * 0.02
    x = torch.randn(tokens, layer.hidden, **options)
    logits = torch.randn(tokens, experts, device="cuda")

    def route() -> tuple[torch.Tensor, torch.Tensor]:
        scores = logits.sigmoid() if layer.scoring == "sigmoid" else logits.softmax(-1)
        weights, chosen = scores.topk(k)
        return weights / weights.sum(-1, keepdim=True), chosen

    def grouped() -> torch.Tensor:
        weights, chosen = route()
        order = chosen.flatten().argsort(stable=True)
        ends = torch.bincount(chosen.flatten(), minlength=experts).cumsum(0).to(torch.int32)
        tokens_in_order = order // k
        u = torch.nn.functional.grouped_mm(x[tokens_in_order], up.transpose(1, 2), offs=ends)
        if wide == 2:
            gate, value = u.chunk(2, -1)
            h = torch.nn.functional.silu(gate) * value
        else:
            h = torch.relu(u).square()
        y = torch.nn.functional.grouped_mm(h, down.transpose(1, 2), offs=ends)
        y = y * weights.flatten()[order, None].to(y.dtype)
        return torch.zeros_like(x).index_add_(0, tokens_in_order, y)

    def vllm() -> torch.Tensor:
        from vllm.model_executor.layers.fused_moe import fused_experts

        weights, chosen = route()
        return fused_experts(x, up, down, weights.float(), chosen.to(torch.int32))

    def flashinfer() -> torch.Tensor:
        from flashinfer.fused_moe import cutlass_fused_moe

        weights, chosen = route()
        return cutlass_fused_moe(x, chosen.to(torch.int32), weights.float(), up, down, torch.bfloat16, quant_scales=[])

    found: dict[str, float | str] = {}
    for name, call in (("torch", grouped), ("vllm", vllm), ("flashinfer", flashinfer)):
        if name != "torch" and wide == 1:
            found[name] = "no squared ReLU"
            continue
        try:
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            times = []
            for _ in range(REPEATS):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
            found[name] = statistics.median(times)
        except (ImportError, RuntimeError, TypeError) as wrong:
            found[name] = f"{type(wrong).__name__}: {str(wrong)[:80]}"
    return found


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", default="mixtral,nemotron")
    parser.add_argument("--tokens", type=numbers, default=numbers("1,4,16,64,256,1024,4096"))
    parser.add_argument("--weights", default="element,int8,int4")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    if reason := missing():
        raise SystemExit(f"moe_gpu: {reason}")
    gpu = Gpu()
    bandwidth = copy_bandwidth(gpu)
    print(f"{gpu.driver.name}, compute capability {gpu.driver.capability}, copies at {bandwidth:.0f} GB/s\n")
    columns = ("tokens", "k", "path", "ms", "experts", "of copy", "of top-k")
    print(f"{'layer':9} {'weights':8} " + " ".join(f"{column:>9}" for column in columns))
    rows = []
    for name in options.layers.split(","):
        for weights in options.weights.split(","):
            layer = Layer(1, weights=weights, group_size=0 if weights == "element" else 64, **LAYERS[name])
            bench = Bench(gpu, layer)
            for tokens in options.tokens:
                path = gpu.path(replace(layer, tokens=tokens, policies=1, choices=1))
                full, _ = bench.time(tokens, [layer.max_k])
                lowest = max(1, layer.max_k // 3)
                cases = {str(k): [k] for k in range(1, layer.max_k + 1)}
                cases[f"{lowest} or {layer.max_k}"] = [lowest, layer.max_k]
                for label, ks in cases.items():
                    time, experts = bench.time(tokens, ks)
                    share = experts * bench.expert_bytes / time / 1e6 / bandwidth
                    rows.append(
                        {"layer": name, "weights": weights, "tokens": tokens, "k": label, "path": path, "ms": time,
                         "experts": experts, "share_of_copy_bandwidth": share, "of_fixed_top_k": time / full}
                    )  # fmt: skip
                    print(
                        f"{name:9} {weights:8} {tokens:9} {label:>9} {path:>9} {time:9.3f} {experts:9.1f} "
                        f"{share:9.1%} {time / full:9.2f}"
                    )
            bench.free()
        if not options.no_peers:
            layer = Layer(1, **LAYERS[name])
            for tokens in options.tokens:
                for peer, value in peers(layer, tokens).items():
                    rows.append({"layer": name, "tokens": tokens, "peer": peer, "ms": value})
                    shown = f"{value:9.3f}" if isinstance(value, float) else value
                    print(f"{name:9} {peer:8} {tokens:9} {layer.max_k:>9} {'':9} {shown}")
    write_results(
        ROOT / "benchmarks" / "results" / "moe_gpu.json",
        {"device": gpu.driver.name, "copy_gb_s": bandwidth, "rows": rows},
    )


if __name__ == "__main__":
    main()
