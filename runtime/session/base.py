# SPDX-License-Identifier: Apache-2.0
"""What a session is: one loaded engine that runs one step over packed tokens.

The scheduler, the sampler and everything above know only this interface; OpenVINO's session is in
``openvino.py``, TensorRT's in ``tensorrt/``, torch's in ``torch/``. T is the number of tokens in a step (all
sequences packed one after another), S the number of sequences, N the number of rows whose logits are wanted, L the
number of MoE layers, V the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.engine_config import EngineConfig
from adaptive_k_moe.policy import PolicyTables

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step's packed tokens.

    Attributes:
        input_ids: [T] token ids, sequence after sequence.
        position_ids: [T] each token's position in its own sequence, from 0.
        policy_index: [T] the policy row that each token follows.
        past_lens: [S] tokens of each sequence that are already in the KV cache and the states.
        subsequence_begins: [S + 1] where each sequence's tokens begin in the packed arrays.
        block_tables: S lists of the physical KV blocks of each sequence, in order, enough for its
            past and new tokens.
        state_slots: [S] where each sequence's recurrent states lie, all different; None in a model without
            any. A sequence whose past length is 0 starts from zero states, whatever lies there.
        logits_indices: [N] rows of the packed arrays whose next-token logits are wanted; may be empty
            (a prefill chunk that is not its prompt's last).
    """

    input_ids: Int64Array
    position_ids: Int64Array
    policy_index: Int32Array
    past_lens: Int32Array
    subsequence_begins: Int32Array
    block_tables: list[list[int]]
    state_slots: Int32Array | None
    logits_indices: Int64Array


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step computed; the arrays are the caller's own (not overwritten by the next step).

    Attributes:
        logits: [N, V] float32 logits of the rows asked for.
        k: [T, L] experts that ran for each token in each MoE layer.
        entropy: [T, L] entropy of the router's softmax, in nats.
        reads: [L] experts whose weights the step read in each MoE layer: those that some token ran. A target that
            takes several executions for a step counts an expert once in each. None where the session does not know.
    """

    logits: FloatArray
    k: Int32Array
    entropy: FloatArray
    reads: Int32Array | None = None


class Session(Protocol):
    """A loaded engine. Not thread-safe: one thread calls `step`, `set_policies` and `close`."""

    @property
    def block_size(self) -> int:
        """Tokens that one KV block holds."""

    @property
    def num_blocks(self) -> int:
        """KV blocks that exist; the physical ids are 0 to num_blocks - 1."""

    @property
    def num_state_slots(self) -> int:
        """Sequences whose recurrent states there is room for, in slots 0 to num_state_slots - 1; 0: it has none."""

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits."""

    @property
    def num_moe_layers(self) -> int:
        """L, the width of `StepOutput.k`."""

    def step(self, step: StepInput) -> StepOutput:
        """Run the model once over the packed tokens; their keys and values go into their blocks, states into slots."""

    def set_policies(self, tables: PolicyTables) -> None:
        """Use these policy tables from the next step on; they have to come once before the first."""

    def close(self) -> None:
        """Free the engine; calling it twice is harmless."""


class EngineSession:
    """What a session knows from its engine's configuration alone."""

    _config: EngineConfig

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._config.pretrained_config.vocab_size

    @property
    def num_moe_layers(self) -> int:
        """Width of `StepOutput.k`."""
        return self._config.pretrained_config.num_moe_layers

    @property
    def num_state_slots(self) -> int:
        """Sequences whose recurrent states there is room for: as many as a step may have."""
        return 0 if self._config.pretrained_config.mamba is None else self._config.build_config.max_batch_size
