# SPDX-License-Identifier: Apache-2.0
"""A node as the builder writes it, run by the plugin's kernels (in the interpreter) and by ONNX Runtime.

The same attributes and the same bytes of the weights go to both; ONNX Runtime runs the operator's function body.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import plugin_harness as h
import pytest
from layer_cases import TOLERANCES, Array, aligned
from onnx import TensorProto, helper, numpy_helper
from plugin_harness import PluginLibrary, Tensor

from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_builder.targets.tensorrt_lowering import for_plugin, lower_graph

from checkpoints import Shape, make_checkpoint
from nemotron_models import Nemotron, make_nemotron

MIXTRAL = Shape("wide", {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96})
NEMOTRON = Nemotron(
    "one of each", "E*",
    {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64},
)  # fmt: skip

TYPES = {np.dtype(np.float16): h.HALF, np.dtype(np.float32): h.FLOAT, np.dtype(np.int8): h.INT8,
         np.dtype(np.int32): h.INT32}  # fmt: skip


def operands(model: onnx.ModelProto, directory: Path, tokens: int) -> tuple[onnx.NodeProto, dict[str, Array]]:
    """The first MoE node of a lowered graph, and values for all of its inputs."""
    node = next(node for node in model.graph.node if node.op_type == "AdaptiveKMoe")
    weights = {
        t.name: numpy_helper.to_array(t, str(directory)) for t in model.graph.initializer if t.name in node.input
    }
    rng = np.random.default_rng(1)
    experts, hidden = weights[node.input[7]].shape[:2]
    logits = rng.standard_normal((tokens, experts)).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    entropies = np.sort(-(probabilities * np.log(probabilities)).sum(-1))
    values = [
        rng.standard_normal((tokens, hidden)).astype(np.float16),
        logits,
        np.zeros(tokens, np.int32),
        np.zeros(1, np.int32),
        np.array([[entropies[tokens // 2 - 1 : tokens // 2 + 1].mean()]], np.float32),
        np.array([[1, 3]], np.int32),
    ]
    feed = dict(zip(node.input[:6], values, strict=True)) | weights
    feed[node.input[-1]] = np.ones(experts, np.float32)
    assert feed.keys() == set(node.input)
    return node, feed


def by_function_body(model: onnx.ModelProto, node: onnx.NodeProto, feed: dict[str, Array]) -> list[Array]:
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in feed.items()
    ]
    types = (TensorProto.FLOAT16, TensorProto.INT32, TensorProto.FLOAT, TensorProto.INT32)
    outputs = [helper.make_tensor_value_info(n, type_, None) for n, type_ in zip(node.output, types, strict=True)]
    alone = onnx.ModelProto()
    alone.CopyFrom(model)
    alone.graph.CopyFrom(helper.make_graph([node], "alone", inputs, outputs))
    session = ort.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(list(node.output), feed))


@pytest.mark.parametrize("tokens", [3, 70])  # by the kernels for few tokens, and by those for many
@pytest.mark.parametrize("precision", [None, "int8", "int4"])
@pytest.mark.parametrize("shape", [MIXTRAL, NEMOTRON], ids=str)
def test_the_kernels_read_what_the_builder_writes(
    computing: PluginLibrary, shape: Shape | Nemotron, precision: Any, tokens: int, tmp_path: Path
) -> None:
    make: Any = make_nemotron if isinstance(shape, Nemotron) else make_checkpoint
    config = build(make(tmp_path / "checkpoint", shape), tmp_path / "engine", target="onnx", dtype="float16",
                   weight_only_precision=precision, max_seq_len=32)  # fmt: skip
    path = tmp_path / "engine" / "model.onnx"
    lowered = lower_graph(path, config.pretrained_config, config.build_config)
    _, feed = operands(lowered, path.parent, tokens)
    expected = by_function_body(lowered, *operands(lowered, path.parent, tokens))

    node = next(node for node in for_plugin(lowered).graph.node if node.op_type == "AdaptiveKMoe")
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if not a.name.startswith("plugin_")}
    plugin = computing.made(**{n: v.decode() if isinstance(v, bytes) else v for n, v in attributes.items()})
    arrays = [aligned(feed[name]) for name in node.input]
    made = [aligned(np.zeros_like(array)) for array in expected]
    inputs, outputs = ([Tensor(TYPES[a.dtype], a.shape) for a in of] for of in (arrays, made))
    assert plugin.configure(inputs, outputs) == 0, computing.log()
    workspace = aligned(np.zeros(max(plugin.workspace(inputs, outputs), 1), np.uint8))
    assert plugin.shape_change(inputs, outputs) == 0, computing.log()
    pointers = [[array.ctypes.data for array in of] for of in (arrays, made)]
    assert plugin.enqueue(inputs, outputs, *pointers, workspace.ctypes.data) == 0, computing.log()
    plugin.destroy()
    np.testing.assert_array_equal(made[1], expected[1])
    assert len(set(made[1].tolist())) == 2  # both choices occur
    np.testing.assert_allclose(made[2], expected[2], atol=1e-5)
    np.testing.assert_array_equal(made[3], expected[3])
    largest = np.abs(expected[0].astype(np.float64)).max()
    np.testing.assert_allclose(made[0].astype(np.float64), expected[0], atol=TOLERANCES[h.HALF] * largest)
