# SPDX-License-Identifier: Apache-2.0
"""Mamba2 on a GPU: the interpreter's cases, a real model's layer, and what only hardware can show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cuda_launcher import ELEMENTS
from cuda_mamba import CASES, check, layer_of, make
from gpu_device import Gpu
from gpu_mamba import DeviceMamba, run

from mamba_oracle import Case

NEMOTRON: dict[str, Any] = {"heads": 64, "head_dim": 64, "state_size": 128, "n_groups": 8}


@pytest.mark.parametrize("slow", [False, True], ids=["short memory", "long memory"])
@pytest.mark.parametrize("element", list(ELEMENTS))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_scan_is_the_oracles(gpu: Gpu, case: Case, element: str, slow: bool) -> None:
    given, exact = make(case, element, slow=slow)
    check(case, exact, element, run(gpu, case, given, element))


@pytest.mark.parametrize("element", ["float16", "bfloat16"])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (200,), (1, 70, 1, 3)], ids=str)
def test_the_scan_of_a_real_model(gpu: Gpu, lengths: tuple[int, ...], element: str) -> None:
    """Nemotron 3 Nano's layer, whole."""
    case = Case(lengths, tuple(range(len(lengths))), **NEMOTRON)
    given, exact = make(case, element, slow=True)
    check(case, exact, element, run(gpu, case, given, element))


def test_the_scan_over_a_long_prompt(gpu: Gpu) -> None:
    """Float32, token by token, is the oracle of the chunks here: NumPy would take minutes."""
    case = Case((5000,), (0,), **NEMOTRON)
    given, rounded = make(case, "bfloat16", slow=True)
    y, _, state = run(gpu, case, given, "bfloat16")
    expected = run(gpu, case, rounded, "float32")
    assert np.abs(y.astype(np.float32) - expected[0]).max() <= 1.6e-2 * np.abs(expected[0]).max()
    slot = given["state_slots"][0]
    assert np.abs(state[slot] - expected[2][slot]).max() <= 1.6e-2 * np.abs(expected[2][slot]).max()


@pytest.mark.parametrize("element", list(ELEMENTS))
def test_the_scan_repeats_bit_for_bit(gpu: Gpu, element: str) -> None:
    case = Case((1, 100, 1, 3), (4, 0, 1, 7), **NEMOTRON)
    given, _ = make(case, element)
    first = run(gpu, case, given, element)
    for _ in range(10):
        for again, expected in zip(run(gpu, case, given, element), first, strict=True):
            assert again.tobytes() == expected.tobytes()


@pytest.mark.parametrize("lengths", [(1, 1, 1), (70, 1)], ids=["decode", "mixed"])
def test_a_captured_graph_carries_the_states_of_the_scan_on(gpu: Gpu, lengths: tuple[int, ...]) -> None:
    """Replays of one graph are the steps of a generation: each starts where the one before it ended."""
    case = Case(lengths, tuple(3 for _ in lengths), heads=4, head_dim=64, state_size=128, n_groups=2)
    given, exact = make(case, "float16", slow=True)
    step = DeviceMamba(gpu, layer_of(case, given, "float16"), given)
    step.launch(gpu.stream)  # what happens once (loading code) happens now
    gpu.driver.synchronize(gpu.stream)
    gpu.driver.begin_capture(gpu.stream)
    step.launch(gpu.stream)
    graph = gpu.driver.end_capture(gpu.stream)
    for name in ("conv_state", "ssm_state"):
        step.update(name, given[name])
    for number in range(1, 4):
        fresh, rounded = make(case, "float16", seed=number)
        for name in ("conv_input", "dt"):
            step.update(name, fresh[name])
            exact[name] = rounded[name]
        before = step.result()
        exact["conv_state"], exact["ssm_state"] = before[1].astype(np.float32), before[2].copy()
        gpu.driver.launch_graph(graph, gpu.stream)
        gpu.driver.synchronize(gpu.stream)
        check(case, exact, "float16", step.result())
    step.free()


def test_states_beyond_the_reach_of_32_bit_offsets(gpu: Gpu) -> None:
    """More than 2^31 numbers in the states: the last slot gives what it gives alone."""
    case = Case((1,), (3,), **NEMOTRON)
    given, _ = make(case, "float16")
    layer = layer_of(case, given, "float16")
    state_bytes = 64 * 128 * 64 * 4
    slots = (1 << 33) // state_bytes + 2
    conv_bytes = 3 * layer.channels * 2
    if gpu.driver.free_memory() < slots * (state_bytes + conv_bytes) * 5 // 4:
        pytest.skip("needs 11 GB of GPU memory")
    alone = run(gpu, case, given, "float16")
    slot = int(given["state_slots"][0])
    step = DeviceMamba(gpu, replace(layer, slots=slots), given)
    for name, size in (("conv_state", conv_bytes), ("ssm_state", state_bytes)):
        gpu.driver.free(step.pointers[name] or 0)
        step.pointers[name] = gpu.driver.allocate(slots * size)
        gpu.driver.write((step.pointers[name] or 0) + (slots - 1) * size, given[name][slot])
    step.update("state_slots", np.array([slots - 1], np.int32))
    step.launch(gpu.stream)
    gpu.driver.synchronize(gpu.stream)
    assert step.result()[0].tobytes() == alone[0].tobytes()
    state = gpu.driver.read((step.pointers["ssm_state"] or 0) + (slots - 1) * state_bytes, state_bytes)
    assert state == alone[2][slot].tobytes()
    step.free()
