# SPDX-License-Identifier: Apache-2.0
"""The trained models in the repository: what their cards and policies say, and their answers against `transformers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_config import Target
from adaptive_k_moe.policy import PolicySet, read_policy_file
from adaptive_k_moe.runtime import LLM, SamplingParams

from checkpoints import BUNDLED_MODELS, REPOSITORY
from reference import NUM_TOKENS, assert_is_the_references, reference_model

PROMPTS = ["And it came to pass in those days, that the king", "The following example shows how to", "a"]


@pytest.fixture(scope="module", params=BUNDLED_MODELS, ids=lambda path: path.name)
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def facts_of(checkpoint: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((checkpoint / "training.json").read_text())
    return facts


@pytest.mark.parametrize("target", ["openvino", "torch"])
def test_logits_and_greedy_tokens_at_each_k(checkpoint: Path, target: Target, tmp_path: Path) -> None:
    top_k = facts_of(checkpoint)["model"]["top_k"]
    lower = {f"k{k}": {"kind": "fixed", "k": k} for k in range(1, top_k)}
    build(
        checkpoint,
        tmp_path / "engine",
        target=target,
        policy=PolicySet.model_validate({"policies": lower}),
        dtype="float32",
        max_num_tokens=48,
        max_seq_len=256,
    )
    with LLM(tmp_path / "engine") as llm:
        for k, name in [(top_k, "full"), (1, "k1"), (top_k - 1, f"k{top_k - 1}")]:
            sampling = SamplingParams(
                max_tokens=NUM_TOKENS, end_id=-1, return_context_logits=True, adaptive_k_policy=name
            )
            outputs = llm.generate(PROMPTS, sampling)
            model = reference_model(checkpoint, num_experts_per_tok=k)
            for output in outputs:
                assert_is_the_references(model, output.prompt_token_ids, output)
                assert (output.outputs[0].k == k).all()


def test_the_policies_fit_the_model(checkpoint: Path) -> None:
    facts = facts_of(checkpoint)
    policies = read_policy_file(REPOSITORY / "examples" / "policies" / f"{checkpoint.name}.json")
    assert {"balanced", "fast"} <= set(policies.policies)
    fitted = policies.for_model(
        num_experts=facts["model"]["experts"],
        num_experts_per_tok=facts["model"]["top_k"],
        num_moe_layers=len(facts["routers"]),
    )
    assert fitted.default == "balanced"


def test_no_expert_was_left_without_work(checkpoint: Path) -> None:
    """What the card says of the routers: each expert is chosen, and no router is certain of all or of nothing."""
    facts = facts_of(checkpoint)
    experts = facts["model"]["experts"]
    for row in facts["routers"]:
        assert len(row["expert_load"]) == experts
        assert sum(row["expert_load"]) == pytest.approx(1, abs=1e-3 * experts)
        assert min(row["expert_load"]) > 0
        assert 0.05 * np.log(experts) < row["entropy_mean"] < 0.99 * np.log(experts)


def test_they_are_small() -> None:
    sizes = {model.name: sum(file.stat().st_size for file in model.iterdir()) for model in BUNDLED_MODELS}
    assert sizes.pop("mixtral-small") <= 16e6
    assert sum(sizes.values()) <= 24e6
