# SPDX-License-Identifier: Apache-2.0
"""What is in the next step: in-flight batching with chunked prefill over a paged KV cache and state slots."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from adaptive_k_moe.runtime.block_manager import BlockManager
from adaptive_k_moe.runtime.sequence import Sequence
from adaptive_k_moe.runtime.state_slots import StateSlots

# Tokens of the background in a step: what a request that comes in this moment waits for.
_BACKGROUND_TOKENS = 64
# Where requests never pause, one step in so many goes to the background, with so many tokens.
_STEPS_BETWEEN, _TOKENS_BETWEEN = 200, 16


class ScheduledChunk(NamedTuple):
    """The next `num_tokens` tokens of a sequence that a step computes: one in decode, more in prefill."""

    sequence: Sequence
    num_tokens: int


class Scheduler:
    """First come, first served.

    Sequences wait until a place in the batch, a state slot if the model needs one, and the blocks for all
    their tokens are free, and then run until they end. `running` and `waiting` are in order of arrival and
    every running sequence is older than every waiting one, so the oldest always advances and nobody starves.

    Sequences of the background run in steps in which nobody else has anything to compute, one at a time, and
    give up what they hold as soon as another needs it. While others never pause, a small step in between goes
    to the background now and then, but none that would make a request wait for a second one.

    Args:
        block_manager: the KV cache's blocks.
        state_slots: the recurrent states' slots.
        max_batch_size: most sequences that run at a time.
        max_num_tokens: most tokens in a step.
    """

    def __init__(
        self, block_manager: BlockManager, state_slots: StateSlots, *, max_batch_size: int, max_num_tokens: int
    ) -> None:
        self.block_manager = block_manager
        self.state_slots = state_slots
        self.max_batch_size = max_batch_size
        self.max_num_tokens = max_num_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.background: deque[Sequence] = deque()
        self._steps_since_background = 1
        self.preemptions_total = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        (self.background if sequence.request.background else self.waiting).append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Drop a sequence that ended or was cancelled; what it holds is free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.background:
            self.background.remove(sequence)
        self._release(sequence)

    def schedule(self) -> list[ScheduledChunk]:
        """The next step: decode tokens of the running, then prefill of the running, then of the waiting."""
        if not self.running and not self.waiting:
            return self._background_chunk(_BACKGROUND_TOKENS)
        if not self._steps_since_background:  # they waited for the step before this one
            self._note_delay()
        if self._background_is_due():
            return self._background_chunk(_TOKENS_BETWEEN)
        self._steps_since_background += 1
        chunks: list[ScheduledChunk] = []
        budget = self.max_num_tokens

        for sequence in [s for s in self.running if s.num_uncomputed == 1]:
            if budget == 0:
                break
            if self._has_block(sequence):
                chunks.append(ScheduledChunk(sequence, 1))
                budget -= 1

        for sequence in self.running:
            if budget > 0 and sequence.num_uncomputed > 1:
                num_tokens = min(budget, sequence.num_uncomputed)
                chunks.append(ScheduledChunk(sequence, num_tokens))
                budget -= num_tokens

        # One preempted just now is first in this queue, and cannot come back: it lacks the block it gave up.
        while self.waiting and budget > 0 and len(self.running) < self.max_batch_size and self._has_slot():
            sequence = self.waiting[0]
            if not self._grow(sequence, len(sequence.token_ids)):
                break
            sequence.state_slot = self.state_slots.acquire()
            self.running.append(self.waiting.popleft())
            num_tokens = min(budget, sequence.num_uncomputed)
            chunks.append(ScheduledChunk(sequence, num_tokens))
            budget -= num_tokens
        return chunks

    def _has_block(self, sequence: Sequence) -> bool:
        """Make sure of a block for the next token, at the expense of the youngest; False if that is itself.

        Called from the oldest to the youngest, so a victim is never in the step already. Whoever runs owns
        a block, so an empty table means that the sequence was a victim itself.
        """
        while sequence.block_table:
            if self._grow(sequence, sequence.num_computed + 1):
                return True
            self._preempt(self.running[-1])
        return False

    def _preempt(self, sequence: Sequence) -> None:
        """Take what a sequence holds; it is first in the queue and will compute its tokens again."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_computed = 0
        sequence.request.metrics.num_preemptions += 1
        self.waiting.appendleft(sequence)
        self.preemptions_total += 1

    def _background_chunk(self, num_tokens: int) -> list[ScheduledChunk]:
        """A small part of the oldest sequence of the background; everything that it needs is free."""
        if not self.background:
            return []
        self._steps_since_background = 0
        sequence = self.background[0]
        self.block_manager.grow(sequence.block_table, len(sequence.token_ids))
        if sequence.state_slot is None:
            sequence.state_slot = self.state_slots.acquire()
        return [ScheduledChunk(sequence, min(num_tokens, self.max_num_tokens, sequence.num_uncomputed))]

    def _background_is_due(self) -> bool:
        """Whether the background gets the next step although others have something to compute."""
        if not self.background or self._steps_since_background < _STEPS_BETWEEN:
            return False
        sequence = self.background[0]
        missing = self.block_manager.blocks_for(len(sequence.token_ids)) - len(sequence.block_table)
        if missing > self.block_manager.num_free or not (sequence.block_table or self.state_slots.available):
            return False
        return not any(other.request.delayed for queue in (self.running, self.waiting) for other in queue)

    def _note_delay(self) -> None:
        for queue in (self.running, self.waiting):
            for sequence in queue:
                sequence.request.delayed = True

    def _has_slot(self) -> bool:
        return self.state_slots.available or self._take_from_background()

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for a sequence's first tokens, at the expense of the background; False if there are too few."""
        grow, table = self.block_manager.grow, sequence.block_table
        held = len(table)
        grown = grow(table, num_tokens) or (self._take_from_background() and grow(table, num_tokens))
        sequence.request.metrics.num_kv_blocks += len(table) - held
        return grown

    def _take_from_background(self) -> bool:
        """Take what the background holds, which it will compute again; whether it held anything."""
        holder = next((sequence for sequence in self.background if sequence.block_table), None)
        if holder is None:
            return False
        self._release(holder)
        holder.num_computed = 0
        return True

    def _release(self, sequence: Sequence) -> None:
        self.block_manager.release(sequence.block_table)
        self.state_slots.release(sequence.state_slot)
        sequence.state_slot = None
