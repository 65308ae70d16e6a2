# SPDX-License-Identifier: Apache-2.0
"""The worked example of ``docs/adding_a_model.md``: its code, as it stands there, against `transformers`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_builder.models import ARCHITECTURES
from adaptive_k_moe.runtime import LLM, SamplingParams

from checkpoints import FAMILIES, REPOSITORY, Shape, make_checkpoint

DOCUMENT = REPOSITORY / "docs" / "adding_a_model.md"


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    namespace: dict[str, Any] = {"__name__": "adaptive_k_moe.engine_builder.models.flex_olmo"}
    exec(compile(code, str(DOCUMENT), "exec"), namespace)
    monkeypatch.setitem(ARCHITECTURES, "FlexOlmoForCausalLM", namespace["FlexOlmo"])
    (family,) = re.findall(r'^    "flex_olmo": (\(.*\)),$', text, re.MULTILINE)
    monkeypatch.setitem(FAMILIES, "flex_olmo", eval(family))


@pytest.mark.parametrize(
    "changes", [{}, {"attention_bias": True, "num_key_value_heads": 1, "norm_topk_prob": True}], ids=["plain", "bias"]
)
@pytest.mark.usefixtures("documented")
def test_the_documented_architecture_equals_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Shape("documented", changes, "flex_olmo"))
    build(checkpoint, tmp_path / "engine", max_num_tokens=16, max_batch_size=2)
    prompt = np.random.default_rng(0).integers(3, 101, 40).tolist()
    sampling = SamplingParams(max_tokens=32, end_id=-1, return_context_logits=True)
    with LLM(tmp_path / "engine", skip_tokenizer_init=True) as llm:
        output = llm.generate(prompt, sampling)
    answer = output.outputs[0].token_ids
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].numpy()
    reference = logits[: len(prompt)]
    assert np.abs(output.context_logits - reference).max() <= 1e-4 * np.abs(reference).max()
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
