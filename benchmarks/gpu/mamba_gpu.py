# SPDX-License-Identifier: Apache-2.0
"""Time of Mamba2 on a GPU at Nemotron 3 Nano's layer shape, decode against the bytes of its states.

    python benchmarks/gpu/mamba_gpu.py --out DIR [--decode 1,4,16,64] [--prefill 64,512,4096] [--no-peers]

A decode step reads and writes each sequence's states once: its bytes a second are set against the device's measured
copy bandwidth. A CUDA graph of steps over several layers' states is replayed, more than the L2 cache holds, so that
neither launches nor a warm cache decide. The peer is the package mamba_ssm, where it is installed: its
selective_state_update in decode and mamba_chunk_scan_combined in prefill, without the convolution, which ours
includes.

Needs build/cuda/libadaptive_k_cuda.so (make cuda) and a GPU. Prints a table, and adds each row to DIR/results.jsonl as
soon as it is known.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from _timing import copy_bandwidth, milliseconds, numbers, torch_milliseconds
from gpu_device import Gpu, missing
from gpu_mamba import DeviceMamba
from rows import PASSED, Rows

from cuda_mamba import layer_of, make  # isort: skip
from mamba_oracle import Case  # isort: skip

HEADS, HEAD_DIM, STATE_SIZE, GROUPS, TAPS = 64, 64, 128, 8, 4
SIZES: dict[str, Any] = {
    "heads": HEADS, "head_dim": HEAD_DIM, "state_size": STATE_SIZE, "n_groups": GROUPS, "taps": TAPS,
}  # fmt: skip
CHANNELS = HEADS * HEAD_DIM + 2 * GROUPS * STATE_SIZE
STATE_BYTES = 4 * HEADS * HEAD_DIM * STATE_SIZE + 2 * (TAPS - 1) * CHANNELS
# States that no cache holds: the largest L2 has 128 MB.
ROTATED_BYTES = 512 << 20
ELEMENT = "bfloat16"


def time_step(gpu: Gpu, sequences: int, tokens: int) -> float:
    """Milliseconds of one layer's step of so many sequences with so many new tokens each."""
    case = Case((tokens,) * sequences, (1,) * sequences, **SIZES)
    given, _ = make(case, ELEMENT, slow=True)
    layer = layer_of(case, given, ELEMENT)
    count = max(4, -(-ROTATED_BYTES // (layer.slots * STATE_BYTES)))
    steps = [DeviceMamba(gpu, layer, given) for _ in range(min(count, 64))]
    time = milliseconds(gpu, [step.launch for step in steps])
    for step in steps:
        step.free()
    return time


def peer(sequences: int, tokens: int) -> float | str:
    """Milliseconds of mamba_ssm's kernels for the same scan; a reason where there is none."""
    try:
        import torch
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError as wrong:
        return f"{wrong.name} is not installed"
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    a, d, bias = (-torch.rand(HEADS, device="cuda"), torch.rand(HEADS, device="cuda"), torch.rand(HEADS, device="cuda"))
    if tokens == 1:
        states = [
            torch.randn(sequences, HEADS, HEAD_DIM, STATE_SIZE, device="cuda")
            for _ in range(max(4, -(-ROTATED_BYTES // (sequences * STATE_BYTES))))
        ]
        x = torch.randn(sequences, HEADS, HEAD_DIM, **options)
        dt = torch.randn(sequences, HEADS, 1, **options).expand(-1, -1, HEAD_DIM)
        b, c = (torch.randn(sequences, GROUPS, STATE_SIZE, **options) for _ in range(2))
        wide = (
            a[:, None, None].expand(-1, HEAD_DIM, STATE_SIZE),
            d[:, None].expand(-1, HEAD_DIM),
            bias[:, None].expand(-1, HEAD_DIM),
        )
        calls = [
            lambda state=state: selective_state_update(
                state, x, dt, wide[0], b, c, D=wide[1], dt_bias=wide[2], dt_softplus=True
            )
            for state in states
        ]
    else:
        x = torch.randn(sequences, tokens, HEADS, HEAD_DIM, **options)
        dt = torch.randn(sequences, tokens, HEADS, **options)
        b, c = (torch.randn(sequences, tokens, GROUPS, STATE_SIZE, **options) for _ in range(2))
        calls = [lambda: mamba_chunk_scan_combined(x, dt, a, b, c, chunk_size=128, D=d, dt_bias=bias, dt_softplus=True)]
    return torch_milliseconds(torch, calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder of results.jsonl")
    parser.add_argument("--decode", type=numbers, default=numbers("1,4,16,64"), help="numbers of sequences")
    parser.add_argument("--prefill", type=numbers, default=numbers("64,512,4096"), help="tokens of one sequence")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    if reason := missing():
        raise SystemExit(f"mamba_gpu: {reason}")
    gpu, rows = Gpu(), Rows(options.out)
    bandwidth = copy_bandwidth(gpu)
    rows.add("benchmarks", "copy", PASSED, gb_s=bandwidth)
    print(f"{gpu.driver.name}, compute capability {gpu.driver.capability}, copies at {bandwidth:.0f} GB/s\n")
    print(f"{'sequences':>9} {'tokens':>7} {'us':>9} {'us/token':>9} {'GB/s':>7} {'of copy':>8}  mamba_ssm")
    steps = [(n, 1) for n in options.decode] + [(1, n) for n in options.prefill]
    for sequences, tokens in steps:
        time = time_step(gpu, sequences, tokens)
        moved = 2 * sequences * STATE_BYTES + 2 * sequences * tokens * (3 * CHANNELS + HEADS + HEADS * HEAD_DIM)
        rate = moved / time / 1e6
        other = "left out" if options.no_peers else peer(sequences, tokens)
        rows.add(
            "benchmarks", f"mamba2 sequences={sequences} tokens={tokens}", PASSED, sequences=sequences, tokens=tokens,
            us=1e3 * time, bytes=moved, mamba_ssm_ms=other,
        )  # fmt: skip
        shown = f"{1e3 * other:9.1f} us" if isinstance(other, float) else other
        print(
            f"{sequences:9} {tokens:7} {1e3 * time:9.1f} {1e3 * time / sequences / tokens:9.2f} {rate:7.0f} "
            f"{rate / bandwidth:8.1%}  {shown}",
            flush=True,
        )


if __name__ == "__main__":
    main()
