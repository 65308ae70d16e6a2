# SPDX-License-Identifier: Apache-2.0
"""Time of other implementations of the MoE layers that moe_gpu.py times, from CUDA graphs as there.

    python benchmarks/gpu/moe_peers.py --out DIR [--layers mixtral,nemotron] [--tokens 1,4,16,64,256,1024,4096]

bfloat16, the routing included, at a fixed k. torch's grouped products and a small fused MoE in Triton
(triton_moe.py); vLLM's and flashinfer's where they are installed. Before it is timed, each is compared with a loop
over the experts in float32.

Needs torch, and a GPU. Prints a table, and adds each row to DIR/results.jsonl as soon as it is known.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import torch
from _timing import matmul_rate, numbers, torch_milliseconds
from moe_layers import LAYERS, MODELS, TOKENS, MoeLayer
from rows import FAILED, PASSED, Rows

Way = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""From tokens [T, H], router logits [T, E] and k to the layer's output [T, H]."""
TOLERANCE = 1.5e-2  # of the norm of the error, in bfloat16


class Peers:
    """A layer's random weights, and ways to run it."""

    def __init__(self, layer: MoeLayer, device: str = "cuda") -> None:
        torch.manual_seed(0)
        self.layer, self.device = layer, device
        self.gated = layer.activation == "swiglu"
        wide = 2 if self.gated else 1
        self.up = self.random(layer.experts, wide * layer.intermediate, layer.hidden, spread=layer.hidden**-0.5)
        self.down = self.random(layer.experts, layer.hidden, layer.intermediate, spread=layer.intermediate**-0.5)

    def random(self, *shape: int, spread: float = 1.0) -> torch.Tensor:
        """Normal numbers."""
        return torch.empty(shape, device=self.device, dtype=torch.bfloat16).normal_(0, spread)

    def logits(self, tokens: int) -> torch.Tensor:
        """Of the router, as random as moe_gpu.py's."""
        return torch.randn(tokens, self.layer.experts, device=self.device)

    def route(self, logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and experts [T, k]."""
        scores = logits.sigmoid() if self.layer.scoring == "sigmoid" else logits.softmax(-1)
        weights, chosen = scores.topk(k)
        return weights / weights.sum(-1, keepdim=True) * self.layer.routed_scaling_factor, chosen

    def activate(self, u: torch.Tensor) -> torch.Tensor:
        """The activation of rows."""
        if not self.gated:
            return torch.relu(u).square()
        gate, value = u.chunk(2, -1)
        return torch.nn.functional.silu(gate) * value

    def loop(self, x: torch.Tensor, logits: torch.Tensor, k: int) -> torch.Tensor:
        """The reference: expert by expert, in float32."""
        weights, chosen = self.route(logits, k)
        output = torch.zeros(x.shape, device=x.device)
        for expert in chosen.unique().tolist():
            tokens, ranks = (chosen == expert).nonzero(as_tuple=True)
            h = self.activate(x[tokens].float() @ self.up[expert].float().T)
            output.index_add_(0, tokens, weights[tokens, ranks, None] * (h @ self.down[expert].float().T))
        return output

    def grouped(self, x: torch.Tensor, logits: torch.Tensor, k: int) -> torch.Tensor:
        """Grouped products of torch's over the rows in the order of their experts."""
        weights, chosen = self.route(logits, k)
        by_expert, order = chosen.flatten().sort(stable=True)
        # Not bincount(), which waits for the device.
        experts = torch.arange(self.layer.experts, device=x.device)
        ends = torch.searchsorted(by_expert, experts, right=True).to(torch.int32)
        tokens = order // k
        u = torch.nn.functional.grouped_mm(x[tokens], self.up.transpose(1, 2), offs=ends)
        y = torch.nn.functional.grouped_mm(self.activate(u), self.down.transpose(1, 2), offs=ends)
        y = y * weights.flatten()[order, None].to(y.dtype)
        return torch.zeros_like(x).index_add_(0, tokens, y)

    def fused(self, x: torch.Tensor, logits: torch.Tensor, k: int) -> torch.Tensor:
        """Ours in Triton."""
        from triton_moe import triton_moe

        return triton_moe(x, self.up, self.down, *self.route(logits, k), gated=self.gated)

    def vllm(self, x: torch.Tensor, logits: torch.Tensor, k: int) -> torch.Tensor:
        """The fused MoE of vLLM."""
        from vllm.model_executor.layers.fused_moe import fused_experts

        weights, chosen = self.route(logits, k)
        return fused_experts(x, self.up, self.down, weights.float(), chosen.to(torch.int32))

    @cached_property
    def ups_first(self) -> torch.Tensor:
        """The first product's weights with the gates last."""
        return torch.cat(self.up.chunk(2, 1)[::-1], 1)

    def flashinfer(self, x: torch.Tensor, logits: torch.Tensor, k: int) -> torch.Tensor:
        """The fused MoE of flashinfer, CUTLASS's."""
        from flashinfer.fused_moe import cutlass_fused_moe

        weights, chosen = self.route(logits, k)
        output = torch.empty_like(x)
        arguments = chosen.to(torch.int32), weights.float(), self.ups_first, self.down, output.dtype
        cutlass_fused_moe(x, *arguments, output=output, quant_scales=None)
        return output

    def ways(self) -> dict[str, Way]:
        """The implementations that compute such a layer."""
        ways: dict[str, Way] = {"torch": self.grouped, "triton": self.fused}
        if self.gated:
            ways |= {"vllm": self.vllm, "flashinfer": self.flashinfer}
        return ways

    def error(self, way: Way, tokens: int, k: int) -> float:
        """||output - reference|| / ||reference||."""
        x, logits = self.random(tokens, self.layer.hidden), self.logits(tokens)
        expected = self.loop(x, logits, k)
        return float(torch.linalg.norm(way(x, logits, k).float() - expected) / torch.linalg.norm(expected))

    def time(self, way: Way, tokens: int, k: int) -> float:
        """Microseconds of one call."""
        x = self.random(tokens, self.layer.hidden)
        calls = [partial(way, x, self.logits(tokens), k) for _ in range(16 if tokens <= 64 else 4)]
        return 1e3 * torch_milliseconds(torch, calls)


def time_peer(rows: Rows, name: str, peers: Peers, peer: str, tokens: int, k: int) -> None:
    """Adds one row; raises ImportError where the peer is not installed."""
    way, case = peers.ways()[peer], f"{name} {peer} T={tokens} k={k}"
    try:
        error = peers.error(way, tokens, k)
        if not error <= TOLERANCE:
            raise AssertionError(f"the output is off by {error:.1e} of its norm; {TOLERANCE:.1e} is allowed")
        us = peers.time(way, tokens, k)
    except ImportError:
        raise
    except Exception as wrong:
        error_text = f"{type(wrong).__name__}: {' '.join(str(wrong).split())[:300]}"
        rows.add("benchmarks", case, FAILED, error=error_text)
        print(f"{case}: {error_text}", flush=True)
        return
    found = {"layer": name, "peer": peer, "tokens": tokens, "k": str(k), "us": us, "error_of_norm": error}
    rows.add("benchmarks", case, PASSED, **found)
    print(f"{name:12} {peer:10} {tokens:6} {k:3} {us:9.1f} {error:9.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder of results.jsonl")
    parser.add_argument("--layers", default=",".join(MODELS))
    parser.add_argument("--tokens", type=numbers, default=numbers(TOKENS))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("moe_peers: torch sees no GPU")
    rows = Rows(options.out)
    rows.add("benchmarks", "bfloat16 product of 8192", PASSED, tflop_s=matmul_rate(torch))
    print(f"{'layer':12} {'peer':10} {'tokens':>6} {'k':>3} {'us':>9} {'error':>9}")
    for name in options.layers.split(","):
        peers = Peers(LAYERS[name])
        for peer in peers.ways():
            try:
                for tokens in options.tokens:
                    for k in dict.fromkeys(ks[0] for ks in peers.layer.ks().values()):
                        time_peer(rows, name, peers, peer, tokens, k)
            except ImportError as wrong:
                print(f"{name:12} {peer:10} is left out: {wrong}", flush=True)
        del peers
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
