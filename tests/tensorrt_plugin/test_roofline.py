# SPDX-License-Identifier: Apache-2.0
"""The formulas of benchmarks/roofline.py, against hand calculation, simulation and the launcher's own constants."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import plugin_harness as h
import pytest
import roofline as r

MIXTRAL, NEMOTRON = r.MODELS["mixtral-8x7b"], r.MODELS["nemotron-3-nano"]
BF16, INT8, INT4 = (r.WEIGHTS[name] for name in ("bf16", "int8", "int4"))
H100 = r.GPUS["h100"]
IDEAL = r.Assumptions(bandwidth_efficiency=1, compute_efficiency=1, launch_seconds=0)


def inside(model: r.Model, weights: r.Weights, tokens: int, k: float) -> dict[str, r.Kernel]:
    return {kernel.name: kernel for kernel in r.kernels(model, weights, tokens, k) if kernel.inside}


# ---------------------------------------------------------------- the union of experts


@pytest.mark.parametrize(("experts", "k", "tokens"), [(8, 2, 1), (8, 2, 5), (8, 1, 8), (128, 6, 20), (5, 5, 3)])
def test_distinct_experts_is_what_drawing_gives(experts: int, k: int, tokens: int) -> None:
    rng = np.random.default_rng(0)
    draws = [
        len(set(np.concatenate([rng.choice(experts, k, replace=False) for _ in range(tokens)]))) for _ in range(2000)
    ]
    standard_error = np.std(draws) / len(draws) ** 0.5
    assert r.distinct_experts(experts, k, tokens) == pytest.approx(np.mean(draws), abs=4 * standard_error + 1e-9)


def test_a_mix_of_k_touches_what_its_average_touches() -> None:
    """Half of the tokens at k = 1 and half at k = 3, each at random."""
    rng = np.random.default_rng(1)
    tokens, experts = 6, 8
    draws = []
    for _ in range(4000):
        chosen: set[int] = set()
        for k in rng.choice([1, 3], tokens):
            chosen |= set(rng.choice(experts, k, replace=False).tolist())
        draws.append(len(chosen))
    assert r.distinct_experts(experts, 2.0, tokens) == pytest.approx(np.mean(draws), abs=0.06)


def test_instructions_of_integers_in_decode() -> None:
    """One token: 2 experts of 3 x 4096 x 14336 weights, one row each, in a pass of two rows and eight columns."""
    work = inside(MIXTRAL, INT4, 1, 2)
    products = [work["decode up"], work["decode down"]]
    weights = 2 * 3 * 4096 * 14336
    assert sum(kernel.instructions for kernel in products) == pytest.approx(3.0 * weights)
    assert sum(kernel.flops for kernel in products) == pytest.approx(2 * 8 * weights)
    assert products[0].times(H100, IDEAL)["compute"] == pytest.approx(products[0].instructions / (67e12 / 2))
    # Ten rows an expert: two passes of five.
    assert r.integer_work(INT4, 100, 10) == {"flops": 2 * 8 * 5 * 100, "unit": "mma", "instructions": 2 * 4.6 * 100}


def test_distinct_experts_by_hand() -> None:
    assert r.distinct_experts(8, 2, 1) == pytest.approx(2)
    assert r.distinct_experts(8, 2, 2) == pytest.approx(8 * (1 - 0.75**2))
    assert r.distinct_experts(8, 8, 1) == pytest.approx(8)
    assert r.distinct_experts(8, 2, 0) == 0
    assert r.distinct_experts(128, 6, 100_000) == pytest.approx(128)


def test_an_even_load_is_the_uniform_case() -> None:
    for k, tokens in product((1, 2, 5.5), (1, 7, 64)):
        assert r.distinct_experts(16, k, tokens, [3.0] * 16) == pytest.approx(r.distinct_experts(16, k, tokens))


def test_an_uneven_load_touches_fewer_experts() -> None:
    load = [2.0**-i for i in range(16)]
    for tokens in (2, 8, 64):
        assert r.distinct_experts(16, 2, tokens, load) < r.distinct_experts(16, 2, tokens)
    assert r.distinct_experts(16, 2, 1, load) == pytest.approx(2)


@pytest.mark.parametrize("k", [0, 0.5, 1, 2, 3.5, 4])
def test_inclusion_probabilities_add_up_to_k(k: float) -> None:
    for load in ([1, 1, 1, 1], [8, 1, 1, 1], [100, 50, 1, 1], [0.7, 0.2, 0.05, 0.05]):
        found = r.inclusion_probabilities(load, k)
        assert sum(found) == pytest.approx(k)
        assert all(0 <= p <= 1 for p in found)
        assert found == sorted(found, reverse=True)  # as the loads are
    assert r.inclusion_probabilities([8, 1, 1], 2) == pytest.approx([1, 0.5, 0.5])


@pytest.mark.parametrize("load", [[1.0, -1.0], [1.0, 0.0]])
def test_an_impossible_load_is_refused(load: list[float]) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        r.inclusion_probabilities(load, 2)


# ---------------------------------------------------------------- bytes and operations


def test_bytes_of_one_token_of_mixtral_by_hand() -> None:
    work = inside(MIXTRAL, BF16, 1, 2)
    assert set(work) == {"route", "plan", "decode up", "decode down", "combine"}
    one_expert = 3 * 4096 * 14336 * 2
    weights = work["decode up"].bytes + work["decode down"].bytes
    rows = 4096 * 2 + 2 * 14336 * 2 + 2 * 14336 * 2 + 2 * 4096 * 4
    assert weights == 2 * one_expert + rows
    assert work["decode up"].flops + work["decode down"].flops == 2 * 2 * 3 * 4096 * 14336
    # 706 MB at 3.35 TB/s.
    ideal = r.estimate(H100, MIXTRAL, BF16, 1, 2, IDEAL)
    assert ideal.operator_seconds == pytest.approx(2 * one_expert / 3.35e12, rel=2e-3)
    assert ideal.operator_seconds == pytest.approx(210.3e-6, rel=5e-3)


def test_many_tokens_of_mixtral_by_hand() -> None:
    tokens = 4096
    work = inside(MIXTRAL, BF16, tokens, 2)
    assert set(work) == {"route", "plan", "gather", "gemm up", "activate", "gemm down", "combine"}
    assert work["gemm up"].flops == 2 * (2 * tokens) * 28672 * 4096
    assert work["gemm up"].bytes == pytest.approx(8 * 28672 * 4096 * 2 + 2 * tokens * (4096 + 28672) * 2)
    assert work["plan"].launches == 3
    ideal = r.estimate(H100, MIXTRAL, BF16, tokens, 2, IDEAL)
    assert ideal.bound == "compute"
    assert ideal.operator_seconds > 2 * 2 * tokens * 3 * 4096 * 14336 / 989e12


def test_many_tokens_with_quantised_weights_by_hand() -> None:
    tokens = 4096
    work = inside(MIXTRAL, INT8, tokens, 2)
    assert set(work) == {"route", "plan", "tiles", "mixed up", "mixed down", "combine"}
    assert work["mixed up"].unit == work["mixed down"].unit == "mma"
    assert work["mixed up"].instructions == pytest.approx(work["mixed up"].flops / 4096 * 32 * r.MIXED_INSTRUCTIONS)
    assert work["mixed up"].flops == 2 * (2 * tokens) * 28672 * 4096
    # The activation is part of the product, so only its result is written.
    assert work["mixed up"].bytes == pytest.approx(8 * 28672 * (4096 + 2) + 2 * tokens * (4096 + 14336) * 2)


def test_an_expert_without_a_gate_has_two_matrices() -> None:
    work = inside(NEMOTRON, BF16, 1, 6)
    assert work["decode up"].flops == work["decode down"].flops == 2 * 6 * 2688 * 1856


def test_quantised_weights_with_their_scales() -> None:
    assert BF16.matrix_bytes(10, 64) == 10 * 64 * 2
    assert INT8.matrix_bytes(10, 64) == 10 * (64 + 2)
    assert INT4.matrix_bytes(10, 64) == 10 * (32 + 2 * 2)


def test_the_shared_expert_and_the_router_are_outside_the_operator() -> None:
    outside = [kernel for kernel in r.kernels(NEMOTRON, BF16, 4, 6) if not kernel.inside]
    assert [kernel.name for kernel in outside] == ["router", "shared up", "shared down"]
    assert outside[0].flops == 2 * 4 * 2688 * 128
    assert outside[1].flops == outside[2].flops == 2 * 4 * 2688 * 3712
    assert [kernel.name for kernel in r.kernels(MIXTRAL, BF16, 4, 2) if not kernel.inside] == ["router"]


def test_a_kernel_takes_the_longer_of_reading_and_computing() -> None:
    gpu = r.Gpu("round", 1e9, 1e12, 5e11, 1e10, "")
    assumed = r.Assumptions(bandwidth_efficiency=0.5, compute_efficiency=0.25, launch_seconds=1e-3)
    assert r.Kernel("a", 5e8).seconds(gpu, assumed) == pytest.approx(1 + 1e-3)
    assert r.Kernel("b", 0, 5e9, launches=2).seconds(gpu, assumed) == pytest.approx(2 + 2e-3)
    assert r.Kernel("c", 0, 5e11, "tensor").seconds(gpu, assumed) == pytest.approx(2 + 1e-3)
    assert r.Kernel("c", 0, 5e11, "mma").seconds(gpu, assumed) == pytest.approx(4 + 1e-3)
    assert r.Kernel("d", 5e8, 5e9).seconds(gpu, assumed) == pytest.approx(2 + 1e-3)


# ---------------------------------------------------------------- what is saved


@pytest.mark.parametrize("gpu", r.GPUS.values(), ids=list(r.GPUS))
@pytest.mark.parametrize("weights", r.WEIGHTS.values(), ids=list(r.WEIGHTS))
@pytest.mark.parametrize("model", r.MODELS.values(), ids=list(r.MODELS))
def test_a_smaller_k_never_costs_more_nor_saves_more_than_its_count(
    gpu: r.Gpu, weights: r.Weights, model: r.Model
) -> None:
    rows = r.compare(gpu, model, weights, [1, 8, 64, 512, 4096], model.choices, r.Assumptions())
    for row in rows:
        before = 0.0
        for smaller in row["smaller"]:
            assert before <= smaller["operator_saved"] <= smaller["count_saved"] + 1e-9
            assert smaller["layer_saved"] <= smaller["operator_saved"] + 1e-9
            before = smaller["operator_saved"]


def test_one_token_saves_nearly_what_the_count_says() -> None:
    [row] = r.compare(H100, MIXTRAL, BF16, [1], [1.0], IDEAL)
    assert row["smaller"][0]["operator_saved"] == pytest.approx(0.5, abs=0.01)


def test_a_batch_that_touches_all_experts_saves_nothing_while_reading_bounds_it() -> None:
    [row] = r.compare(H100, MIXTRAL, BF16, [64], [1.0], r.Assumptions())
    assert row["fixed"]["bound"] == row["smaller"][0]["bound"] == "memory"
    assert row["smaller"][0]["operator_saved"] < 0.02


def test_arithmetic_bound_steps_save_again() -> None:
    [row] = r.compare(H100, MIXTRAL, BF16, [4096], [1.0], r.Assumptions())
    assert row["fixed"]["bound"] == "compute"
    assert row["smaller"][0]["operator_saved"] > 0.45


def test_launches_are_what_small_experts_cannot_save() -> None:
    slow = r.estimate(H100, NEMOTRON, INT4, 1, 1, r.Assumptions(launch_seconds=5e-6))
    assert slow.bound == "launch"
    assert slow.overhead > 0.5
    assert r.estimate(H100, NEMOTRON, INT4, 1, 1, r.Assumptions(launch_seconds=0)).overhead < 0.1


# ---------------------------------------------------------------- in step with the kernels


def test_the_paths_are_the_launchers() -> None:
    launcher = (h.PLUGIN / "cuda" / "moe" / "launcher.cu").read_text()
    plan = (h.PLUGIN / "cuda" / "moe" / "plan.h").read_text()

    def constant(text: str, name: str) -> int:
        found = re.search(rf"constexpr \w+ {name} = (\d+);", text)
        assert found, f"{name} is gone; benchmarks/roofline.py models the launcher's choice of path"
        return int(found[1])

    assert constant(launcher, "kDecodeTokens") == r.DECODE_TOKENS
    assert constant(launcher, "kMostDecodeTokens") == r.MOST_DECODE_TOKENS
    assert constant(launcher, "kDecodeRowsPerExpert") == r.DECODE_ROWS_PER_EXPERT
    assert constant(plan, "kPlanTokens") == r.PLAN_TOKENS
    mixed = (h.PLUGIN / "cuda" / "moe" / "mixed.cu").read_text()
    assert (constant(mixed, "kFewRows"), constant(mixed, "kManyRows")) == (r.FEW_ROWS, r.MANY_ROWS)


@pytest.mark.parametrize(("tokens", "decode"), [(1, True), (8, True), (16, True), (17, False), (200, False)])
def test_mixtrals_path_by_tokens(tokens: int, decode: bool) -> None:
    assert r.takes_decode_path(MIXTRAL, tokens) == decode
    assert ("decode up" in inside(MIXTRAL, BF16, tokens, 1)) == decode
    assert ("mixed up" in inside(MIXTRAL, INT8, tokens, 1)) != decode


# ---------------------------------------------------------------- what is shown


def test_everything_shown_is_marked_as_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "deep" / "roofline.json"
    r.main(["--gpu", "all", "--tokens", "1", "64", "--weights", "bf16", "int8", "--output", str(output)])
    printed = capsys.readouterr().out
    tables = [block for block in printed.split("\n\n") if "tokens" in block and "saved" in block]
    assert len([block for block in tables if r.MARK in block]) == 2 * 2 * 5
    for gpu in r.GPUS.values():
        assert f"{gpu.name}: {gpu.source}" in printed
    content = json.loads(output.read_text())
    assert content["kind"] == r.MARK
    assert len(content["results"]) == 2 * 2 * 5 * 2


def test_a_measured_load_is_taken_for_the_model_that_it_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load, output = tmp_path / "load.json", tmp_path / "out.json"
    load.write_text(json.dumps([4, 1, 1, 1, 1, 1, 1, 1]))
    r.main(["--load", str(load), "--weights", "bf16", "--tokens", "4", "--output", str(output)])
    printed = capsys.readouterr().out
    assert "Nemotron 3 Nano 30B-A3B left out: it has 128 experts" in printed
    [row] = json.loads(output.read_text())["results"]
    assert row["fixed"]["distinct_experts"] == pytest.approx(r.distinct_experts(8, 2, 4, [4, 1, 1, 1, 1, 1, 1, 1]))


def test_a_load_file_of_another_form_is_refused(tmp_path: Path) -> None:
    load = tmp_path / "load.json"
    load.write_text('{"a": 1}')
    with pytest.raises(SystemExit, match="must hold a JSON list"):
        r.main(["--load", str(load)])


def test_quantised_weights_past_their_use_are_called_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    r.main(["--model", "mixtral-8x7b", "--weights", "int8", "--output", str(tmp_path / "o.json")])
    assert "tokens on, int8 takes longer than bf16 would" in capsys.readouterr().out


# ---------------------------------------------------------------- the scan

MAMBA = r.MAMBA_LAYERS["nemotron-3-nano"]


def test_the_scan_in_decode_is_its_states() -> None:
    """Bytes by hand: 2 MB of state read and written for each sequence, everything else is small."""
    assert MAMBA.state_bytes == 64 * 64 * 128 * 4
    assert MAMBA.channels == 6144
    for sequences in (1, 16):
        convolve, recur = r.scan_kernels(MAMBA, sequences, 1)
        own = sequences * (6144 + 64 + 4096) * 2
        assert recur.bytes == sequences * 2 * MAMBA.state_bytes + own
        assert convolve.bytes == sequences * (2 * 6144 * 2 + 2 * 3 * 6144 * 2) + 4 * 5 * 6144
        assert recur.times(H100, IDEAL)["memory"] > recur.times(H100, IDEAL)["compute"]


def test_the_scan_in_prefill_reads_its_states_once_and_multiplies_in_chunks() -> None:
    _, recur, chunks = r.scan_kernels(MAMBA, 2, 4096)
    assert (recur.bytes, recur.flops) == (0, 0)
    assert chunks.bytes == 4 * MAMBA.state_bytes + 2 * 4096 * (6144 + 64 + 4096) * 2
    a_chunk = 2 * (32 * 32 * 128 + 32 * 128 * 32 + 32 * 128 * 32 + 32 * 32 * 32)
    assert chunks.flops == 2 * 128 * 128 * a_chunk  # sequences, chunks, pairs of heads and halves of their columns
    assert chunks.unit == "mma"


def test_the_scans_constants_are_the_kernels() -> None:
    folder = h.REPOSITORY / "plugin" / "cuda" / "mamba"

    def constant(name: str, file: str) -> int:
        found = re.search(rf"constexpr (?:int32_t|int) {name} = (\d+);", (folder / file).read_text())
        assert found
        return int(found[1])

    assert constant("kRecurrentTokens", "kernels.h") == r.RECURRENT_TOKENS
    assert constant("kChunk", "chunks.cu") == r.SCAN_CHUNK
    assert constant("kColumns", "chunks.cu") == r.SCAN_COLUMNS


def test_the_scans_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    r.main(["--scan", "--gpu", "h100", "rtx4090", "--output", str(tmp_path / "out.json")])
    text = capsys.readouterr().out
    assert text.count(r.MARK) == 2
    assert "Nemotron 3 Nano" in text
    assert "Mixtral" not in text
