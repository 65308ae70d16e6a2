# SPDX-License-Identifier: Apache-2.0
"""`max_input_len`: what a build makes of it, and that a longer prompt is refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_session import ToySession, toy_policies

from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_config import BuildConfig, read_engine_config
from adaptive_k_moe.errors import BuildError, RequestError
from adaptive_k_moe.runtime import LLM, SamplingParams
from adaptive_k_moe.runtime.engine import Engine, EngineLimits
from adaptive_k_moe.runtime.perplexity import measure_perplexity
from adaptive_k_moe.runtime.sequence import RunOptions

from checkpoints import make_mixtral

PARAMS = SamplingParams(max_tokens=4, end_id=-1)


def test_a_prompt_may_have_so_many_tokens_and_no_more() -> None:
    limits = EngineLimits(max_batch_size=4, max_num_tokens=32, max_seq_len=64, max_input_len=5)
    engine = Engine(ToySession(), toy_policies(), limits, tokenizer=None, eos_token_ids=[0], full_k=2)
    with pytest.raises(RequestError, match="6 tokens, but max_input_len is 5 here: shorten"):
        engine.prepare([1] * 6, PARAMS, RunOptions("long"))
    engine.add(engine.prepare([1] * 5, SamplingParams(max_tokens=59, end_id=-1), RunOptions("fits")))
    ended = [output for _ in range(80) for output in engine.step() if output.finished]
    assert [len(output.outputs[0].token_ids) for output in ended] == [59]


def test_a_prompt_with_its_answer_may_be_scored_in_the_background() -> None:
    limits = EngineLimits(max_batch_size=4, max_num_tokens=32, max_seq_len=64, max_input_len=5)
    engine = Engine(ToySession(), toy_policies(), limits, tokenizer=None, eos_token_ids=[0], full_k=2)
    engine.prepare([1] * 63, PARAMS, RunOptions("scored", background=True))
    with pytest.raises(RequestError, match="max_seq_len is 64"):
        engine.prepare([1] * 64, PARAMS, RunOptions("longer", background=True))


def test_a_built_engine_keeps_to_it(tmp_path: Path) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint")
    build(checkpoint, tmp_path / "engine", max_input_len=7, max_seq_len=32)
    assert read_engine_config(tmp_path / "engine").build_config.max_input_len == 7
    with LLM(tmp_path / "engine", skip_tokenizer_init=True) as llm:
        assert llm.generate([3] * 7, PARAMS).finished
        with pytest.raises(RequestError, match="8 tokens, but max_input_len is 7"):
            llm.generate([3] * 8, PARAMS)
        with pytest.raises(RequestError, match="takes 2 to 7"):
            measure_perplexity(llm, [3] * 20, None, 8)


def test_without_it_prompts_may_fill_the_sequence_but_for_one_token(tmp_path: Path) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint", num_hidden_layers=1)
    config = build(checkpoint, tmp_path / "engine", target="onnx", max_seq_len=32)
    assert config.build_config.max_input_len == 31
    # An engine of an earlier release does not say.
    old = BuildConfig.model_validate(config.build_config.model_dump() | {"max_input_len": None})
    assert old.longest_prompt == config.build_config.longest_prompt == 31


@pytest.mark.parametrize(
    ("value", "sentence"), [(0, "max_input_len is 0: it must be at least 1"), (32, "leaves no room for an answer")]
)
def test_an_impossible_value_is_refused(tmp_path: Path, value: int, sentence: str) -> None:
    checkpoint = make_mixtral(tmp_path / "checkpoint", num_hidden_layers=1)
    with pytest.raises(BuildError, match=sentence):
        build(checkpoint, tmp_path / "engine", target="onnx", max_input_len=value, max_seq_len=32)
    assert not (tmp_path / "engine").exists()
