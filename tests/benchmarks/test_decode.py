# SPDX-License-Identifier: Apache-2.0
"""Random models whose routers choose as a bundled model's: what they read, and rules that lose as much on them."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import decode
import numpy as np
import pytest
from _models import Shape, random_checkpoint, shape_routing, shape_tokens, trained_routing

from adaptive_k_moe.calibration.evaluator import Evaluator
from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_config import read_engine_config
from adaptive_k_moe.policy import RatioPolicy, SharedPolicy


def small_shape(experts: int, normalised: bool) -> Shape:
    fields = {"hidden_size": 512, "moe_intermediate_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 32, "num_experts": experts, "num_experts_per_tok": 8,
              "norm_topk_prob": normalised}  # fmt: skip
    return Shape("olmoe-small", "Qwen3MoeConfig", fields, 2, 48, 2048 * 24)


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.mark.parametrize("experts", [64, 128])
def test_a_random_model_reads_what_the_trained_routers_choose(work_dir: Path, tmp_path: Path, experts: int) -> None:
    shape = small_shape(experts, normalised=False)
    build(random_checkpoint(shape, tmp_path / "checkpoint", work_dir), tmp_path / "engine", max_seq_len=64)
    logits = shape_routing(shape, trained_routing(shape.model, work_dir)).logits
    tokens = shape_tokens(shape, 16)
    batch, steps = 16, range(4, 16)
    with Evaluator(tmp_path / "engine") as evaluator:
        evaluator.session.set_policies(evaluator.tables({}))
        evaluator.step(tokens[:batch, :4], np.zeros((batch, 4), np.int32), np.arange(batch))
        found = [
            evaluator.step(tokens[:batch, at : at + 1], np.zeros((batch, 1), np.int32), np.arange(batch), past=at).reads
            for at in steps
        ]
    first = np.argsort(-logits[:batch], axis=-1)[..., :8]
    wanted = [[len(np.unique(first[:, at, layer])) for layer in range(2)] for at in steps]
    np.testing.assert_allclose(found, wanted, atol=2)  # embeddings are bfloat16: close eighth experts may change
    np.testing.assert_allclose(np.mean(found), np.mean(wanted), rtol=0.005)


def test_a_shape_with_more_experts_gets_the_number_that_loses_as_much(work_dir: Path, tmp_path: Path) -> None:
    shape = small_shape(128, normalised=True)
    build(random_checkpoint(shape, tmp_path / "checkpoint", work_dir), tmp_path / "engine", max_seq_len=64)
    config = read_engine_config(tmp_path / "engine")
    trained = trained_routing(shape.model, work_dir)
    small = read_engine_config(decode.small_engine(shape.model, work_dir))
    for rule in (SharedPolicy(kind="shared", price=0.02), RatioPolicy(kind="ratio", ratio=0.2)):
        here = decode.on_shape(shape, config, rule, 16, work_dir)
        assert here.parameter != rule.parameter
        there = decode.lost(small, trained, rule, 16)
        assert decode.lost(config, shape_routing(shape, trained), here, 16) == pytest.approx(there, abs=0.01)
        assert 0.01 < there < 0.5
    same = small_shape(64, normalised=False)
    assert decode.on_shape(same, small, rule, 16, work_dir) is rule


def row(**given: Any) -> decode.Row:
    base = dict.fromkeys((field.name for field in fields(decode.Row)), 1.0)
    return decode.Row(**{**base, "shape": "olmoe", "weights": "int8", "batch": 16, "rule": {}, **given})  # type: ignore[arg-type]


def test_time_over_bytes_and_what_an_expert_takes() -> None:
    reads, ks = [50.0, 40.0, 30.0, 30.0], [8.0, 5.0, 8.0, 6.0]
    layers, batch = decode.SHAPES["olmoe"].num_moe_layers, 16
    times = [(400 * r + 25 * batch * k) * layers / 1e3 for r, k in zip(reads, ks, strict=True)]  # ms
    rows = [
        row(policy=str(at), reads=reads[at], reads_share=reads[at] / 50, avg_k=ks[at],
            experts_milliseconds=times[at], experts_time_share=times[at] / times[0])
        for at in range(4)
    ]  # fmt: skip
    assert decode.fitted(rows) == pytest.approx((400, 25, 0), abs=1e-6)
    assert decode.fitted(rows[:3]) is None
    assert rows[2].time_over_bytes == pytest.approx(times[2] / times[0] / 0.6) and rows[2].time_over_bytes > 1.05
    # Where runs take nothing no term falls below 0.
    free = [replace(each, experts_milliseconds=each.reads * (1 - each.avg_k / 1000)) for each in rows]
    read, run, error = decode.fitted(free) or (0.0, 1.0, 0.0)
    assert read > 0 and run == 0 and 0 < error < 0.01


def test_rows_of_another_machine_are_not_kept(tmp_path: Path) -> None:
    path, machine = tmp_path / "decode.json", decode.Machine("a", "amx", 2, 0.02)
    assert decode.kept_rows(path, machine) == []
    path.write_text(json.dumps({**asdict(machine), "rows": [asdict(row(policy="full"))]}))
    assert [each.policy for each in decode.kept_rows(path, machine)] == ["full"]
    assert decode.kept_rows(path, replace(machine, cpu="b")) == []
    assert len(decode.kept_rows(path, None)) == 1
