# SPDX-License-Identifier: Apache-2.0
"""Time of the CUDA operator on a GPU, adaptive against fixed k.

    python benchmarks/gpu/moe_gpu.py --out DIR [--layers mixtral,nemotron] [--tokens 1,4,16,64,256,1024,4096]
                                     [--weights element,int8,int4]

Each row is one layer at one number of tokens and one k: the model's own, half of it, or both in turn from token to
token, as an adaptive policy mixes them. A CUDA graph of several launches with logits of their own is replayed, so that
neither launch overhead nor a warm cache decides. moe_peers.py times other implementations in the same way.

Needs build/cuda/libadaptive_k_cuda.so (make cuda) and a GPU. Prints a table, and adds each row to DIR/results.jsonl as
soon as it is known.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from _timing import copy_bandwidth, milliseconds, numbers
from gpu_device import DeviceLayer, Gpu, missing
from moe_layers import LAYERS, MODELS, TOKENS, MoeLayer
from rows import PASSED, Rows

from cuda_launcher import DTYPES, Layer  # isort: skip

BITS = {"element": 16, "int8": 8, "int4": 4}
ELEMENT = "bfloat16"
GROUP_SIZE = 64
PIECE = 4_194_301  # random numbers, repeated: a prime, so that no two experts have the same ones


class Bench:
    """A layer's random weights on the GPU, shared by every case."""

    def __init__(self, gpu: Gpu, model: MoeLayer, weights: str) -> None:
        self.gpu, self.model, self.weights = gpu, model, weights
        rng = np.random.default_rng(0)
        self.addresses: dict[str, int] = {}
        self.hidden_states = rng.standard_normal(PIECE).astype(DTYPES[ELEMENT])
        if weights == "element":
            piece = (rng.standard_normal(PIECE) * 0.02).astype(DTYPES[ELEMENT]).view(np.uint8)
        else:
            piece = rng.integers(0, 256, PIECE, np.uint8)
        scales = np.full(PIECE, 1e-3, DTYPES[ELEMENT]).view(np.uint8)
        down = model.experts * model.hidden * model.intermediate
        for name, count in (("up", model.experts * model.weights - down), ("down", down)):
            self.addresses[name] = self.repeat(piece, count * BITS[weights] // 8)
            if weights != "element":
                self.addresses[name + "_scales"] = self.repeat(scales, count // GROUP_SIZE * 2)

    def repeat(self, piece: npt.NDArray[np.uint8], size: int) -> int:
        """The address of so many bytes of device memory, filled there with repetitions of a piece."""
        driver = self.gpu.driver
        address = driver.allocate(size)
        done = min(size, len(piece))
        driver.write(address, piece[:done])
        while done < size:
            more = min(done, size - done)
            driver.copy(address + done, address, more, self.gpu.stream)
            done += more
        driver.synchronize(self.gpu.stream)
        return address

    def layer(self, tokens: int, ks: list[int]) -> Layer:
        """As the launcher takes it, with a policy row for each k."""
        m = self.model
        return Layer(
            tokens, m.hidden, m.intermediate, m.experts, policies=len(ks), choices=1, element=ELEMENT,
            weights=self.weights, group_size=0 if self.weights == "element" else GROUP_SIZE, activation=m.activation,
            scoring=m.scoring, routed_scaling_factor=m.routed_scaling_factor, max_k=m.top_k,
        )  # fmt: skip

    def case(self, tokens: int, ks: list[int], routings: int) -> Launches:
        """The layer with inputs for so many launches, in which the tokens run these k in turn."""
        layer = self.layer(tokens, ks)
        rng = np.random.default_rng(1)
        inputs: dict[str, npt.NDArray[Any] | None] = {
            "hidden_states": np.resize(self.hidden_states, (tokens, layer.hidden)),
            "router_logits": rng.standard_normal((routings, tokens, layer.experts)).astype(np.float32),
            # A token alone takes them in turn from launch to launch.
            "policy_index": ((np.arange(tokens) + np.arange(routings)[:, None]) % len(ks)).astype(np.int32),
            "policy_kind": np.zeros(len(ks), np.int32),
            "k_values": np.array(ks, np.int32).reshape(-1, 1),
        }
        return Launches(self, DeviceLayer(self.gpu, layer, inputs))

    def time(self, tokens: int, ks: list[int], routings: int = 0) -> dict[str, float | str]:
        """What a launch takes, and what it has to do at least; so many launches are in a graph (0: enough)."""
        routings = routings or (16 if tokens <= 64 else 4)
        case = self.case(tokens, ks, routings)
        active = 0
        for routing in range(routings):
            case.launch(routing, self.gpu.stream)
            active += case.active_experts()
        time = milliseconds(self.gpu, [partial(case.launch, routing) for routing in range(routings)])
        path = self.gpu.path(case.on_device.layer)
        case.free()
        experts, rows = active / routings, tokens * sum(ks) / len(ks)
        bits = BITS[self.weights] + (0 if self.weights == "element" else 16 / GROUP_SIZE)
        return {
            "path": path,
            "us": 1e3 * time,
            "experts": experts,
            # Each weight that was chosen read once, the tokens read and the output written.
            "bytes": experts * self.model.weights * bits / 8 + 2 * tokens * self.model.hidden * 2,
            "flop": 2 * rows * self.model.weights,
        }

    def free(self) -> None:
        """Gives the weights back."""
        for address in self.addresses.values():
            self.gpu.driver.free(address)


class Launches:
    """Launches of one layer that differ in their logits, and in who follows which policy."""

    def __init__(self, bench: Bench, on_device: DeviceLayer) -> None:
        self.bench, self.on_device = bench, on_device
        self._own = dict(on_device.pointers)

    def launch(self, routing: int, stream: int) -> None:
        """Enqueues the launch with the logits of this number."""
        layer = self.on_device.layer
        strides = {"router_logits": layer.tokens * layer.experts * 4, "policy_index": layer.tokens * 4}
        moved = {name: (self._own[name] or 0) + routing * stride for name, stride in strides.items()}
        self.on_device.pointers = {**self._own, **self.bench.addresses, **moved}
        self.on_device.launch(stream)

    def active_experts(self) -> int:
        """How many experts the last launch read; waits for it."""
        driver = self.bench.gpu.driver
        driver.synchronize(self.bench.gpu.stream)
        at = self.on_device.workspace + self.bench.gpu.offset(self.on_device.layer, "num_active")
        return int(np.frombuffer(driver.read(at, 4), np.int32)[0])

    def free(self) -> None:
        """Gives back what is not the bench's."""
        self.on_device.pointers = self._own
        self.on_device.free()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder of results.jsonl")
    parser.add_argument("--layers", default=",".join(MODELS))
    parser.add_argument("--tokens", type=numbers, default=numbers(TOKENS))
    parser.add_argument("--weights", default="element,int8,int4")
    parser.add_argument("--routings", type=int, default=0, help="launches in a graph (default: 16, 4 above 64 tokens)")
    options = parser.parse_args()
    if reason := missing():
        raise SystemExit(f"moe_gpu: {reason}")
    gpu, rows = Gpu(), Rows(options.out)
    bandwidth = copy_bandwidth(gpu)
    rows.add("benchmarks", "copy", PASSED, gb_s=bandwidth)
    print(f"{gpu.driver.name}, compute capability {gpu.driver.capability}, {ELEMENT}, copies at {bandwidth:.0f} GB/s\n")
    columns = ("tokens", "k", "path", "us", "experts", "GB/s", "TFLOP/s", "of top-k")
    print(f"{'layer':12} {'weights':8} " + " ".join(f"{column:>9}" for column in columns))
    for name in options.layers.split(","):
        for weights in options.weights.split(","):
            bench = Bench(gpu, LAYERS[name], weights)
            for tokens in options.tokens:
                full = 0.0
                for k, ks in bench.model.ks().items():
                    row = bench.time(tokens, ks, options.routings)
                    us = float(row["us"])
                    full = full or us
                    case = {"layer": name, "weights": weights, "tokens": tokens, "k": k}
                    rows.add("benchmarks", f"{name} {weights} T={tokens} k={k}", PASSED, **case, **row)
                    rates = float(row["bytes"]) / us / 1e3, float(row["flop"]) / us / 1e6
                    print(
                        f"{name:12} {weights:8} {tokens:9} {k:>9} {row['path']:>9} {us:9.1f} {row['experts']:9.1f} "
                        f"{rates[0]:9.1f} {rates[1]:9.1f} {us / full:9.2f}",
                        flush=True,
                    )
            bench.free()


if __name__ == "__main__":
    main()
