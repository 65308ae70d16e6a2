# SPDX-License-Identifier: Apache-2.0
"""`adaptive-k eval`: all policies in one run, with times, and the union of a batch's experts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from adaptive_k_moe.cli import main


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
