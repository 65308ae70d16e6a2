# SPDX-License-Identifier: Apache-2.0
"""The ONNX graph rewritten for TensorRT: strongly typed, its caches and states updated in place.

The rewrite works on the file, so every architecture's graph takes the same way and the models know nothing of it.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper, numpy_helper

from adaptive_k_moe.engine_builder.graph.graph_builder import DATA_TYPES
from adaptive_k_moe.engine_builder.graph.moe_function import DOMAIN, OP_TYPE
from adaptive_k_moe.engine_builder.targets.rewriting import (
    drop_unused,
    experts,
    joined_cache,
    producers_of,
    replace_nodes,
    scans,
    use_dtype,
)
from adaptive_k_moe.engine_config import BuildConfig
from adaptive_k_moe.engine_format.tensorrt import Binding, make_bindings
from adaptive_k_moe.model_config import PretrainedConfig


def lower_graph(path: Path, model: PretrainedConfig, build: BuildConfig) -> onnx.ModelProto:
    """The graph at `path` as TensorRT gets it, with the operator still having its function body.

    Activations and weights are of the model's dtype; the router's product, the entropies, the policy tables and
    the logits are float32.

    Args:
        path: ``model.onnx``, as written for the dtype.
        model: its sizes and dtype; "float32" rewrites the cache alone.
        build: the engine's sizes.

    Raises:
        BuildError: the model has layers or weights that this target does not take.
    """
    proto = onnx.load(path, load_external_data=False)
    _update_cache_in_place(proto.graph)
    use_dtype(proto, path, model.dtype)
    if model.mamba is not None:
        _derive_sequences(proto.graph)
    _give_expert_load(proto)
    drop_unused(proto.graph)
    _declare(proto.graph, make_bindings(model, build))
    # Every type and rank of the graph against the operators' rules and the table.
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    return proto


def for_plugin(lowered: onnx.ModelProto) -> onnx.ModelProto:
    """The lowered graph with the operators left to the plugin: no function bodies, the plugin's name on each node."""
    proto = onnx.ModelProto()
    proto.CopyFrom(lowered)
    del proto.functions[:]
    for node in (*experts(proto.graph), *scans(proto.graph)):
        node.attribute.append(helper.make_attribute("plugin_namespace", DOMAIN))
        node.attribute.append(helper.make_attribute("plugin_version", "1"))
    return proto


def for_compiler(lowered: onnx.ModelProto) -> onnx.ModelProto:
    """The lowered graph of standard ops alone: function bodies in their nodes' places.

    TensorRT's parser can expand functions too, but refuses a second node whose body holds a `DequantizeLinear`.
    """
    return onnx.inliner.inline_local_functions(lowered)


def tensor_bytes(tensor: TensorProto) -> int:
    """Bytes of an initializer's values."""
    count = math.prod(int(size) for size in tensor.dims)
    if tensor.data_type == TensorProto.INT4:
        return count // 2
    return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _update_cache_in_place(graph: onnx.GraphProto) -> None:
    """`TensorScatter` in place of joining past and new, and `Attention` right on the cache."""
    producers = producers_of(graph)
    for node in graph.node:
        if node.op_type == "Concat" and node.input[0].startswith("past_key_values."):
            past, new = node.input
            node.CopyFrom(
                helper.make_node("TensorScatter", [past, new, "write_indices"], node.output, node.name, axis=2)
            )
        elif node.op_type == "Attention":
            for index in (1, 2):
                node.input[index] = joined_cache(producers, node.input[index]).output[0]


def _give_expert_load(proto: onnx.ModelProto) -> None:
    """The tokens of each expert, [layers, experts], as one more output: other targets count them in the operator."""
    graph = proto.graph
    for function in proto.functions:
        if function.name == OP_TYPE:
            function.output.append("expert_load")
    graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "expert_load.axis"))
    rows = []
    for node in experts(graph):
        load = f"{node.name}.expert_load"
        node.output.append(load)
        row = helper.make_node("Unsqueeze", [load, "expert_load.axis"], [f"{load}.row"], f"{load}.row")
        graph.node.append(row)
        rows.append(row.output[0])
    graph.node.append(helper.make_node("Concat", rows, ["expert_load"], "expert_load", axis=0))
    graph.output.append(helper.make_tensor_value_info("expert_load", TensorProto.INT32, None))


def _derive_sequences(graph: onnx.GraphProto) -> None:
    """`Mamba2`'s sequences from the batch: row i is a sequence, and what was written of it is its past."""
    for name, value in (("zero", 0), ("one", 1)):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), f"sequences.{name}"))
    nodes = [
        helper.make_node("Shape", ["input_ids"], ["sequences.shape"]),
        helper.make_node("Gather", ["sequences.shape", "sequences.zero"], ["sequences.count"]),
        helper.make_node("Gather", ["sequences.shape", "sequences.one"], ["sequences.length"]),
        helper.make_node("Add", ["sequences.count", "sequences.one"], ["sequences.limit"]),
        helper.make_node("Range", ["sequences.zero", "sequences.limit", "sequences.one"], ["sequences.indices"]),
        helper.make_node("Mul", ["sequences.indices", "sequences.length"], ["sequences.begins"]),
        helper.make_node("Cast", ["sequences.begins"], ["subsequence_begins"], to=TensorProto.INT32),
        helper.make_node("Cast", ["write_indices"], ["past_lens"], to=TensorProto.INT32),
    ]
    for node in nodes:
        node.name = node.output[0]
    replace_nodes(graph, [*nodes, *graph.node])


def _declare(graph: onnx.GraphProto, table: list[Binding]) -> None:
    """Make the graph's inputs and outputs those of the table."""
    for values, is_input in ((graph.input, True), (graph.output, False)):
        del values[:]
        values.extend(
            helper.make_tensor_value_info(binding.name, DATA_TYPES[binding.dtype], binding.shape)
            for binding in table
            if binding.is_input == is_input
        )
