# SPDX-License-Identifier: Apache-2.0
"""An engine has room for the experts that its policies may name, and refuses a policy that names more."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from adaptive_k_moe.cli import main
from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_config import read_engine_config
from adaptive_k_moe.errors import PolicyError
from adaptive_k_moe.policy import PolicySet
from adaptive_k_moe.runtime import LLM, SamplingParams

from checkpoints import Shape, make_checkpoint

TOP_K, EXPERTS = 3, 7
MORE = {"allow_above_top_k": True, "policies": {"more": {"kind": "fixed", "k": 5}, "p": {"kind": "top_p", "p": 0.9}}}
SENTENCE = (
    "policy 'most' asks for k = 6, but this engine was built to run at most 5 experts for a token: build it again"
)


def build_engine(directory: Path, policies: dict[str, Any]) -> Path:
    checkpoint = make_checkpoint(directory / "checkpoint", Shape("plain", {}, "qwen2_moe"))
    build(checkpoint, directory / "engine", policy=PolicySet.model_validate(policies), max_seq_len=64)
    return directory / "engine"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(tmp_path_factory.mktemp("more"), MORE)


def operators(engine: Path) -> set[int]:
    """`max_k` of the operators in an engine."""
    return {int(k) for k in re.findall(r'max_k="(\d+)"', (engine / "rank0.xml").read_text())}


def with_policy(engine: Path, name: str, k: int) -> str:
    """Write a policy into an engine's ``config.json`` by hand; what was there."""
    before = (engine / "config.json").read_text()
    content = json.loads(before)
    content["adaptive_k"]["policies"][name] = {"kind": "fixed", "k": k}
    (engine / "config.json").write_text(json.dumps(content))
    return before


def test_without_policies_an_engine_has_room_for_the_trained_top_k(tmp_path: Path) -> None:
    engine = build_engine(tmp_path, {"policies": {"one": {"kind": "fixed", "k": 1}}})
    assert read_engine_config(engine).build_config.max_k == TOP_K
    assert operators(engine) == {TOP_K}


def test_a_policy_that_may_run_more_makes_room_for_it(engine: Path) -> None:
    assert read_engine_config(engine).build_config.max_k == 5
    assert operators(engine) == {5}
    with LLM(engine, skip_tokenizer_init=True) as llm:
        assert llm.generate([5, 6], SamplingParams(max_tokens=2, adaptive_k_policy="more")).avg_k == 5
        # Without a k_max, a policy goes up to the trained top-k and no further.
        assert llm.policies.k_values[0, llm.policies.index("p")].max() == TOP_K


def test_a_policy_beyond_the_room_is_refused_wherever_it_comes_from(
    engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_it = ["policy", "set", "--engine_dir", str(engine), "--name", "most", "--kind", "fixed", "--k", "6"]
    before = (engine / "config.json").read_text()
    assert main(set_it) == 1
    assert SENTENCE in capsys.readouterr().err
    assert (engine / "config.json").read_text() == before
    with LLM(engine, skip_tokenizer_init=True) as llm:
        with_policy(engine, "most", 6)
        try:
            with pytest.raises(PolicyError, match=SENTENCE):
                llm.reload_policies()
            assert llm.generate([5], SamplingParams(max_tokens=1, adaptive_k_policy="more")).avg_k == 5
            with pytest.raises(PolicyError, match="'most' is not one of this engine's policies"):
                llm.generate([5], SamplingParams(adaptive_k_policy="most"))
            with pytest.raises(PolicyError, match=SENTENCE):
                LLM(engine, skip_tokenizer_init=True)
        finally:
            (engine / "config.json").write_text(before)


def test_an_engine_of_an_earlier_release_has_room_for_all_experts(engine: Path) -> None:
    """Its config says nothing, and its operators were built for min(experts, 32)."""
    before = with_policy(engine, "all", EXPERTS)
    try:
        content = json.loads((engine / "config.json").read_text())
        del content["build_config"]["max_k"]
        (engine / "config.json").write_text(json.dumps(content))
        config = read_engine_config(engine)
        assert config.build_config.capacity(config.pretrained_config) == EXPERTS
        assert config.policy_tables().k_values.max() == EXPERTS
    finally:
        (engine / "config.json").write_text(before)
