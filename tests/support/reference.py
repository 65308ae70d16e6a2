# SPDX-License-Identifier: Apache-2.0
"""Answers of an engine against `transformers` in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
import transformers

NUM_TOKENS = 64
"""Length of the answers."""


def has_bfloat16() -> bool:
    """Whether OpenVINO has products in bfloat16 on this processor."""
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def reference_model(checkpoint: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The checkpoint's model, with other values of some of its config's fields."""
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, **changes).eval()


def logits_of(model: Any, tokens: list[int]) -> Any:
    """Logits [tokens, vocabulary], in float32."""
    with torch.no_grad():
        # At once and without a cache: with one, Nemotron's step of a single token forgets the limit of the step sizes.
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


def assert_is_the_references(model: Any, prompt: list[int], output: Any) -> None:
    """The prompt's logits, and every token of the answer as the argmax after those before it."""
    answer = output.outputs[0].token_ids
    assert len(answer) == NUM_TOKENS
    logits = logits_of(model, prompt + answer)
    reference = logits[: len(prompt)].numpy()
    assert output.context_logits.shape == reference.shape
    assert np.abs(output.context_logits - reference).max() <= 1e-4 * np.abs(reference).max()
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def assert_is_the_references_with_bfloat16_weights(checkpoint: Path, prompt: list[int], output: Any) -> None:
    """As in float32; where the processor has bfloat16, as near to that as `transformers` is in bfloat16."""
    model = reference_model(checkpoint)
    if not has_bfloat16():
        assert_is_the_references(model, prompt, output)
        return
    answer = output.outputs[0].token_ids
    assert len(answer) == NUM_TOKENS
    logits = logits_of(model, prompt + answer)
    # Experts one by one: torch's grouped products refuse bfloat16 rows that are not a multiple of 16 bytes.
    half = logits_of(reference_model(checkpoint, torch.bfloat16, experts_implementation="eager"), prompt + answer)
    error = np.square(output.context_logits - logits[: len(prompt)].numpy()).mean() ** 0.5
    bound = float((half - logits)[: len(prompt)].square().mean()) ** 0.5
    assert 0 < error < 1.1 * bound
    # Each token of the answer is the argmax of logits no farther off than those of transformers.
    choosing = logits[len(prompt) - 1 : -1]
    behind = choosing.max(-1).values - choosing[range(NUM_TOKENS), answer]
    assert float(behind.max()) <= 2 * float((half - logits).abs().max())
