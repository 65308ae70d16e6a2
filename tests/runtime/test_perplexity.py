# SPDX-License-Identifier: Apache-2.0
"""Perplexity against torch's cross-entropy, and the commands from arguments to output."""

from __future__ import annotations

import argparse
import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_tokenizers
from toy_session import ToySession, toy_config, toy_policies

import adaptive_k_moe.runtime
from adaptive_k_moe.errors import PolicyError, RequestError
from adaptive_k_moe.runtime import LLM, SamplingParams
from adaptive_k_moe.runtime.perplexity import measure_perplexity, measure_policies


def open_llm(*_: Any, **__: Any) -> LLM:
    return LLM.from_session(
        ToySession(vocab_size=400),
        toy_config(vocab_size=400),
        toy_policies(),
        tokenizer=toy_tokenizers.byte_level(),
    )


@pytest.mark.parametrize(("length", "window"), [(50, 10), (50, 16), (33, 16), (7, 63), (2, 2)])
def test_perplexity_is_torchs_cross_entropy(length: int, window: int) -> None:
    token_ids = np.random.default_rng(length).integers(0, 400, length).tolist()
    with open_llm() as llm:
        result = measure_perplexity(llm, token_ids, "balanced", window)
        losses, ks = [], []
        for start in range(0, length, window):
            tokens = token_ids[start : start + window]
            if len(tokens) < 2:
                continue
            params = SamplingParams(max_tokens=1, return_context_logits=True, adaptive_k_policy="balanced")
            output = llm.generate(tokens, params)
            logits = torch.tensor(np.array(output.context_logits[:-1]))
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none"))
            ks.append(output.prompt_k)
    assert result.perplexity == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-5)
    assert result.avg_k == pytest.approx(np.concatenate(ks).mean())
    assert result.compute_saved_ratio == pytest.approx(1 - result.avg_k / 2)
    assert (result.policy, result.num_predicted) == ("balanced", sum(map(len, losses)))
    assert result.tokens_per_second == pytest.approx(result.num_tokens / result.seconds)


def test_what_cannot_be_measured_is_refused() -> None:
    with open_llm() as llm:
        with pytest.raises(RequestError, match="fewer than 2"):
            measure_perplexity(llm, [1], None, 10)
        with pytest.raises(RequestError, match="takes 2 to 63"):
            measure_perplexity(llm, [1, 2, 3], None, 64)
        with pytest.raises(PolicyError):
            measure_perplexity(llm, [1, 2, 3], "none", 10)


def test_policies_are_measured_beside_each_other() -> None:
    with open_llm() as llm:
        results = measure_policies(llm, list(range(1, 60)), ["full", "one"], 20, rounds=2)
        assert [(result.policy, result.avg_k) for result in results] == [("full", 2), ("one", 1)]
        assert results[0].perplexity == measure_perplexity(llm, list(range(1, 60)), "full", 20).perplexity


def run_command(name: str, *arguments: str) -> int:
    module = importlib.import_module(f"adaptive_k_moe.runtime.commands.{name}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(["--engine_dir", "none", *arguments])))


@pytest.fixture(autouse=True)
def _toy_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive_k_moe.runtime, "LLM", open_llm)


def test_the_generate_command_streams_the_text_and_ends_with_figures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command("generate", "--prompt", "the quick", "--max_tokens", "9", "--adaptive_k_policy", "one") == 0
    out, err = capsys.readouterr()
    with open_llm() as llm:
        answer = llm.generate("the quick", SamplingParams(max_tokens=9, adaptive_k_policy="one")).outputs[0]
    assert out == answer.text + "\n"
    assert err.startswith("[one] avg_k 1.000 of 2, expert runs saved 50.0% (a count)")
    assert "tokens/s" in err


def test_show_k_prints_a_line_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("generate", "--prompt", "the", "--max_tokens", "5", "--show_k", "--temperature", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 6
    assert all(line.split()[-3:] == ["2", "2", "2"] for line in lines if line)


def test_the_perplexity_command_prints_a_row_a_policy_and_writes_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 5)
    output = tmp_path / "out.json"
    arguments = ["--text", str(text), "--window", "20", "--rounds", "1", "--output", str(output)]
    assert run_command("perplexity", *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["full", "balanced", "one"]
    policies = json.loads(output.read_text())["policies"]
    assert [row["avg_k"] for row in policies][::2] == [2, 1]
    assert policies[0]["perplexity_change"] == policies[0]["time_saved_ratio"] == 0
    assert run_command("perplexity", *arguments, "--adaptive_k_policy", "one") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["full", "one"]
    with pytest.raises(RequestError, match="cannot read the text"):
        run_command("perplexity", "--text", str(tmp_path / "none"))
    text.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RequestError, match="not UTF-8"):
        run_command("perplexity", "--text", str(text))
