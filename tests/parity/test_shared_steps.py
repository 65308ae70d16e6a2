# SPDX-License-Identifier: Apache-2.0
"""Rules by phase and rules that see the whole step, in real engines: what is read, and what others never notice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.policy import PolicySet
from adaptive_k_moe.runtime import LLM, SamplingParams
from adaptive_k_moe.runtime.session.base import StepInput, StepOutput

from checkpoints import REPOSITORY

OLMOE = REPOSITORY / "examples" / "models" / "olmoe-small"
POLICIES: dict[str, Any] = {
    "dear": {
        "kind": "phases",
        "prefill": {"kind": "fixed", "k": 8},
        "decode": {"kind": "shared", "price": 0.05, "k_min": 1},
    },
    "own_first": {"kind": "shared", "experts": 0, "k_min": 1},
    "split": {"kind": "phases", "prefill": {"kind": "fixed", "k": 3}, "decode": {"kind": "fixed", "k": 5}},
}
PROMPTS = ["And it came to pass", "The file object is", "He said unto them", "import os"]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    engine = tmp_path_factory.mktemp("shared") / "engine"
    policies = PolicySet.model_validate({"policies": POLICIES})
    build(OLMOE, engine, policy=policies, dtype="float32", max_seq_len=128, max_batch_size=8)
    with LLM(engine) as found:
        yield found


def steps_of(llm: LLM, monkeypatch: pytest.MonkeyPatch, policies: list[str]) -> tuple[list[Any], list[Any]]:
    """Requests of these policies at once: their outputs, and each step with what it read."""
    seen: list[tuple[StepInput, StepOutput]] = []
    session = llm._engine._session
    step = session.step
    monkeypatch.setattr(session, "step", lambda asked: seen.append((asked, step(asked))) or seen[-1][1])
    params = [SamplingParams(max_tokens=12, end_id=-1, adaptive_k_policy=policy) for policy in policies]
    outputs = llm.generate([PROMPTS[i % len(PROMPTS)] for i in range(len(policies))], params)
    monkeypatch.undo()
    return outputs, seen


def test_a_token_follows_the_rule_of_its_phase(llm: LLM) -> None:
    [output] = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=6, end_id=-1, adaptive_k_policy="split"))
    assert (output.prompt_k == 3).all()
    assert (output.outputs[0].k[0] == 3).all()  # the pass that reads the prompt's last token
    assert (output.outputs[0].k[1:] == 5).all()


def test_sharing_reads_fewer_experts_and_leaves_the_prompt_as_it_was(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    _, full = steps_of(llm, monkeypatch, ["full"] * 4)
    outputs, shared = steps_of(llm, monkeypatch, ["dear"] * 4)
    decode = [[out.reads.mean() for asked, out in steps if len(asked.input_ids) == 4] for steps in (full, shared)]
    assert np.mean(decode[1]) < 0.7 * np.mean(decode[0])
    assert all((output.prompt_k == 8).all() for output in outputs)
    for asked, out in shared:  # nobody runs more kinds of experts than are read
        assert (out.k <= out.reads).all() or len(asked.input_ids) != 4


def test_reads_are_the_union_of_the_tokens_experts(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    _, steps = steps_of(llm, monkeypatch, ["own_first"] * 4)
    for asked, out in steps:
        if len(asked.input_ids) == 4:
            assert (out.reads <= 4).all() and (out.reads >= 1).all()
            np.testing.assert_array_equal(out.k, np.broadcast_to(out.reads, out.k.shape))  # each runs all that is read
    [(_, alone), *_] = steps_of(llm, monkeypatch, ["full"])[1][1:]
    assert (alone.reads == 8).all()


def test_requests_that_do_not_share_are_as_among_themselves(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same k, entropies and tokens, whoever shares beside them; how OpenVINO rounds depends on the rows alone."""
    mixed, _ = steps_of(llm, monkeypatch, ["full", "own_first", "full", "dear"])
    plain, _ = steps_of(llm, monkeypatch, ["full"] * 4)
    for i in (0, 2):
        assert mixed[i].outputs[0].token_ids == plain[i].outputs[0].token_ids
        np.testing.assert_array_equal(mixed[i].outputs[0].k, plain[i].outputs[0].k)
        np.testing.assert_allclose(mixed[i].outputs[0].entropy, plain[i].outputs[0].entropy, atol=1e-5)
