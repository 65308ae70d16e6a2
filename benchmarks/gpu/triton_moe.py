# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts in Triton, as a peer for the benchmarks: two kernels around torch's sort, all in one graph.

The rows (a token and one of its experts) are sorted by expert. A block multiplies up to `block_m` rows of one expert,
which it gathers, with `block_n` of its neurons; the activation is in the first kernel, the router's weight in the
second. bfloat16, sums in float32. Nothing waits for the device, so a CUDA graph can hold it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Tile:
    """What a block computes, and with how much of the multiprocessor."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def tile_of(rows_per_expert: float) -> Tile:
    """Chosen by the mean number of rows, for Hopper: narrow where weights are streamed, wide where they are reused."""
    if rows_per_expert <= 16:
        return Tile(16, 64, 128, 4, 4)
    if rows_per_expert <= 64:
        return Tile(64, 128, 64, 4, 4)
    return Tile(128, 128, 64, 8, 3)


@triton.jit
def _product(
    x, w, out, order, ends, first_block, scale, columns, neurons, weight_rows, tokens_k,
    GATED: tl.constexpr, UP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr,
    EXPERTS_2: tl.constexpr,
):  # fmt: skip
    """Rows `order[...]` of one expert with its weights [weight_rows, columns].

    Up: reads token `order // tokens_k`, writes activated rows where they are sorted. Down: reads sorted rows, writes
    them, times the router's weight, where `order` says.
    """
    block = tl.program_id(1)
    # The expert of this block: as many experts as begin at or before it, less one.
    experts = tl.arange(0, EXPERTS_2)
    begins = tl.load(first_block + experts, mask=experts < EXPERTS, other=2147483647)
    expert = tl.sum((begins <= block).to(tl.int32), 0) - 1
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    first = begin + (block - tl.load(first_block + expert)) * M
    if first >= end:
        return  # there is room for more blocks than the routing needed
    at = first + tl.arange(0, M)
    live = at < end
    slot = tl.load(order + at, mask=live, other=0)
    source = (slot // tokens_k if UP else at).to(tl.int64)
    n = tl.program_id(0) * N + tl.arange(0, N)
    k = tl.arange(0, K)
    base = w + expert.to(tl.int64) * weight_rows * columns
    x_at = x + source[:, None] * columns + k[None]
    w_at = base + n[None].to(tl.int64) * columns + k[:, None]
    total = tl.zeros((M, N), tl.float32)
    other = tl.zeros((M, N), tl.float32)
    for done in range(0, columns, K):
        inside = k + done < columns
        a = tl.load(x_at + done, mask=live[:, None] & inside[None], other=0.0)
        some = inside[:, None] & (n[None] < neurons)
        total = tl.dot(a, tl.load(w_at + done, mask=some, other=0.0), total)
        if GATED:
            up = tl.load(w_at + done + neurons.to(tl.int64) * columns, mask=some, other=0.0)
            other = tl.dot(a, up, other)
    if UP:
        if GATED:
            total = total * tl.sigmoid(total) * other
        else:
            total = tl.maximum(total, 0.0)
            total = total * total
        target = at
    else:
        total = total * tl.load(scale + slot, mask=live, other=0.0)[:, None]
        target = slot
    to = out + target[:, None].to(tl.int64) * neurons + n[None]
    tl.store(to, total.to(out.dtype.element_ty), mask=live[:, None] & (n[None] < neurons))


def triton_moe(x: Any, up: Any, down: Any, weights: Any, chosen: Any, *, gated: bool) -> Any:
    """The layer's output [T, H].

    Args:
        x: [T, H] bfloat16.
        up: [E, 2I, H] with the gates first, or [E, I, H].
        down: [E, H, I].
        weights: [T, k] float32, of the router.
        chosen: [T, k], the experts.
        gated: silu(gate) * up; else a squared ReLU.
    """
    experts, hidden, intermediate = down.shape
    tokens, k = chosen.shape
    rows = tokens * k
    tile = tile_of(rows / experts)
    by_expert, order = chosen.flatten().sort(stable=True)
    order = order.to(torch.int32)
    numbers = torch.arange(experts, device=x.device, dtype=by_expert.dtype)
    ends = torch.searchsorted(by_expert, numbers, right=True).to(torch.int32)
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    blocks = (counts + tile.m - 1) // tile.m
    first_block = (blocks.cumsum(0) - blocks).to(torch.int32)
    most_blocks = min(rows, experts + rows // tile.m)
    h = torch.empty(rows, intermediate, device=x.device, dtype=x.dtype)
    y = torch.empty(rows, hidden, device=x.device, dtype=x.dtype)
    common = {"M": tile.m, "N": tile.n, "K": tile.k, "num_warps": tile.warps, "num_stages": tile.stages}
    common.update(EXPERTS=experts, EXPERTS_2=triton.next_power_of_2(experts))
    flat = weights.flatten().contiguous()
    for source, weight, out, is_up in ((x, up, h, True), (h, down, y, False)):
        neurons, columns = out.shape[1], source.shape[1]
        _product[(triton.cdiv(neurons, tile.n), most_blocks)](
            source, weight, out, order, ends, first_block, flat, columns, neurons, weight.shape[1], k,
            GATED=is_up and gated, UP=is_up, **common,
        )  # fmt: skip
    return y.view(tokens, k, hidden).sum(1)
