# SPDX-License-Identifier: Apache-2.0
"""Calibration of the bundled model on a little text: the budget, the grid, and being killed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from adaptive_k_moe.calibration import bootstrap
from adaptive_k_moe.calibration.calibrate import Calibration, calibrate
from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.calibration.evaluator import Evaluator
from adaptive_k_moe.calibration.kinds import CURVE_KINDS
from adaptive_k_moe.calibration.laboratory import Budget
from adaptive_k_moe.calibration.recording import EvaluationCache, collect
from adaptive_k_moe.calibration.windows import Windows
from adaptive_k_moe.cli import main
from adaptive_k_moe.engine_config import read_policy_tables
from adaptive_k_moe.policy import EntropyPolicy, read_policy_file

TARGET = 1.5
KINDS = ("entropy", "entropy_per_layer", "ratio", "contribution_per_layer")


def run(evaluator: Evaluator, parts: tuple[Windows, Windows], work_dir: Path, **more: object) -> Calibration:
    options: dict[str, object] = {"kinds": KINDS, "num_bands": 3, "refine_passes": 6, "curve_points": 0}
    return calibrate(evaluator, *parts, Budget(avg_k=TARGET), work_dir=work_dir, **{**options, **more})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calibration")


@pytest.fixture(scope="module")
def result(evaluator: Evaluator, parts: tuple[Windows, Windows], work_dir: Path) -> Calibration:
    return run(evaluator, parts, work_dir)


def test_the_budget_holds_on_text_that_was_not_seen(result: Calibration) -> None:
    assert result.chosen.fit.avg_k == pytest.approx(TARGET, abs=0.01)
    measured = result.chosen.avg_k
    slack = 3 * (measured.high - measured.low)
    assert abs(measured.value - TARGET) < slack
    assert result.budget_met in ("yes", "undecided") or measured.low - TARGET < slack


def test_no_rule_on_a_coarse_grid_beats_it_by_more_than_noise(
    evaluator: Evaluator, parts: tuple[Windows, Windows], result: Calibration, work_dir: Path
) -> None:
    # One rule for all layers, every limit on a grid; those that spend no more than the policy that was found.
    found = next(point for point in result.candidates if point.kind == "entropy")
    reference = collect(evaluator, parts[1], work_dir / "reported").reference
    for limit in np.arange(0.2, 2.1, 0.3):
        rule = EntropyPolicy(kind="entropy", thresholds=[float(limit)], k=[1, 2])
        scores = evaluator.scores(parts[1], evaluator.tables({"grid": rule}), 1, reference)
        if scores.avg_k <= found.heldout.avg_k + 0.005:
            assert bootstrap.difference(scores.kl, found.heldout.kl).high > 0


def test_choosing_by_measurement_beats_choosing_layers_blindly(result: Calibration) -> None:
    best = min(point.heldout.mean_kl for point in result.candidates)
    assert result.chosen.fit.mean_kl == min(point.fit.mean_kl for point in result.candidates)
    assert result.chosen.heldout.mean_kl <= 1.1 * best


def test_a_calibration_that_was_killed_ends_with_the_same_policy(
    evaluator: Evaluator, parts: tuple[Windows, Windows], result: Calibration, work_dir: Path, tmp_path: Path
) -> None:
    # As a kill would leave it: recordings cut off after four windows, and an evaluation written by half.
    again = tmp_path / "work"
    shutil.copytree(work_dir, again)
    manifest = again / "fitted" / "recording.json"
    content = json.loads(manifest.read_text())
    content["windows_done"] = 4
    manifest.write_text(json.dumps(content))
    np.lib.format.open_memmap(again / "fitted" / "entropy.npy", mode="r+")[4:] = np.nan
    lines = (again / "fitted" / "evaluations.jsonl").read_bytes()
    (again / "fitted" / "evaluations.jsonl").write_bytes(lines[: len(lines) // 2])
    repeated = run(evaluator, parts, again)
    assert repeated.chosen.policy == result.chosen.policy
    assert repeated.opponent.policy == result.opponent.policy
    assert repeated.to_json() == result.to_json()


def test_a_whole_calibration_is_not_measured_twice(
    evaluator: Evaluator, parts: tuple[Windows, Windows], result: Calibration, work_dir: Path
) -> None:
    said: list[str] = []
    repeated = run(evaluator, parts, work_dir, report=lambda what, _done, _total: said.append(what))
    assert repeated.to_json() == result.to_json()
    assert not [what for what in said if what.startswith("evaluating")]


def test_scores_of_another_text_are_not_used(tmp_path: Path, result: Calibration) -> None:
    path = tmp_path / "evaluations.jsonl"
    EvaluationCache(path, "text one").put("candidate", result.chosen.fit)
    assert EvaluationCache(path, "text two").get("candidate") is None
    kept = EvaluationCache(path, "text one").get("candidate")
    assert kept is not None and (kept.kl == result.chosen.fit.kl).all() and (kept.k == result.chosen.fit.k).all()
    path.write_text("nonsense\n")
    with pytest.raises(CalibrationError, match="is damaged: delete it"):
        EvaluationCache(path, "text one")


def test_the_command_adds_to_a_policy_file(
    engine_dir: Path, some_text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "policy.json"
    text.write_text(some_text[:3200], encoding="utf-8")
    output.write_text(json.dumps({"unit": "bits", "policies": {"mine": {"kind": "fixed", "k": 1}}}))
    options = (
        f"--window 64 --bands 2 --refine_passes 0 --curve_points 1 --timing_rounds 1 --report {tmp_path / 'report'}"
    )
    arguments = f"calibrate --engine_dir {engine_dir} --text {text} --output {output} --policy_name tuned {options}"
    kinds = ["--policy_kind", "entropy_per_layer"]
    assert main([*arguments.split(), *kinds, "--target_saving", "25", "--default"]) == 0
    lines = output.read_text().splitlines()
    assert max(map(len, lines)) < 200  # a layer's norms a line
    written = read_policy_file(output)
    assert list(written.policies) == ["full", "mine", "tuned", "tuned_static"]
    assert written.default == "tuned" and written.unit == "bits"
    assert "budget met on the reported part" in capsys.readouterr().out
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "http://" not in page and "https://" not in page and "<script" not in page
    for figure in ("quality_by_k", "quality_by_time", "entropy_by_layer", "damage", "k_by_layer"):
        assert (tmp_path / "report" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["chosen"]["kind"] == "entropy_per_layer"
    assert results["chosen"]["heldout"]["avg_k"]["value"] == pytest.approx(1.5, abs=0.1)
    assert {point["kind"] for point in results["curves"]} == set(CURVE_KINDS)

    # The norms are in the file, so a policy that needs them can be set; a later calibration keeps them.
    engine = shutil.copytree(engine_dir, tmp_path / "engine")
    assert main(["policy", "set", "--engine_dir", str(engine), "--file", str(output)]) == 0
    weighed = ["--name", "weighed", "--kind", "contribution", "--p", "0.8"]
    assert main(["policy", "set", "--engine_dir", str(engine), *weighed]) == 0
    np.testing.assert_allclose(read_policy_tables(engine).expert_norms, written.expert_norms, rtol=1e-4)
    content = {**written.to_json(), "expert_norms": [[3.0] + [1.0] * 7] * 6}
    output.write_text(json.dumps(content))
    options = "--window 64 --bands 2 --refine_passes 0 --policy_kind contribution --target_saving 20"
    base = f"calibrate --engine_dir {engine_dir} --text {text} --output {output} --policy_name weighed"
    assert main([*base.split(), *options.split(), "--no_opponent"]) == 0
    again = read_policy_file(output)
    assert again.expert_norms == content["expert_norms"]
    assert again.policies["weighed"].kind == "contribution"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--target_avg_k", "9"], "an average k of 9 is no budget for this model"),
        (["--target_saving", "120"], "a saving of 120 per cent is not between 0 and 100"),
        (["--target_avg_k", "1.5", "--k_values", "1", "2", "4"], "must end with the model's trained top-k, 2"),
        (["--target_avg_k", "1.5", "--bands", "1"], "1 bands cannot rank tokens"),
        (["--target_avg_k", "1.5", "--window", "9999"], "the window is 9999 tokens, but this engine reads"),
    ],
)
def test_refusals_are_one_line(
    engine_dir: Path,
    checkpoint_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    sentence: str,
) -> None:
    text = tmp_path / "text.txt"
    text.write_text((checkpoint_dir / "heldout.txt").read_text(encoding="utf-8")[:3000], encoding="utf-8")
    base = f"calibrate --engine_dir {engine_dir} --text {text} --output {tmp_path / 'p.json'}".split()
    window = [] if "--window" in options else ["--window", "64"]
    assert main([*base, *window, *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("adaptive-k: error: ") and sentence in error and error.count("\n") == 1
    assert not (tmp_path / "p.json").exists()


def test_a_report_without_matplotlib_is_refused_before_anything_is_measured(
    checkpoint_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    base = f"calibrate --engine_dir {tmp_path / 'engine'} --text {checkpoint_dir / 'heldout.txt'} --target_avg_k 1.5"
    assert main([*base.split(), "--output", str(tmp_path / "p.json"), "--report", str(tmp_path / "report")]) == 1
    assert capsys.readouterr().err.startswith("adaptive-k: error: the report needs matplotlib: install it with pip")
    assert list(tmp_path.iterdir()) == []
