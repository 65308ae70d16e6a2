# SPDX-License-Identifier: Apache-2.0
"""Calibration with `--device`: a checkpoint run by `transformers` and the operator in it says what its engine says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.calibration.evaluator import Evaluator
from adaptive_k_moe.calibration.torch_session import CheckpointEvaluator
from adaptive_k_moe.cli import main
from adaptive_k_moe.engine_config import read_engine_config
from adaptive_k_moe.policy import read_policy_file


@pytest.fixture(scope="module")
def checkpoint_evaluator(checkpoint_dir: Path, engine_dir: Path) -> CheckpointEvaluator:
    return CheckpointEvaluator(checkpoint_dir, "cpu", policies=read_engine_config(engine_dir).adaptive_k)


def test_windows_and_decode_steps_are_the_engines(checkpoint_evaluator: CheckpointEvaluator, engine_dir: Path) -> None:
    """Prompts of three sequences, then two steps of a token each, every sequence under a policy of its own."""
    tokens = np.random.default_rng(0).integers(4, 2000, (3, 12))
    with Evaluator(engine_dir) as engine:
        tables = engine.config.policy_tables()
        rows = np.array([tables.index(name) for name in ("full", "balanced", "top1")], np.int32)
        outputs: dict[str, list[Any]] = {}
        for name, evaluator in (("engine", engine), ("torch", checkpoint_evaluator)):
            evaluator.session.set_policies(tables)
            outputs[name] = []
            for begin, end in ((0, 10), (10, 11), (11, 12)):
                part = tokens[:, begin:end]
                wanted = np.arange(1, 4) * (end - begin) - 1
                outputs[name].append(evaluator.step(part, np.repeat(rows[:, None], end - begin, 1), wanted, past=begin))
    for ours, theirs in zip(outputs["torch"], outputs["engine"], strict=True):
        np.testing.assert_array_equal(ours.k, theirs.k)
        np.testing.assert_array_equal(ours.reads, theirs.reads)
        np.testing.assert_allclose(ours.entropy, theirs.entropy, atol=1e-4)
        np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-4 * np.abs(theirs.logits).max())
    assert outputs["torch"][1].k.min() == 1 and outputs["torch"][1].k.max() == 2


def test_a_step_that_does_not_go_on_is_refused(checkpoint_evaluator: CheckpointEvaluator) -> None:
    session = checkpoint_evaluator.session
    session.set_policies(checkpoint_evaluator.config.policy_tables())
    tokens = np.full((2, 4), 7)
    checkpoint_evaluator.step(tokens, np.zeros((2, 4), np.int32), np.arange(1))
    with pytest.raises(CalibrationError, match="goes on where the last one ended"):
        checkpoint_evaluator.step(tokens[:, :1], np.zeros((2, 1), np.int32), np.arange(1), past=3)


def test_eval_of_a_checkpoint_is_that_of_its_engine(
    engine_dir: Path, torch_engine_dir: Path, checkpoint_dir: Path, some_text: str, tmp_path: Path
) -> None:
    """And what an engine for torch says."""
    text, policy = tmp_path / "text.txt", tmp_path / "policy.json"
    text.write_text(some_text[:1500], encoding="utf-8")
    policy.write_text(json.dumps(read_engine_config(engine_dir).adaptive_k.to_json()))
    common = f"--text {text} --window 64 --rounds 0 --batch_size 2 --max_steps 31 --adaptive_k_policy top1 balanced"
    models = {
        "engine": f"--engine_dir {engine_dir}",
        "torch_engine": f"--engine_dir {torch_engine_dir}",
        "torch": f"--checkpoint_dir {checkpoint_dir} --policy {policy} --device cpu",
    }
    found = {}
    for name, model in models.items():
        output = tmp_path / f"{name}.json"
        assert main(f"eval {model} {common} --output {output}".split()) == 0
        found[name] = json.loads(output.read_text())

    def pairs(part: str) -> list[tuple[Any, Any]]:
        models = ("torch", "torch_engine")
        return [pair for name in models for pair in zip(found[name][part], found["engine"][part], strict=True)]

    for ours, theirs in pairs("policies"):
        assert ours["policy"] == theirs["policy"]
        assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-4)
        assert ours["kl_to_full_nats"]["value"] == pytest.approx(theirs["kl_to_full_nats"]["value"], abs=1e-5)
        np.testing.assert_allclose(ours["avg_k_by_layer"], theirs["avg_k_by_layer"], atol=2e-3)
    for ours, theirs in pairs("decode"):
        assert (ours["policy"], ours["batch"]) == (theirs["policy"], theirs["batch"])
        assert ours["reads"] == pytest.approx(theirs["reads"], abs=1e-2)


def test_calibrate_on_a_device_writes_a_policy_that_meets_the_budget(
    checkpoint_dir: Path, some_text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "policy.json"
    text.write_text(some_text[:3200], encoding="utf-8")
    command = f"calibrate --checkpoint_dir {checkpoint_dir} --device cpu --text {text} --window 64 --bands 2"
    assert main(f"{command} --refine_passes 0 --policy_kind entropy --target_saving 25 --output {output}".split()) == 0
    assert "balanced (entropy)" in capsys.readouterr().out
    assert read_policy_file(output).policies["balanced"].kind == "entropy"
    assert not (tmp_path / "policy.json.work" / "engine").exists()
    evaluations = (tmp_path / "policy.json.work").rglob("*.jsonl")
    k = [np.mean(json.loads(line)["scores"]["k"]) for file in evaluations for line in file.read_text().splitlines()]
    assert k and min(abs(value - 1.5) for value in k) < 0.05


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("eval --engine_dir {engine} --device cuda --text {text}", "--policy and --device go with --checkpoint_dir"),
        (
            "calibrate --engine_dir {engine} --device cpu --text {text} --target_avg_k 1.5 --output {output}",
            "--device runs a checkpoint and no engine",
        ),
        ("eval --checkpoint_dir {checkpoint} --device cuda --text {text}", "torch finds no GPU for --device cuda"),
        ("validate --checkpoint_dir {checkpoint} --device cuda --output {output}", "torch finds no GPU"),
    ],
)
def test_refusals_of_devices_are_one_line(
    engine_dir: Path, checkpoint_dir: Path, tmp_path: Path, capsys: Any, command: str, sentence: str
) -> None:
    if torch.cuda.is_available() and "no GPU" in sentence:
        pytest.skip("this machine has a GPU")
    names = {"engine": engine_dir, "checkpoint": checkpoint_dir, "text": checkpoint_dir / "heldout.txt"}
    assert main(command.format(output=tmp_path / "out.json", **names).split()) == 1
    error = capsys.readouterr().err
    assert error.startswith("adaptive-k: error: ") and sentence in error and error.count("\n") == 1
