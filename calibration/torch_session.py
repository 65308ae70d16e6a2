# SPDX-License-Identifier: Apache-2.0
"""A checkpoint opened by `transformers`, with the operator in it, where an evaluator takes an engine.

Windows are read on a device of torch, so that a model is calibrated where there is a GPU and no engine for it. Only
what an evaluator asks for is there: equal pieces of several sequences, each step going on where the last one ended.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptive_k_moe.calibration.engines import checkpoint_fingerprint
from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.calibration.evaluator import Evaluator
from adaptive_k_moe.calibration.hooks import open_model
from adaptive_k_moe.engine_config import ENGINE_VERSION, BuildConfig, EngineConfig, FileEntry
from adaptive_k_moe.policy import PolicySet, PolicyTables
from adaptive_k_moe.runtime.session import StepInput, StepOutput

if TYPE_CHECKING:
    from adaptive_k_moe.torch import Adapted

LONGEST = 512
"""Tokens of a window and of a decoded sequence at most."""

MOST_SEQUENCES = 64
MOST_TOKENS = 2048
"""Of a step; its logits over a large vocabulary take a gigabyte."""


class TorchSession:
    """See `Session`; a sequence has one block, and its keys, values and states lie in the model's own cache.

    Args:
        model: of `transformers`.
        adapted: what `adapt` made of it.
    """

    block_size = LONGEST
    num_blocks = MOST_SEQUENCES
    num_state_slots = 0

    def __init__(self, model: Any, adapted: Adapted) -> None:
        self._model = model
        self._adapted = adapted
        self.vocab_size = adapted.config.vocab_size
        self.num_moe_layers = adapted.config.num_moe_layers
        self._cache: Any = None
        self._read = (0, 0)  # sequences and tokens of each that the cache holds

    def set_policies(self, tables: PolicyTables) -> None:
        """See `Session`."""
        self._adapted.set_policies(tables)

    def step(self, step: StepInput) -> StepOutput:
        """See `Session`.

        Raises:
            CalibrationError: the sequences are not those of the last step, or of different lengths.
        """
        import torch

        count, past = len(step.past_lens), int(step.past_lens[0])
        shape = (count, len(step.input_ids) // count)
        if len(set(step.past_lens)) > 1 or len(set(np.diff(step.subsequence_begins))) > 1:
            raise CalibrationError("a step on torch takes sequences of one length.")
        if past == 0:
            self._cache = None
        elif self._read != (count, past):
            raise CalibrationError("a step on torch goes on where the last one ended.")
        device = self._model.device
        self._adapted.policy_index = torch.from_numpy(step.policy_index.reshape(shape)).to(device)
        with torch.no_grad():
            output = self._model(
                input_ids=torch.from_numpy(step.input_ids.reshape(shape)).to(device),
                past_key_values=self._cache,
                use_cache=True,
            )
        self._cache, self._read = output.past_key_values, (count, past + shape[1])
        seen = self._adapted.steps[-1]
        wanted = torch.from_numpy(step.logits_indices).to(device)
        return StepOutput(
            logits=output.logits.reshape(-1, self.vocab_size)[wanted].float().cpu().numpy(),
            k=seen.k.reshape(-1, self.num_moe_layers).cpu().numpy(),
            entropy=seen.entropy.reshape(-1, self.num_moe_layers).cpu().numpy(),
            reads=seen.reads.to(torch.int32).cpu().numpy(),
        )

    def close(self) -> None:
        """See `Session`; the model stays open."""
        self._cache = None


class CheckpointEvaluator(Evaluator):
    """An evaluator of a checkpoint, with no engine.

    Args:
        checkpoint_dir: Hugging Face checkpoint of a family that engines are built of.
        device: "cpu" (in float32) or "cuda" (in the checkpoint's own type).
        policies: to evaluate.

    Raises:
        DependencyError: torch or transformers is not installed.
        DeviceError: there is no such device.
        CalibrationError: `transformers` cannot open the checkpoint.
    """

    def __init__(self, checkpoint_dir: Path, device: str, *, policies: PolicySet | None = None) -> None:
        from adaptive_k_moe.runtime.tokenizer import Tokenizer

        model = open_model(checkpoint_dir, device)
        from adaptive_k_moe.torch import adapt

        adapted = adapt(model)
        self.tokenizer = Tokenizer.from_dir(checkpoint_dir)
        self.config = EngineConfig(
            version=ENGINE_VERSION,
            pretrained_config=adapted.config,
            build_config=BuildConfig(
                target="torch",
                max_batch_size=MOST_SEQUENCES,
                max_seq_len=min(LONGEST, adapted.config.max_position_embeddings),
                max_num_tokens=MOST_TOKENS,
            ),
            adaptive_k=policies or PolicySet(),
            # What recordings and scores are known by.
            files={f"{device} {model.dtype}": FileEntry(size=0, sha256=checkpoint_fingerprint(checkpoint_dir))},
        )
        self.expert_norms = self.config.adaptive_k.expert_norms
        self._session = TorchSession(model, adapted)
