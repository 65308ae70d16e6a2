# SPDX-License-Identifier: Apache-2.0
"""Steps of decode in few shapes, so that each is captured as a CUDA graph once and replayed.

A step of sequences with a new token each is padded to one of a few sizes, and its block tables to one of a few widths.
All inputs of such a step are rows of one int32 matrix at a fixed address: token, position, policy row, state slot,
block table. Idle rows follow a policy row for which no expert is read, have no state slot, and write to a block that
is nobody's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from adaptive_k_moe.policy import KIND_SHARED_PRICE, PolicyTables
from adaptive_k_moe.runtime.session.base import StepInput

TOKEN, POSITION, POLICY, SLOT, TABLE = range(5)
"""Columns of a row; the block table takes the rest."""

# Fewer blocks are not worth a graph of their own.
_LEAST_BLOCKS = 16

Run = Callable[[Any], Any]
"""Runs a padded step on its matrix of inputs, on the device, with nothing that waits for it or looks into it."""


def with_idle_row(tables: PolicyTables) -> tuple[Any, Any, Any]:
    """`policy_kind`, `thresholds` and `k_values` with one row more, for which no expert is read.

    It shares, at an infinite price: its tokens run an expert that others have read, or none.
    """
    layers, _, choices = tables.k_values.shape
    return (
        np.append(tables.policy_kind, np.int32(KIND_SHARED_PRICE)),
        np.concatenate([tables.thresholds, np.full((layers, 1, choices - 1), np.inf, np.float32)], axis=1),
        np.concatenate([tables.k_values, np.zeros((layers, 1, choices), np.int32)], axis=1),
    )


def padded(size: int, largest: int) -> int:
    """The rows that a step of `size` sequences is padded to: a power of two or, from 8 on, a multiple of 8."""
    rows = 1 << (size - 1).bit_length() if size < 8 else -(-size // 8) * 8
    return min(rows, largest)


class DecodeRunner:
    """Runs steps of decode by replaying them.

    A shape's first step runs as any other does, which also loads kernels and lets libraries choose theirs; the second
    is captured. Where there are no CUDA graphs every step runs, on the same padded inputs.

    Args:
        run: the model.
        device: where.
        max_batch_size: most sequences in a step.
        max_blocks: most blocks of a sequence.
        idle_block: the block that idle rows write to.
    """

    def __init__(self, run: Run, device: Any, max_batch_size: int, max_blocks: int, idle_block: int) -> None:
        self._run, self._device = run, device
        self._max_batch_size, self._max_blocks = max_batch_size, max_blocks
        self._idle_block, self._idle_policy = idle_block, 0
        self._inputs: dict[tuple[int, int], tuple[Any, Any]] = {}
        self._graphs: dict[tuple[int, int], Callable[[], Any]] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def forget(self, idle_policy: int) -> None:
        """Drop the graphs, as the policies' tables have other addresses now; idle rows follow this row of theirs."""
        self._graphs.clear()
        self._idle_policy = idle_policy

    def run(self, step: StepInput) -> Any:
        """What the model gives for a step of decode, its first rows first; overwritten by the next step."""
        longest = max(map(len, step.block_tables))
        blocks = min(max(_LEAST_BLOCKS, 1 << (longest - 1).bit_length()), self._max_blocks)
        shape = padded(len(step.block_tables), self._max_batch_size), blocks
        first = shape not in self._inputs
        if first:
            host = torch.empty(shape[0], TABLE + blocks, dtype=torch.int32, pin_memory=self._pool is not None)
            self._inputs[shape] = host, host.to(self._device, copy=True)
        host, inputs = self._inputs[shape]
        self._fill(host.numpy(), step)
        inputs.copy_(host)
        if first:
            return self._run(inputs)
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(inputs)
        return self._graphs[shape]()

    def _fill(self, rows: Any, step: StepInput) -> None:
        count = len(step.block_tables)
        rows[:, [TOKEN, POSITION]] = 0
        rows[:, POLICY], rows[:, SLOT], rows[:, TABLE:] = self._idle_policy, -1, self._idle_block
        rows[:count, TOKEN], rows[:count, POSITION] = step.input_ids, step.position_ids
        rows[:count, POLICY] = step.policy_index
        if step.state_slots is not None:
            rows[:count, SLOT] = step.state_slots
        for row, table in zip(rows, step.block_tables, strict=False):
            row[TABLE : TABLE + len(table)] = table

    def _capture(self, inputs: Any) -> Callable[[], Any]:
        if self._pool is None:
            return lambda: self._run(inputs)
        graph = torch.cuda.CUDAGraph()
        # Other threads may ask the device for counters meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = self._run(inputs)

        def replay() -> Any:
            graph.replay()
            return outputs

        return replay
