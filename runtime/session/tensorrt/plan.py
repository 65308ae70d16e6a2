# SPDX-License-Identifier: Apache-2.0
"""A step as executions of the engine: one over all sequences with one new token, and one for each longer chunk."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.engine_format.tensorrt import PROFILES
from adaptive_k_moe.runtime.session.base import Int64Array, StepInput
from adaptive_k_moe.runtime.session.tensorrt.slots import SlotMap

DECODE, PREFILL = PROFILES.index("decode"), PROFILES.index("prefill")

STEP_INPUTS = ("input_ids", "position_ids", "write_indices", "state_slots", "logits_indices", "policy_index")
"""The engine's inputs that come with each step; not every model has them all."""


@dataclass(frozen=True, slots=True)
class Execution:
    """One run of the engine, over B sequences of as many new tokens each.

    Attributes:
        profile: `DECODE` or `PREFILL`.
        place: where the first sequence's caches lie; the others' follow.
        batch: B.
        inputs: the engine's inputs that come with the step, by name.
        rows: [B x S] which of the step's packed tokens they are, in the order of the outputs k and entropy.
        logits_from, logits_to: the rows of its logits that were asked for, and which of the step's they are.
    """

    profile: int
    place: int
    batch: int
    inputs: dict[str, npt.NDArray[Any]]
    rows: Int64Array
    logits_from: Int64Array
    logits_to: Int64Array


def decoding(step: StepInput) -> list[int]:
    """The sequences with one new token: their numbers in the step."""
    return [int(sequence) for sequence in np.flatnonzero(np.diff(step.subsequence_begins) == 1)]


def plan_step(step: StepInput, slots: SlotMap, *, max_chunk: int, max_logits: int) -> list[Execution]:
    """The executions of a step, decode first.

    Args:
        step: the step; the blocks of its `decoding` sequences are gathered at the front already.
        slots: where the sequences lie.
        max_chunk: most tokens of a prefill execution; longer chunks take several.
        max_logits: most rows of logits that a prefill execution gives.
    """
    executions = []
    places = [slots.place(table[0]) for table in step.block_tables]
    single = sorted(decoding(step), key=lambda sequence: places[sequence])
    if single:
        executions.append(_decode(step, single))
    begins = step.subsequence_begins.tolist()
    for sequence, (begin, end) in enumerate(pairwise(begins)):
        if end - begin > 1:
            asked = step.logits_indices[(step.logits_indices >= begin) & (step.logits_indices < end)]
            while begin < end:
                stop = min(begin + max_chunk, end)
                if (asked < stop).sum() > max_logits:
                    stop = int(asked[max_logits])
                executions.append(_prefill(step, sequence, places[sequence], begin, stop))
                asked = asked[asked >= stop]
                begin = stop
    return executions


def _decode(step: StepInput, sequences: list[int]) -> Execution:
    """One token of each of these sequences, which lie at the places from 0 on."""
    rows = step.subsequence_begins[sequences].astype(np.int64)
    batch = len(sequences)
    row_of = np.full(len(step.input_ids), -1, np.int64)
    row_of[rows] = np.arange(batch)
    asked = row_of[step.logits_indices]
    inputs = _inputs(step, rows, 0, batch, step.past_lens[sequences], np.arange(batch))
    return Execution(DECODE, 0, batch, inputs, rows, asked[asked >= 0], np.flatnonzero(asked >= 0))


def _prefill(step: StepInput, sequence: int, place: int, begin: int, end: int) -> Execution:
    """The packed tokens `begin` to `end`, all of one sequence."""
    rows = np.arange(begin, end)
    chosen = np.flatnonzero((step.logits_indices >= begin) & (step.logits_indices < end))
    # The engine gives one row at least.
    asked = step.logits_indices[chosen] - begin if len(chosen) else np.array([end - begin - 1])
    past = step.past_lens[sequence] + begin - step.subsequence_begins[sequence]
    inputs = _inputs(step, rows, place, 1, np.array([past]), asked)
    return Execution(PREFILL, place, 1, inputs, rows, np.arange(len(chosen)), chosen)


def _inputs(
    step: StepInput, rows: Int64Array, place: int, batch: int, past_lens: npt.NDArray[Any], logits_indices: Int64Array
) -> dict[str, npt.NDArray[Any]]:
    return {
        "input_ids": step.input_ids[rows].reshape(batch, -1),
        "position_ids": step.position_ids[rows].reshape(batch, -1),
        "write_indices": past_lens.astype(np.int64),
        "state_slots": np.arange(place, place + batch, dtype=np.int32),
        "logits_indices": logits_indices,
        "policy_index": step.policy_index[rows],
    }
