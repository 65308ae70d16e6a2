# SPDX-License-Identifier: Apache-2.0
"""A session without a model: it tests what is above sessions.

Its logits are a function of the whole history, which it reads back from the KV blocks that it was told
to keep it in. So a wrong block table, position, past length or policy gives other tokens, and a block
that two sequences share by mistake garbles them. With state slots it also sums the history up in each
sequence's slot, as a recurrent layer would, and refuses to go on where the slot holds another sum.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np

from adaptive_k_moe.engine_config import BuildConfig
from adaptive_k_moe.policy import PolicyTables, compile_policies, parse_policy_set
from adaptive_k_moe.runtime.session.base import StepInput, StepOutput

NUM_EXPERTS, TOP_K, NUM_LAYERS = 4, 2, 3
_MODULUS = 1_000_003


def toy_policies(**more: dict[str, Any]) -> PolicyTables:
    """`full`, an entropy policy named `balanced`, `one`, and more."""
    policies = {
        "balanced": {"kind": "entropy", "thresholds": [0.7], "k": [1, 2]},
        "one": {"kind": "fixed", "k": 1},
        **more,
    }
    fitted = parse_policy_set({"policies": policies}, "toy").for_model(
        num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, num_moe_layers=NUM_LAYERS
    )
    return compile_policies(fitted, num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, num_moe_layers=NUM_LAYERS)


def toy_config(
    *,
    vocab_size: int = 50,
    max_batch_size: int = 8,
    max_num_tokens: int = 32,
    max_seq_len: int = 64,
    eos_token_ids: tuple[int, ...] = (0,),
) -> Any:
    """The part of an engine's configuration that `LLM` reads."""
    return SimpleNamespace(
        pretrained_config=SimpleNamespace(
            vocab_size=vocab_size, num_experts_per_tok=TOP_K, eos_token_ids=list(eos_token_ids)
        ),
        build_config=BuildConfig(
            target="onnx", max_batch_size=max_batch_size, max_num_tokens=max_num_tokens, max_seq_len=max_seq_len
        ),
    )


class ToySession:
    """See the module. `fail_on` makes a step that holds this token raise.

    Every token's first k experts are the same ones, so a step reads as many as its greatest k.
    """

    def __init__(
        self, *, vocab_size: int = 50, num_blocks: int = 32, block_size: int = 4, num_state_slots: int = 0
    ) -> None:
        self.vocab_size = vocab_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_state_slots = num_state_slots
        self.num_moe_layers = NUM_LAYERS
        self.fail_on: int | None = None
        self.nan_on: int | None = None
        self.delay = 0.0
        self.closed = 0
        self.knows_reads = True
        self.steps: list[StepInput] = []
        self._cache = np.full((num_blocks, block_size), 777, np.int64)
        self._states = np.full(num_state_slots, 777, np.int64)
        self._frequencies = np.arange(1, vocab_size + 1) * 0.7130481
        self._tables: PolicyTables | None = None

    def set_policies(self, tables: PolicyTables) -> None:
        self._tables = tables

    def close(self) -> None:
        self.closed += 1

    def step(self, step: StepInput) -> StepOutput:
        if self.delay:
            import time

            time.sleep(self.delay)
        assert self._tables is not None
        self.steps.append(step)
        num_tokens = len(step.input_ids)
        assert num_tokens == step.subsequence_begins[-1] == len(step.position_ids) == len(step.policy_index)
        used = [block for table in step.block_tables for block in table]
        assert len(used) == len(set(used)), "two sequences share a block"
        if self.fail_on is not None and self.fail_on in step.input_ids:
            raise RuntimeError("toy failure")
        entropy, k = self._route(step)
        hashes = np.empty(num_tokens, np.int64)
        assert (step.state_slots is None) == (self.num_state_slots == 0)
        if step.state_slots is not None:
            assert len(set(step.state_slots.tolist())) == len(step.block_tables), "two sequences share a slot"
        for s, table in enumerate(step.block_tables):
            begin, end = step.subsequence_begins[s : s + 2]
            past = int(step.past_lens[s])
            total = past + end - begin
            assert step.position_ids[begin:end].tolist() == list(range(past, total))
            assert len(table) * self.block_size >= total
            slots = np.arange(past, total)
            blocks = np.array(table)
            values = (step.input_ids[begin:end] + 1) * 8 + k[begin:end, 0]
            self._cache[blocks[slots // self.block_size], slots % self.block_size] = values
            history = self._cache[blocks].ravel()[:total]
            if step.state_slots is not None:
                slot = step.state_slots[s]
                assert self._states[slot] == history[:past].sum() or past == 0, "the state is another sequence's"
                self._states[slot] = history.sum()
            weights = np.arange(1, total + 1) * 7919 % 10007
            hashes[begin:end] = (np.cumsum(history * weights) % _MODULUS)[past:]
        rows = hashes[step.logits_indices]
        logits = (np.sin(rows[:, None] * self._frequencies) * 4).astype(np.float32)
        if self.nan_on is not None:
            logits[step.input_ids[step.logits_indices] == self.nan_on, 3] = np.nan
        return StepOutput(logits, k, entropy, k.max(axis=0) if self.knows_reads else None)

    def _route(self, step: StepInput) -> tuple[Any, Any]:
        assert self._tables is not None
        layers = np.arange(1, NUM_LAYERS + 1)
        phase = np.sin((step.input_ids * 12.9898 + step.position_ids * 78.233)[:, None] * layers)
        entropy = (np.abs(phase) * math.log(NUM_EXPERTS)).astype(np.float32)
        limits = self._tables.thresholds[:, step.policy_index].transpose(1, 0, 2)  # [T, L, C - 1]
        choice = (entropy[..., None] >= limits).sum(-1)
        values = self._tables.k_values[:, step.policy_index].transpose(1, 0, 2)
        return entropy, np.take_along_axis(values, choice[..., None], -1)[..., 0].astype(np.int32)
