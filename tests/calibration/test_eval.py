# SPDX-License-Identifier: Apache-2.0
"""`adaptive-k eval`: all policies in one run, with times, and the union of a batch's experts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from adaptive_k_moe.calibration.evaluator import Evaluator
from adaptive_k_moe.calibration.timing import time_policies
from adaptive_k_moe.calibration.windows import Windows
from adaptive_k_moe.cli import main
from adaptive_k_moe.runtime.session import StepInput


def test_all_figures_of_all_policies(
    engine_dir: Path, some_text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "new" / "eval.json"
    text.write_text(some_text[:6000], encoding="utf-8")
    command = f"eval --engine_dir {engine_dir} --text {text} --window 64 --rounds 2 --batch_size 1 4 --output {output}"
    options = ["--adaptive_k_policy", "top1", "balanced"]
    assert main([*command.split(), *options]) == 0
    printed = capsys.readouterr().out
    assert "time against full" in printed and "decode, steps of 4" in printed
    content = json.loads(output.read_text())
    full, top1, balanced = content["policies"]
    assert [full["policy"], top1["policy"], balanced["policy"]] == ["full", "top1", "balanced"]
    assert full["kl_to_full_nats"]["value"] == pytest.approx(0, abs=1e-6)
    assert full["perplexity_change"]["value"] == 0 and full["top_token_agreement"]["value"] == 1
    assert top1["avg_k"]["value"] == 1 and top1["experts_saved_ratio"] == 0.5
    assert 1 < balanced["avg_k"]["value"] < 2
    assert 0 < balanced["kl_to_full_nats"]["value"] < top1["kl_to_full_nats"]["value"]
    for policy in content["policies"]:
        shares = np.array(policy["k_share_by_layer"])
        np.testing.assert_allclose(shares.sum(axis=1), 1)
        np.testing.assert_allclose(shares @ np.arange(3), policy["avg_k_by_layer"])
        assert {(t["phase"], t["batch"]) for t in policy["timings"]} == {
            (phase, batch) for phase in ("prefill", "decode") for batch in (1, 4)
        }
        assert all(t["tokens_per_second"] > 0 for t in policy["timings"])
    steps = {(item["policy"], item["batch"]): item for item in content["decode"]}
    assert steps["full", 1]["reads"] == 2 and steps["top1", 1]["reads"] == 1
    assert steps["balanced", 1]["reads"] < steps["balanced", 4]["reads"] < 8
    assert all(item["timing"]["batch"] == item["batch"] for item in steps.values())


def test_decode_is_timed_with_as_many_sequences_in_flight_as_a_batch_has(
    evaluator: Evaluator, parts: tuple[Windows, Windows], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no prompt is read in a step of more tokens than the engine takes."""
    steps: list[StepInput] = []
    run = evaluator.session.step
    monkeypatch.setattr(evaluator.session, "step", lambda step: steps.append(step) or run(step))
    limits = evaluator.config.build_config.model_copy(update={"max_num_tokens": 100})
    monkeypatch.setattr(evaluator, "config", evaluator.config.model_copy(update={"build_config": limits}))
    windows = parts[0].take(np.arange(16) % len(parts[0]))
    timings = time_policies(
        evaluator,
        windows,
        evaluator.tables({}),
        [],
        batches=(1, 4, 16, 64),
        rounds=1,
        decode_steps=3,
        phases=("decode",),
    )
    assert [(timing.batch, timing.num_tokens) for timing in timings] == [(1, 3), (4, 12), (16, 48)]
    assert max(len(step.input_ids) for step in steps) <= 100
    decoding = [step for step in steps if (np.diff(step.subsequence_begins) == 1).all() and step.past_lens.min() >= 32]
    assert {len(step.past_lens) for step in decoding} == {1, 4, 16}
    for step in decoding:  # each in blocks of its own, after its own prompt
        blocks = [block for table in step.block_tables for block in table]
        assert len(set(blocks)) == len(blocks) and set(step.past_lens) <= {32, 33, 34}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--adaptive_k_policy", "none"], "'none' is not one of this engine's policies"),
        (["--window", "9999"], "this engine reads 2 to 512"),
    ],
)
def test_refusals_are_one_line(
    engine_dir: Path, checkpoint_dir: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    text = str(checkpoint_dir / "heldout.txt")
    assert main(["eval", "--engine_dir", str(engine_dir), "--text", text, *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("adaptive-k: error: ") and sentence in error and error.count("\n") == 1
