# SPDX-License-Identifier: Apache-2.0
"""The evaluator against the runtime's own perplexity, and its scores against definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adaptive_k_moe.calibration import recording
from adaptive_k_moe.calibration.bootstrap import difference, mean
from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.calibration.evaluator import Evaluator, Reference, kl_divergence, log_softmax, random_rows
from adaptive_k_moe.calibration.recording import top_tokens
from adaptive_k_moe.calibration.windows import Windows
from adaptive_k_moe.policy import FixedPolicy
from adaptive_k_moe.runtime import LLM, SamplingParams
from adaptive_k_moe.runtime.perplexity import negative_log_likelihood


@pytest.mark.parametrize("policy", ["full", "balanced", "mass"])
def test_scores_are_those_of_the_runtime(
    evaluator: Evaluator, engine_dir: Path, parts: tuple[Windows, Windows], policy: str
) -> None:
    windows = parts[0].take(np.arange(3))
    tables = evaluator.config.policy_tables()
    scores = evaluator.scores(windows, tables, tables.index(policy))
    params = SamplingParams(max_tokens=1, end_id=-1, return_context_logits=True, adaptive_k_policy=policy)
    with LLM(engine_dir) as llm:
        outputs = llm.generate(windows.tokens.tolist(), params)
    for row, output in enumerate(outputs):
        assert output.context_logits is not None
        total = negative_log_likelihood(output.context_logits, windows.tokens[row].tolist())
        assert scores.nll[row] == pytest.approx(total / windows.num_predicted, abs=1e-5)
        np.testing.assert_allclose(scores.k[row], output.prompt_k.mean(axis=0))


def test_the_full_model_is_at_no_distance_from_itself(evaluator: Evaluator, parts: tuple[Windows, Windows]) -> None:
    windows = parts[1].take(np.arange(3))
    tables = evaluator.tables({"one": FixedPolicy(kind="fixed", k=1)})
    logs = np.concatenate([batch.log_probs for batch in evaluator.batches(windows, tables, 0)])
    reference = top_tokens(logs, 64)
    same, other = (evaluator.scores(windows, tables, row, reference) for row in (0, 1))
    assert same.kl == pytest.approx(np.zeros(3), abs=1e-6)
    assert (same.agreement == 1).all()
    assert other.avg_k == 1 and other.mean_kl > 1e-3 and other.agreement.mean() < 1
    # Keeping fewer tokens can only hide divergence.
    whole = evaluator.scores(windows, tables, 1, top_tokens(logs, logs.shape[-1]))
    assert other.mean_kl <= whole.mean_kl + 1e-9
    assert other.mean_kl == pytest.approx(whole.mean_kl, rel=0.2)


def test_policies_can_differ_from_token_to_token(evaluator: Evaluator, parts: tuple[Windows, Windows]) -> None:
    windows = parts[0].take(np.arange(2))
    tables = evaluator.tables({"one": FixedPolicy(kind="fixed", k=1), "two": FixedPolicy(kind="fixed", k=2)})
    rows = random_rows(windows.tokens.shape, 0.25, seed=3)
    scores = evaluator.scores(windows, tables, rows)
    assert scores.avg_k == pytest.approx(np.where(rows == 1, 1, 2).mean())


def test_kl_divergence_is_the_definition_over_kept_tokens_and_the_rest() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 9)).astype(np.float32)
    full, other = log_softmax(logits[0].copy()), log_softmax(logits[1].copy())
    exact = (np.exp(full) * (full - other)).sum(axis=-1)
    np.testing.assert_allclose(kl_divergence(full, other), exact, atol=1e-6)
    reference: Reference = top_tokens(full, 4)
    kept = np.take_along_axis(other, reference.ids.astype(np.int64), axis=-1)
    bucketed = kl_divergence(reference.log_probs, kept)
    assert (bucketed <= exact + 1e-6).all() and (bucketed >= 0).all()
    assert (reference.ids[:, 0] == full.argmax(axis=-1)).all()


def test_top_tokens_name_the_first_of_equals() -> None:
    assert top_tokens(np.zeros((1, 3, 10), np.float32), 4).ids[..., 0].tolist() == [[0, 0, 0]]


def test_figures_of_other_kernels_are_others(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    here = recording.engine_fingerprint(evaluator)
    assert recording.engine_fingerprint(evaluator) == here
    monkeypatch.setattr(recording, "instruction_set", lambda: "another")
    assert recording.engine_fingerprint(evaluator) != here


def test_a_window_beyond_the_engine_is_refused(evaluator: Evaluator) -> None:
    with pytest.raises(CalibrationError, match="the window is 4096 tokens, but this engine reads 2 to 512"):
        evaluator.check_window(4096)


def test_intervals_hold_the_truth_and_pairs_are_kept() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        found = mean(rng.normal(3.0, 1.0, size=40))
        hits += found.low <= 3.0 <= found.high
    assert hits >= 170  # 95 % in the limit; the bootstrap of 40 values is a little narrow
    shared = rng.normal(0.0, 100.0, size=40)
    gap = difference(shared + 1.0, shared)
    assert gap == pytest.approx((1.0, 1.0, 1.0))
