# SPDX-License-Identifier: Apache-2.0
"""On a GPU: the same cases as in the interpreter, and what only hardware can show."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cuda_cases import check_all, make_decided, make_inputs, make_unread
from cuda_launcher import Layer
from gpu_device import DeviceLayer, Gpu

from adaptive_k_moe.plugin.description import MOE

from checkpoints import SUPPORT


def run_and_check(gpu: Gpu, layer: Layer, seed: int, logits: str = "plain", **options: Any) -> None:
    inputs, exact = make_inputs(layer, seed, logits=logits, **options)
    assert gpu.check(layer) is None
    check_all(layer, exact, gpu.run(layer, inputs))


@pytest.mark.parametrize("logits", ["plain", "ties", "special"])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("experts", [1, 2, 3, 8, 31, 64, 128, 129, 200, 512])
def test_routing(gpu: Gpu, experts: int, scoring: str, logits: str) -> None:
    layer = Layer(14, 8, 8, experts, element="float32", scoring=scoring)
    run_and_check(gpu, layer, experts, logits, bias=scoring == "sigmoid")


@pytest.mark.parametrize(("experts", "n_group", "topk_group"), [(8, 2, 1), (64, 8, 4), (128, 128, 9), (256, 8, 4)])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_routing_within_groups(gpu: Gpu, experts: int, n_group: int, topk_group: int, scoring: str) -> None:
    layer = Layer(9, 8, 8, experts, element="float32", scoring=scoring, n_group=n_group, topk_group=topk_group)
    for logits in ("plain", "ties", "special"):
        run_and_check(gpu, layer, experts, logits, bias=True)


@pytest.mark.parametrize("experts", [8, 128, 512])
@pytest.mark.parametrize("tokens", [1, 32, 33, 128, 129, 300])
def test_tokens_that_share(gpu: Gpu, tokens: int, experts: int) -> None:
    layer = Layer(tokens, 8, 8, experts, element="float32", max_k=6)
    inputs, exact = make_decided(layer, tokens, logits="special")
    check_all(layer, exact, gpu.run(layer, inputs))


@pytest.mark.parametrize("weights", ["element", "int8"])
@pytest.mark.parametrize("path", ["decode", "prefill"])
@pytest.mark.parametrize("tokens", [3, 40, 140])
def test_nothing_read_is_nothing_run(gpu: Gpu, tokens: int, path: str, weights: str) -> None:
    layer = Layer(tokens, 64, 64, 8, path=path, weights=weights, max_k=4)
    result = gpu.run(layer, make_unread(layer))
    assert (result.k == 0).all() and len(result.active) == 0
    assert (result.output == 0).all()


@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 129, 1000])
@pytest.mark.parametrize("experts", [1, 5, 130])
def test_plan(gpu: Gpu, tokens: int, experts: int) -> None:
    run_and_check(gpu, Layer(tokens, 8, 8, experts, path="prefill", max_k=4), tokens)


@pytest.mark.parametrize("path", ["decode", "prefill"])
@pytest.mark.parametrize("element", ["float16", "bfloat16"])
@pytest.mark.parametrize("activation", MOE.attributes[0].words)
def test_every_activation(gpu: Gpu, activation: str, element: str, path: str) -> None:
    run_and_check(gpu, Layer(3, 40, 24, 4, element=element, activation=activation, path=path), 11)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 23])
@pytest.mark.parametrize(("hidden", "intermediate"), [(8, 8), (264, 40), (1032, 2056)])
@pytest.mark.parametrize("element", ["float16", "bfloat16", "float32"])
def test_decode(gpu: Gpu, element: str, hidden: int, intermediate: int, tokens: int) -> None:
    run_and_check(gpu, Layer(tokens, hidden, intermediate, 3, element=element, path="decode", max_k=2), tokens)


@pytest.mark.parametrize("element", ["float16", "bfloat16"])
@pytest.mark.parametrize("experts", [1, 3, 64])
@pytest.mark.parametrize("tokens", [1, 17, 200, 700])
@pytest.mark.parametrize(("hidden", "intermediate"), [(8, 8), (136, 264), (512, 384)])
def test_grouped_products(gpu: Gpu, hidden: int, intermediate: int, tokens: int, experts: int, element: str) -> None:
    """CUTLASS's kernels, which the interpreter replaces: both tile shapes, empty experts, ragged sizes."""
    layer = Layer(tokens, hidden, intermediate, experts, element=element, path="prefill", max_k=2)
    run_and_check(gpu, layer, tokens)


@pytest.mark.parametrize("path", ["decode", "prefill"])
@pytest.mark.parametrize("element", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("weights", "group_size"), [("int8", 32), ("int8", 0), ("int4", 32), ("int4", 128), ("int4", 0)]
)
@pytest.mark.parametrize("tokens", [1, 9, 150])
def test_quantised_weights(gpu: Gpu, tokens: int, weights: str, group_size: int, element: str, path: str) -> None:
    layer = Layer(tokens, 256, 384, 4, element=element, weights=weights, group_size=group_size, path=path, max_k=3)
    run_and_check(gpu, layer, tokens)


MODELS = {
    "mixtral": dict(hidden=4096, intermediate=14336, experts=8, max_k=2, activation="swiglu"),
    "nemotron": dict(
        hidden=2688,
        intermediate=1856,
        experts=128,
        max_k=6,
        activation="relu2",
        scoring="sigmoid",
        routed_scaling_factor=2.5,
    ),
}


@pytest.mark.parametrize("path", ["decode", "prefill"])
@pytest.mark.parametrize("model", MODELS)
def test_a_layer_of_a_real_model(gpu: Gpu, model: str, path: str) -> None:
    """Full size, few tokens; a slice of the intermediate size for Mixtral, whose oracle would take minutes."""
    shape = dict(MODELS[model])
    if model == "mixtral":
        shape["intermediate"] = 1792
    run_and_check(gpu, Layer(tokens=6, path=path, **shape), 1, most=shape["max_k"])


@pytest.mark.parametrize("path", ["decode", "prefill"])
@pytest.mark.parametrize("weights", ["element", "int4"])
def test_results_repeat_bit_for_bit(gpu: Gpu, weights: str, path: str) -> None:
    layer = Layer(100, 256, 512, 16, weights=weights, path=path, max_k=4)
    inputs, _ = make_inputs(layer, 3, logits="ties")
    first = gpu.run(layer, inputs)
    for _ in range(10):
        again = gpu.run(layer, inputs)
        for name in ("output", "k", "entropy", "weights", "row_token"):
            assert getattr(first, name).tobytes() == getattr(again, name).tobytes(), name


@pytest.mark.parametrize("path", ["decode", "prefill"])
@pytest.mark.parametrize("weights", ["element", "int8"])
def test_a_captured_graph_follows_new_inputs(gpu: Gpu, weights: str, path: str) -> None:
    """Capturing refuses whatever waits or allocates; replays route and share anew, by other inputs."""
    layer = Layer(24, 128, 256, 8, weights=weights, path=path, max_k=4)
    inputs, exact = make_decided(layer, 0)
    on_device = DeviceLayer(gpu, layer, inputs)
    on_device.launch(gpu.stream)  # what happens once (loading code) happens now
    gpu.driver.synchronize(gpu.stream)
    gpu.driver.begin_capture(gpu.stream)
    on_device.launch(gpu.stream)
    graph = gpu.driver.end_capture(gpu.stream)
    changing = ("hidden_states", "router_logits", "policy_index", "thresholds", "k_values")
    for seed in range(1, 4):
        fresh, _ = make_decided(layer, seed)
        changed = {name: fresh[name] for name in changing}
        for name, array in changed.items():
            on_device.update(name, array)
        gpu.driver.launch_graph(graph, gpu.stream)
        gpu.driver.synchronize(gpu.stream)
        result = on_device.result()
        check_all(layer, {**exact, **changed}, result)
        direct = gpu.run(layer, {**inputs, **changed})
        assert result.output.tobytes() == direct.output.tobytes()
    on_device.free()


@pytest.mark.parametrize("path", ["decode", "prefill"])
def test_experts_beyond_the_reach_of_32_bit_offsets(gpu: Gpu, path: str) -> None:
    """More than 2^31 weights: the last expert gives what it gives alone."""
    experts, hidden, intermediate = 24, 4096, 14336
    layer = Layer(3, hidden, intermediate, experts, path=path, max_k=1, activation="swiglu")
    one = replace(layer, experts=1)
    inputs, _ = make_inputs(one, 0)
    size = {"up": experts * 2 * intermediate * hidden * 2, "down": experts * hidden * intermediate * 2}
    if gpu.driver.free_memory() < sum(size.values()) * 5 // 4:
        pytest.skip("needs 11 GB of GPU memory")
    alone = gpu.run(one, inputs)
    logits = np.zeros((3, experts), np.float32)
    logits[:, -1] = 5
    layer.policies, layer.choices = one.policies, one.choices
    many = {**inputs, "router_logits": logits}
    weights = {name: many.pop(name) for name in ("up", "down")}
    on_device = DeviceLayer(gpu, layer, many)
    for name, array in weights.items():
        address = gpu.driver.allocate(size[name])
        gpu.driver.fill(address, 0, size[name])
        gpu.driver.write(address + size[name] - array.nbytes, array)
        on_device.pointers[name] = address
    on_device.launch(gpu.stream)
    gpu.driver.synchronize(gpu.stream)
    assert on_device.result().output.tobytes() == alone.output.tobytes()
    on_device.free()


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer(gpu: Gpu, tool: str) -> None:
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    script = SUPPORT / "sanitized_launches.py"
    own = ["--own"] if tool in ("racecheck", "initcheck") else []
    done = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", sys.executable, script, *own],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
