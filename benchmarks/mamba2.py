# SPDX-License-Identifier: Apache-2.0
"""Time of the Mamba2 operator at the layer shape of Nemotron 3 Nano.

    python benchmarks/mamba2.py [--decode 1,4,16] [--prefill 64,512] [--threads N] [--clock cpu] [--no-peer]

A decode step updates each sequence's states once: it is set against an update in place of as many bytes by
NumPy, in turns, so that both see the same machine; enough layers take turns that no state stays in a cache. The peer
is transformers' own implementation in torch. Prints a table and writes benchmarks/results/mamba2.json.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.plugin import instruction_set, mamba2

from _results import write_results

Array = npt.NDArray[Any]

HEADS, HEAD_DIM, STATE_SIZE, GROUPS, TAPS = 64, 64, 128, 8, 4
CHANNELS = HEADS * HEAD_DIM + 2 * GROUPS * STATE_SIZE
STATE_BYTES = 4 * (HEADS * HEAD_DIM * STATE_SIZE + (TAPS - 1) * CHANNELS)
# States that no cache holds.
ROTATED_BYTES = 256 << 20


@dataclass
class Result:
    """One case; bytes are those of the states, each read and written once a step."""

    kind: str
    sequences: int
    tokens: int
    microseconds_per_token: float
    gigabytes_per_second: float
    share_of_update_bandwidth: float
    peer_microseconds_per_token: float | None


class UpdateProbe:
    """Multiplies an array by one in place, with all threads."""

    def __init__(self, threads: int, megabytes: int = 256) -> None:
        array = np.ones(megabytes * 2**18, np.float32)
        self.num_bytes = 2 * array.nbytes
        self._parts = np.array_split(array, 16 * threads)
        self._pool = ThreadPoolExecutor(threads)

    def run(self) -> None:
        """Read and write `num_bytes` in all."""
        for _ in self._pool.map(lambda part: np.multiply(part, np.float32(1), out=part), self._parts):
            pass


def inputs(sequences: int, length: int, past: int) -> list[Array]:
    """The operator's inputs for sequences of equal length, in its order."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, dtype=np.float32)

    # As the session allocates them: from a cache line on, in the large pages that NumPy asks for.
    def zeros(*shape: int) -> Array:
        count = int(np.prod(shape))
        storage = np.empty(count + 16, np.float32)
        start = -storage.ctypes.data // 4 % 16
        array = storage[start : start + count].reshape(shape)
        array.fill(0)
        return array

    tokens, slots = sequences * length, max(sequences, 4)
    return [
        normal(tokens, CHANNELS),
        normal(tokens, HEADS),
        np.arange(sequences + 1, dtype=np.int32) * length,
        np.full(sequences, past, np.int32),
        np.arange(sequences, dtype=np.int32),
        normal(TAPS, CHANNELS),
        normal(CHANNELS),
        -np.exp(normal(HEADS)),
        normal(HEADS),
        normal(HEADS),
        zeros(slots, TAPS - 1, CHANNELS),
        zeros(slots, HEADS, STATE_SIZE, HEAD_DIM),
    ]


def peer(sequences: int, length: int, threads: int, layers: int) -> Callable[[], object]:
    """The same work by transformers: its update of states in decode, its chunked scan in prefill."""
    import torch
    from transformers.models.nemotron_h import modeling_nemotron_h as reference

    torch.set_num_threads(threads)
    x, dt = torch.randn(sequences, length, CHANNELS), torch.randn(sequences, length, HEADS)
    weight, bias = torch.randn(CHANNELS, TAPS), torch.randn(CHANNELS)
    a, d, dt_bias = -torch.randn(HEADS).exp(), torch.randn(HEADS), torch.randn(HEADS)
    sizes = [HEADS * HEAD_DIM, GROUPS * STATE_SIZE, GROUPS * STATE_SIZE]
    states = itertools.cycle(
        [
            (torch.zeros(sequences, CHANNELS, TAPS - 1), torch.zeros(sequences, HEADS, HEAD_DIM, STATE_SIZE))
            for _ in range(layers)
        ]
    )

    def decode() -> object:
        conv_state, state = next(states)
        mixed = reference.causal_conv1d_update(x.transpose(1, 2), conv_state, weight, bias, activation="silu")
        hidden, b, c = mixed.transpose(1, 2)[:, 0].split(sizes, -1)
        wide = (HEADS, HEAD_DIM)
        return reference.mamba2_selective_state_update(
            state,
            hidden.reshape(sequences, *wide),
            dt[:, 0, :, None].expand(-1, -1, HEAD_DIM),
            a[:, None, None].expand(-1, HEAD_DIM, STATE_SIZE),
            b.reshape(sequences, GROUPS, STATE_SIZE),
            c.reshape(sequences, GROUPS, STATE_SIZE),
            d[:, None].expand(*wide),
            dt_bias=dt_bias[:, None].expand(*wide),
            dt_softplus=True,
        )

    def prefill() -> object:
        mixed = reference.causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu")
        hidden, b, c = mixed.transpose(1, 2).split(sizes, -1)
        return reference.mamba2_chunk_scan(
            hidden.reshape(sequences, length, HEADS, HEAD_DIM),
            dt,
            a,
            b.reshape(sequences, length, GROUPS, STATE_SIZE),
            c.reshape(sequences, length, GROUPS, STATE_SIZE),
            128,
            D=d,
            dt_bias=dt_bias,
            dt_softplus=True,
            return_final_states=True,
        )

    def without_gradients() -> object:
        with torch.no_grad():
            return decode() if length == 1 else prefill()

    return without_gradients


def run_case(
    sequences: int, length: int, probe: UpdateProbe, now: Callable[[], float], args: argparse.Namespace
) -> Result:
    """One case, its probe and its peer in turns; medians."""
    layers = max(1, ROTATED_BYTES // (STATE_BYTES * sequences)) if length == 1 else 1
    rotated: Iterator[list[Array]] = itertools.cycle(
        [inputs(sequences, length, 8 if length == 1 else 0) for _ in range(layers)]
    )
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: mamba2(*next(rotated), n_groups=GROUPS, num_threads=args.threads),
        "probe": probe.run,
    }
    if not args.no_peer:
        calls["peer"] = peer(sequences, length, args.threads, layers)
    times: dict[str, list[float]] = {name: [] for name in calls}
    # Memory gets its pages when it is first touched.
    for _, call in itertools.product(range(layers), calls.values()):
        call()
    for _ in range(args.repeats):
        for name, call in calls.items():
            count = layers if name != "probe" else 1
            start = now()
            for _ in range(count):
                call()
            times[name].append((now() - start) / count)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    tokens = sequences * length
    rate = 2 * STATE_BYTES * sequences / seconds["ours"]
    return Result(
        kind="decode" if length == 1 else "prefill",
        sequences=sequences,
        tokens=tokens,
        microseconds_per_token=seconds["ours"] / tokens * 1e6,
        gigabytes_per_second=rate / 1e9,
        share_of_update_bandwidth=rate / (probe.num_bytes / seconds["probe"]),
        peer_microseconds_per_token=seconds["peer"] / tokens * 1e6 if "peer" in seconds else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decode", default="1,4,16", help="sequences that each advance by one token")
    parser.add_argument("--prefill", default="64,512", help="tokens of one prompt")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for a machine that others use"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "mamba2.json")
    args = parser.parse_args()

    def processor_time() -> float:
        return time.process_time() / args.threads

    now = time.perf_counter if args.clock == "wall" else processor_time
    probe = UpdateProbe(args.threads)
    print(f"{args.threads} threads, {args.clock} time, {instruction_set()}")
    print(
        f"{'':8} {'sequences':>9} {'tokens':>6} {'us/token':>9} {'GB/s':>6} {'of update':>9} {'peer':>9} {'faster':>6}"
    )
    results = []
    cases = [(int(n), 1) for n in args.decode.split(",") if n] + [(1, int(n)) for n in args.prefill.split(",") if n]
    for sequences, length in cases:
        r = run_case(sequences, length, probe, now, args)
        results.append(r)
        bytes_matter = f"{r.gigabytes_per_second:6.1f} {r.share_of_update_bandwidth:9.2f}" if length == 1 else " " * 16
        compared = ""
        if r.peer_microseconds_per_token is not None:
            factor = r.peer_microseconds_per_token / r.microseconds_per_token
            compared = f" {r.peer_microseconds_per_token:9.1f} {factor:6.2f}"
        print(
            f"{r.kind:8} {r.sequences:9} {r.tokens:6} {r.microseconds_per_token:9.1f} {bytes_matter}{compared}",
            flush=True,
        )
    settings = {"threads": args.threads, "clock": args.clock, "instruction_set": instruction_set()}
    write_results(args.output, {**settings, "results": [asdict(r) for r in results]})


if __name__ == "__main__":
    main()
