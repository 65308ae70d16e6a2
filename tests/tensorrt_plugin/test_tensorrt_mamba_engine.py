# SPDX-License-Identifier: Apache-2.0
"""Mamba2's plugin in a real engine on a real GPU: built, serialized, run with its states in place, and captured.

Needs what test_tensorrt_engine.py needs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from plugin_harness import BF16, HALF, MambaTensors
from test_tensorrt_engine import LIBRARY, WHY_NOT, on_device
from test_tensorrt_mamba import mamba_graph

from adaptive_k_moe.plugin.description import MAMBA

from mamba_oracle import Array, Case, make_inputs, oracle

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

SLOTS = 5
SIZES: dict[str, Any] = {"heads": 4, "head_dim": 8, "state_size": 16, "n_groups": 2}
DTYPES = {HALF: np.dtype(np.float16), BF16: np.dtype(ml_dtypes.bfloat16)}
TOLERANCES = {HALF: 2e-3, BF16: 1.6e-2}


@cache
def engine(element: int) -> Any:
    """An engine of one layer, through the parser, the builder and serialization."""
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.WARNING)
    registry = trt.get_plugin_registry()
    if registry.get_creator("Mamba2", "1", "adaptive_k") is None:
        registry.load_library(str(LIBRARY))
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    graph = mamba_graph(MambaTensors(slots=SLOTS, element=element), n_groups=2, plugin_namespace="adaptive_k")
    assert parser.parse(graph), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    corners = [
        [t.shape for t in MambaTensors(tokens=tokens, sequences=sequences, slots=SLOTS, element=element).inputs()]
        for tokens, sequences in ((1, 1), (8, 3), (64, 4))
    ]
    for name, *shapes in zip(MAMBA.input_names(), *corners, strict=True):
        profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, "TensorRT built no engine"
    runtime = trt.Runtime(logger)
    made = runtime.deserialize_cuda_engine(plan)
    assert made is not None, "TensorRT did not take its own engine back"
    return runtime, made


class Step:
    """One execution's tensors on the device; the states are bound in place."""

    def __init__(self, case: Case, element: int, *, seed: int = 0) -> None:
        import torch

        self.case, self.element = case, element
        arrays = make_inputs(case, seed)
        arrays["state_slots"] = np.arange(SLOTS)[::-1][: len(case.lengths)].astype(np.int32)
        for name in ("conv_state", "ssm_state"):
            arrays[name] = np.nan_to_num(arrays[name][:SLOTS])
        for name in ("conv_input", "dt", "conv_state"):
            arrays[name] = arrays[name].astype(DTYPES[element])
        self.arrays = arrays
        self.context = engine(element)[1].create_execution_context()
        self.inputs = {name: on_device(x) for name, x in zip(MAMBA.input_names(), arrays.values(), strict=True)}
        for (name, tensor), array in zip(self.inputs.items(), arrays.values(), strict=True):
            assert self.context.set_input_shape(name, array.shape)
            self.context.set_tensor_address(name, tensor.data_ptr())
        rows, width = sum(case.lengths), case.heads * case.head_dim
        self.y = torch.full((rows * width * 2,), 255, dtype=torch.uint8, device="cuda")
        places = (self.y, self.inputs["conv_state"], self.inputs["ssm_state"])
        for name, tensor in zip(MAMBA.output_names(), places, strict=True):
            self.context.set_tensor_address(name, tensor.data_ptr())

    def run(self) -> None:
        import torch

        assert self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream)

    def result(self) -> tuple[Array, Array, Array]:
        import torch

        torch.cuda.synchronize()

        def read(tensor: Any, like: Array) -> Array:
            return np.asarray(tensor.cpu().numpy().view(like.dtype).reshape(like.shape))

        own = DTYPES[self.element]
        y = self.y.cpu().numpy().view(own).reshape(sum(self.case.lengths), -1)
        states = (read(self.inputs[name], self.arrays[name]) for name in ("conv_state", "ssm_state"))
        return (y, *states)

    def check(self, before: dict[str, Array]) -> None:
        """Against the oracle, from the states that there were before."""
        exact = {name: x.astype(np.float32) if x.dtype.kind != "i" else x for name, x in before.items()}
        for found, expected in zip(self.result(), oracle(self.case, exact), strict=True):
            error = np.abs(found.astype(np.float64) - expected).max()
            assert error <= TOLERANCES[self.element] * np.abs(expected).max()


@pytest.mark.parametrize("element", DTYPES)
@pytest.mark.parametrize("lengths", [(1,), (40,), (1, 33, 1, 3)], ids=str)
def test_an_engine_updates_the_states_where_they_are_bound(lengths: tuple[int, ...], element: int) -> None:
    step = Step(Case(lengths, tuple(range(len(lengths))), **SIZES), element)
    step.run()
    step.check(step.arrays)


def test_an_engine_carries_the_states_on_inside_a_cuda_graph() -> None:
    import torch

    step = Step(Case((1, 1, 1), (2, 3, 4), **SIZES), HALF)
    step.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    for _ in range(3):
        _, conv_state, ssm_state = step.result()
        graph.replay()
        step.check({**step.arrays, "conv_state": conv_state, "ssm_state": ssm_state})


def test_an_engines_states_bound_apart_come_out_whole() -> None:
    import torch

    step = Step(Case((1, 5), (2, 0), **SIZES), HALF)
    apart = {name: torch.zeros_like(step.inputs[name]) for name in ("conv_state", "ssm_state")}
    for name, tensor in apart.items():
        step.context.set_tensor_address(f"present_{name}", tensor.data_ptr())
    step.run()
    torch.cuda.synchronize()
    for name, tensor in apart.items():
        assert step.inputs[name].cpu().numpy().tobytes() == step.arrays[name].tobytes()
        step.inputs[name] = tensor
    step.check(step.arrays)
