# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks on a GPU compare with computes the same layer; and what a bare machine lacks is not asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_cases import make_inputs
from cuda_launcher import Layer
from moe_layers import LAYERS
from moe_peers import TOLERANCE, Peers

ROOT = Path(__file__).resolve().parents[2]
SMALL = {name: LAYERS[name] for name in ("tiny", "tiny-ungated")}


@pytest.mark.parametrize("tokens", [1, 5, 150])
@pytest.mark.parametrize("layer", SMALL)
def test_torchs_grouped_products_are_the_loop(layer: str, tokens: int) -> None:
    peers = Peers(SMALL[layer], "cpu")
    for k in (1, peers.layer.top_k):
        assert peers.error(peers.grouped, tokens, k) <= TOLERANCE


@pytest.mark.parametrize("layer", SMALL)
def test_the_loop_is_the_oracles_layer(layer: str) -> None:
    """With the routing, so that our kernels and the peers are timed on the same work."""
    import oracle

    m = SMALL[layer]
    ours = Layer(
        20, m.hidden, m.intermediate, m.experts, element="float32", activation=m.activation, scoring=m.scoring,
        routed_scaling_factor=m.routed_scaling_factor, max_k=m.top_k,
    )  # fmt: skip
    inputs, exact = make_inputs(ours, 0)
    k = m.top_k
    common = (
        np.zeros(20, np.int32),
        np.zeros(1, np.int32),
        np.zeros((1, 0)),
        np.array([[k]]),
        exact["up"],
        exact["down"],
    )
    expected, _, _ = oracle.moe(
        exact["hidden_states"], exact["router_logits"], *common, activation=m.activation, scoring=m.scoring,
        routed_scaling_factor=m.routed_scaling_factor,
    )  # fmt: skip
    peers = Peers(m, "cpu")
    peers.up, peers.down = torch.from_numpy(exact["up"]), torch.from_numpy(exact["down"])
    found = peers.loop(torch.from_numpy(inputs["hidden_states"]), torch.from_numpy(inputs["router_logits"]), k)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5 * np.abs(expected).max())


TRITON = """
import sys
import torch
from moe_layers import LAYERS, MoeLayer
from moe_peers import Peers

class InFloat16(Peers):  # the interpreter multiplies bfloat16's bits as integers
    def random(self, *shape, spread=1.0):
        return torch.empty(shape).normal_(0, spread).half()

odd, many = MoeLayer(80, 48, 5, 3), MoeLayer(64, 64, 130, 8)
for layer in (LAYERS["tiny"], LAYERS["tiny-ungated"], odd, many):
    peers = InFloat16(layer, "cpu")
    for tokens in (1, 5, 150, 500):
        for k in (1, layer.top_k):
            error = peers.error(peers.fused, tokens, k)
            assert error < 2e-3, (layer, tokens, k, error)
"""


def test_the_triton_kernel_is_the_loop() -> None:
    """In Triton's interpreter, with each of its tiles."""
    pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for CUDA")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", TRITON], env=env, check=True)


def test_cuda_alone_needs_no_headers_of_python(tmp_path: Path) -> None:
    options = ["-DADAPTIVE_K_OPENVINO=OFF", "-DADAPTIVE_K_PYTHON=OFF", "-DPython_INCLUDE_DIR=/nowhere"]
    options += [f"-DPython_EXECUTABLE={sys.executable}"]
    done = subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
