# SPDX-License-Identifier: Apache-2.0
"""Answers of an engine against `transformers` in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

NUM_TOKENS = 64
"""Length of the answers."""


def reference_model(checkpoint: Path, **changes: Any) -> Any:
    """The checkpoint's model, with other values of some of its config's fields."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, **changes)
    return model.eval()


def assert_is_the_references(model: Any, prompt: list[int], output: Any) -> None:
    """The prompt's logits, and every token of the answer as the argmax after those before it."""
    answer = output.outputs[0].token_ids
    assert len(answer) == NUM_TOKENS
    with torch.no_grad():
        # At once and without a cache: with one, Nemotron's step of a single token forgets the limit of the step sizes.
        logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0]
    reference = logits[: len(prompt)].numpy()
    assert output.context_logits.shape == reference.shape
    assert np.abs(output.context_logits - reference).max() <= 1e-4 * np.abs(reference).max()
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
