# SPDX-License-Identifier: Apache-2.0
"""Routers' choices and experts' norms against `transformers`, kills, and rules by the share that they save."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.calibration.evaluator import Evaluator
from adaptive_k_moe.calibration.families import OneNumberRules
from adaptive_k_moe.calibration.routers import DECIMALS, RouterRecording, collect_routers, relative_norms
from adaptive_k_moe.calibration.windows import Windows, make_windows, read_text
from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.model_config import QuantAlgo
from adaptive_k_moe.torch.adapt import moe_blocks

import oracle
from checkpoints import BUNDLED_MODELS, MIXTRAL_SMALL
from rounded_models import PRECISIONS, quantise_reference


@pytest.mark.parametrize("checkpoint", BUNDLED_MODELS, ids=lambda path: path.name)
def test_choices_and_norms_are_those_of_transformers(checkpoint: Path, tmp_path: Path) -> None:
    build(checkpoint, tmp_path / "engine", max_seq_len=128, max_num_tokens=128, dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    assert_choices_and_norms(checkpoint, model, tmp_path)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_so_are_those_of_integer_weights(precision: tuple[str, int, int | None], tmp_path: Path) -> None:
    _, bits, group = precision
    sizes = {"max_seq_len": 128, "max_num_tokens": 128}
    algorithm: QuantAlgo = "W8A16" if bits == 8 else "W4A16"  # whose numbers are exact
    build(MIXTRAL_SMALL, tmp_path / "engine", dtype="bfloat16", quant_algo=algorithm, **sizes)
    model = transformers.AutoModelForCausalLM.from_pretrained(MIXTRAL_SMALL, dtype=torch.float32).eval()
    quantise_reference(bits, group, torch.bfloat16, model, vocabulary=True)
    assert_choices_and_norms(MIXTRAL_SMALL, model, tmp_path)


def assert_choices_and_norms(checkpoint: Path, model: Any, tmp_path: Path) -> None:
    """Of the engine in `tmp_path` on the checkpoint's text, beside those of a model of `transformers`."""
    seen: list[tuple[Any, Any, Any]] = []

    def listen(module: Any, arguments: tuple[Any, ...], _output: Any) -> None:
        hidden, experts = arguments[:2]
        ones = torch.ones(len(hidden), 1)
        outputs = [module.forward(hidden, column[:, None], ones) for column in experts.T]
        seen.append((experts, torch.stack([output.norm(dim=-1) for output in outputs], 1), arguments[2]))

    blocks = [module for module in model.modules() if hasattr(module, "experts") and hasattr(module, "gate")]
    assert len(blocks) == len(moe_blocks(model))
    for block in blocks:
        block.experts.register_forward_hook(listen)
    with Evaluator(tmp_path / "engine") as evaluator:
        text = read_text(checkpoint / "heldout.txt")[:2000]
        windows = make_windows(evaluator.tokenizer, {"some": text}, 64)
        routers = collect_routers(evaluator, windows, tmp_path / "work")
        moe = evaluator.config.pretrained_config.moe
    with torch.no_grad():
        model(input_ids=torch.from_numpy(windows.tokens))
    for layer, (experts, norms, weights) in enumerate(seen):
        found = routers.experts[:, :, layer].reshape(experts.shape)
        np.testing.assert_array_equal(np.sort(found, axis=1), np.sort(experts.numpy(), axis=1))
        # Its weights are the scores, up to the rule that makes them add up and a factor.
        shares = weights.sort(dim=1, descending=True).values
        scores = -np.sort(-routers.scores[:, :, layer].reshape(experts.shape), axis=1)
        if moe.norm_topk_prob:
            scores = scores / scores.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(scores * moe.routed_scaling_factor, shares, atol=1e-5)
        sums, counts = (np.zeros((1, moe.num_experts)) for _ in range(2))
        np.add.at(sums[0], experts.numpy(), norms.numpy().astype(np.float64))
        np.add.at(counts[0], experts.numpy(), 1)
        expected = relative_norms(sums, counts)[0]
        np.testing.assert_allclose(routers.norms[layer], expected, atol=1.5 * 10**-DECIMALS)


class KilledError(Exception):
    pass


def test_a_collection_that_was_killed_goes_on(
    evaluator: Evaluator, parts: tuple[Windows, Windows], tmp_path: Path
) -> None:
    windows = parts[0].take(np.arange(9))
    whole = collect_routers(evaluator, windows, tmp_path / "whole")

    def kill(done: int) -> None:
        if 0 < done < len(windows):
            raise KilledError

    with pytest.raises(KilledError):
        collect_routers(evaluator, windows, tmp_path / "killed", progress=kill)
    said: list[int] = []
    again = collect_routers(evaluator, windows, tmp_path / "killed", progress=said.append)
    assert said[0] == 4 and said[-1] == len(windows)
    for name in ("scores", "experts", "total", "norms"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
    said.clear()
    collect_routers(evaluator, windows, tmp_path / "killed", progress=said.append)
    assert said == [len(windows)]


def test_other_targets_cannot_be_looked_into(evaluator: Evaluator, parts: tuple[Windows, Windows]) -> None:
    model = evaluator.config.pretrained_config
    gpu = SimpleNamespace(
        config=SimpleNamespace(pretrained_config=model, build_config=SimpleNamespace(target="tensorrt"))
    )
    with pytest.raises(CalibrationError, match="on an engine of the target openvino, and this one's is tensorrt"):
        collect_routers(gpu, parts[0], Path("nowhere"))  # type: ignore[arg-type]


def test_an_expert_that_nobody_ran_is_an_average_one() -> None:
    sums, counts = np.array([[2.0, 0.0, 8.0], [0.0, 0.0, 0.0]]), np.array([[2.0, 0.0, 4.0], [0.0, 0.0, 0.0]])
    assert relative_norms(sums, counts).round(3).tolist() == [[0.667, 1.0, 1.333], [1.0, 1.0, 1.0]]
    assert relative_norms(np.zeros((1, 2)), np.ones((1, 2))).tolist() == [[1.0, 1.0]]


def some_routers(scoring: str) -> tuple[RouterRecording, Any]:
    """Recording of random routers with two layers of 12 experts, top-4, and their logits."""
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal((2, 60, 2, 12)) * [[1.0], [2.5]]).astype(np.float32)
    scores = oracle.sigmoid(logits) if scoring == "sigmoid" else np.apply_along_axis(oracle.softmax, -1, logits)
    experts = np.argsort(-logits, axis=-1, kind="stable")[..., :4].astype(np.int32)
    chosen = np.take_along_axis(scores, experts, -1).astype(np.float32)
    norms = rng.uniform(0.3, 2, (2, 12))
    return RouterRecording(
        chosen, experts, scores.sum(-1).astype(np.float32), norms / norms.mean(1, keepdims=True)
    ), logits


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("kind", "number"), [("top_p", 1), ("ratio", 2), ("contribution", 3)])
def test_a_rule_saves_the_share_that_it_is_made_for(kind: Any, number: int, scoring: str) -> None:
    routers, logits = some_routers(scoring)
    one, each = (OneNumberRules(kind, routers, 1, by_layer=by_layer) for by_layer in (False, True))

    def saved(policy: Any) -> Any:
        """[L] shares of the three droppable experts that are dropped, by the operator's rule."""
        ks = np.empty(logits.shape[:3])
        for window, token, layer in np.ndindex(ks.shape):
            rule = policy.choices(layer, 4)
            row = np.array([rule.parameter], np.float32), np.array([rule.k_min, rule.k_max or 4])
            norms = routers.norms[layer].astype(np.float32)
            routed = oracle.route_token(logits[window, token, layer], number, *row, expert_norms=norms, scoring=scoring)
            ks[window, token, layer] = routed.k
        return (4 - ks.mean(axis=(0, 1))) / 3

    for share in (0.0, 0.2, 0.55, 0.9, 1.0):
        policy = one.family()(share).policy
        assert saved(policy).mean() == pytest.approx(share, abs=0.01)
        assert one.rules_of(policy)[0] == pytest.approx(one.saving(share), abs=0.02)
    made = each.candidate([each.saving(0.7), each.saving(0.3)])
    assert saved(made.policy) == pytest.approx([0.7, 0.3], abs=0.01)
    assert np.ravel(each.rules_of(made.policy)) == pytest.approx([1.9, 1, 4, 3.1, 1, 4], abs=0.02)
    assert made.kind == f"{kind}_per_layer"
    # A mean k within a smallest and a largest one; a fixed k is one that is both.
    within = each.candidate([(2.4, 2.0, 3.0), each.fixed(3)]).policy
    assert 4 - 3 * saved(within) == pytest.approx([2.4, 3], abs=0.01)
    assert saved(each.candidate([each.saving(0.0), each.saving(1.0)]).policy).tolist() == [0, 1]
