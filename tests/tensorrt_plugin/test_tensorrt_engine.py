# SPDX-License-Identifier: Apache-2.0
"""The plugin in real engines on a real GPU: parsed, built, serialized, run, captured, and compared with the oracle.

Needs TensorRT's Python package, a torch with CUDA, and the library, by default build/cuda/libadaptive_k_tensorrt.so
(ADAPTIVE_K_TENSORRT_LIBRARY names another), built for the TensorRT at hand. See docs/tensorrt_plugin.md.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import plugin_harness as h
import pytest
from layer_cases import CASES, Case, check, make_case
from onnx import TensorProto
from onnx_layer import OUTPUTS, layer_model

LIBRARY = Path(os.environ.get("ADAPTIVE_K_TENSORRT_LIBRARY", h.REPOSITORY / "build/cuda/libadaptive_k_tensorrt.so"))
INPUTS = ("hidden_states", "router_logits", "policy_index", "policy_kind", "thresholds", "k_values")
MAX_TOKENS = 64


def missing() -> str | None:
    """Why there is nothing to test on, if so."""
    try:
        from tensorrt import Builder  # noqa: F401 (this folder, too, can be imported as tensorrt)
    except ImportError:
        return "TensorRT's Python package is not installed"
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU that torch can use"
    if not LIBRARY.exists():
        return f"{LIBRARY} is not built"
    return None


WHY_NOT = missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]


class Engine:
    """An engine of one layer, from its ONNX file through TensorRT's parser, builder and serialization."""

    def __init__(self, case: Case) -> None:
        import tensorrt as trt

        self.case = case
        self.logger = trt.Logger(trt.Logger.WARNING)
        registry = trt.get_plugin_registry()
        if registry.get_creator("AdaptiveKMoe", "1", "adaptive_k") is None:
            registry.load_library(str(LIBRARY))
        builder = trt.Builder(self.logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self.logger)
        assert parser.parse(self.graph()), [str(parser.get_error(i)) for i in range(parser.num_errors)]
        config = builder.create_builder_config()
        profile = builder.create_optimization_profile()
        for name, array in zip(INPUTS[:3], case.inputs, strict=False):  # the others have no unknown size
            profile.set_shape(name, *((tokens, *array.shape[1:]) for tokens in (1, 8, MAX_TOKENS)))
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        assert plan is not None, "TensorRT built no engine"
        self.runtime = trt.Runtime(self.logger)
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        assert self.engine is not None, "TensorRT did not take its own engine back"

    def graph(self) -> bytes:
        layer = self.case.layer
        names = ["up", "down"] + ["correction_bias"] * layer.bias
        names += ["up_scales", "down_scales"] * bool(layer.weights)
        names += ["expert_norms"] * layer.norms
        element = {h.FLOAT: TensorProto.FLOAT, h.HALF: TensorProto.FLOAT16, h.BF16: TensorProto.BFLOAT16}[layer.element]
        return layer_model(
            {**self.case.attributes, "plugin_namespace": "adaptive_k", "plugin_version": "1"},
            dict(zip(names, self.case.inputs[len(INPUTS) :], strict=True)),
            policies=(layer.policies, layer.choices),
            element=element,
        )

    def context(self) -> Any:
        return self.engine.create_execution_context()


def on_device(array: np.ndarray[Any, Any]) -> Any:
    """A CUDA tensor of the same bytes."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).reshape(-1).copy()).cuda()


class Step:
    """One execution's tensors on the device."""

    def __init__(self, context: Any, case: Case) -> None:
        import torch

        self.case = case
        self.context = context
        self.inputs = [on_device(array) for array in case.inputs[: len(INPUTS)]]
        for name, array, tensor in zip(INPUTS, case.inputs, self.inputs, strict=False):
            assert context.set_input_shape(name, array.shape)
            # An empty table still needs an address.
            context.set_tensor_address(name, tensor.data_ptr() or self.inputs[0].data_ptr())
        self.expected = [*(np.asarray(array) for array in case.expected), np.zeros(case.layer.experts, np.int32)]
        dtypes = (case.inputs[0].dtype, np.dtype(np.int32), np.dtype(np.float32), np.dtype(np.int32))
        self.dtypes = dtypes
        self.outputs = [
            torch.full((array.size * dtype.itemsize,), 255, dtype=torch.uint8, device="cuda")
            for array, dtype in zip(self.expected, dtypes, strict=True)
        ]
        for name, tensor in zip(OUTPUTS, self.outputs, strict=True):
            context.set_tensor_address(name, tensor.data_ptr())

    def run(self) -> None:
        import torch

        stream = torch.cuda.current_stream()
        assert self.context.execute_async_v3(stream.cuda_stream)

    def read(self) -> tuple[Any, Any, Any]:
        import torch

        torch.cuda.synchronize()
        found = [
            tensor.cpu().numpy().view(dtype).reshape(array.shape)
            for tensor, dtype, array in zip(self.outputs, self.dtypes, self.expected, strict=True)
        ]
        assert found[3].min() >= 0 and found[3].sum() == found[1].sum()
        return found[0], found[1], found[2]

    def bits(self) -> list[bytes]:
        return [array.tobytes() for array in self.read()]


@cache
def engine(name: str) -> Engine:
    layer, attributes = CASES[name]
    return Engine(make_case(sorted(CASES).index(name), layer, **attributes))


def started(name: str) -> Step:
    made = engine(name)
    step = Step(made.context(), made.case)
    step.run()
    return step


@pytest.mark.parametrize("name", CASES)
def test_an_engine_computes_the_operator(name: str) -> None:
    step = started(name)
    check(step.case, step.read())


@pytest.mark.parametrize("name", ["float16-40", "bfloat16-5"])
def test_an_engine_repeats_bit_for_bit(name: str) -> None:
    step = started(name)
    before = step.bits()
    step.run()
    assert step.bits() == before
    assert started(name).bits() == before  # another context


@pytest.mark.parametrize("name", ["float16-1", "float16-40", "sigmoid-groups-bias"])
def test_an_engine_runs_inside_a_cuda_graph(name: str) -> None:
    import torch

    step = started(name)
    eager = step.bits()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    for tensor in step.outputs:
        tensor.fill_(255)
    graph.replay()
    assert step.bits() == eager


def test_a_wrong_node_is_refused_by_the_parser() -> None:
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    made = engine("float16-1")
    assert not parser.parse(made.graph().replace(b"swiglu", b"swigl_"))
    assert "layers.0.moe" in str(parser.get_error(0))
