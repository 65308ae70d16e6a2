# SPDX-License-Identifier: Apache-2.0
"""The ONNX graph rewritten for TensorRT: strongly typed, its caches and states updated in place.

The rewrite works on the file, so every architecture's graph takes the same way and the models know nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper, numpy_helper

from adaptive_k_moe.engine_builder.graph import mamba_function, moe_function
from adaptive_k_moe.engine_builder.graph.graph_builder import DATA_TYPES, NUMPY_TYPES, require_float16
from adaptive_k_moe.engine_builder.graph.moe_function import DOMAIN
from adaptive_k_moe.engine_config import BuildConfig
from adaptive_k_moe.engine_format.tensorrt import Binding, make_bindings
from adaptive_k_moe.model_config import PretrainedConfig

# What repeats the cache's heads for the query's; `Attention` does that itself.
_SPREADING = ("Reshape", "Expand", "Unsqueeze")


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
    _use_dtype(proto, path, model.dtype)
    if model.mamba is not None:
        _derive_sequences(proto.graph)
    _give_expert_load(proto)
    _drop_unused(proto.graph)
    _declare(proto.graph, make_bindings(model, build))
    # Every type and rank of the graph against the operators' rules and the table.
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    return proto


def for_plugin(lowered: onnx.ModelProto) -> onnx.ModelProto:
    """The lowered graph with the operators left to the plugin: no function bodies, the plugin's name on each node."""
    proto = onnx.ModelProto()
    proto.CopyFrom(lowered)
    del proto.functions[:]
    for node in (*_experts(proto.graph), *_scans(proto.graph)):
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


def _experts(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if (node.domain, node.op_type) == (DOMAIN, moe_function.OP_TYPE)]


def _scans(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if (node.domain, node.op_type) == (DOMAIN, mamba_function.OP_TYPE)]


def _producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    return {output: node for node in graph.node for output in node.output}


def _update_cache_in_place(graph: onnx.GraphProto) -> None:
    """`TensorScatter` in place of joining past and new, and `Attention` right on the cache."""
    producers = _producers(graph)
    for node in graph.node:
        if node.op_type == "Concat" and node.input[0].startswith("past_key_values."):
            past, new = node.input
            node.CopyFrom(
                helper.make_node("TensorScatter", [past, new, "write_indices"], node.output, node.name, axis=2)
            )
        elif node.op_type == "Attention":
            for index in (1, 2):
                producer = producers[node.input[index]]
                while producer.op_type in _SPREADING:
                    producer = producers[producer.input[0]]
                if not producer.output[0].startswith("present."):
                    raise AssertionError(f"{node.name}: input {index} does not come from a cache")
                node.input[index] = producer.output[0]


def _give_expert_load(proto: onnx.ModelProto) -> None:
    """The tokens of each expert, [layers, experts], as one more output: other targets count them in the operator."""
    graph = proto.graph
    for function in proto.functions:
        if function.name == moe_function.OP_TYPE:
            function.output.append("expert_load")
    graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "expert_load.axis"))
    rows = []
    for node in _experts(graph):
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
    _replace_nodes(graph, [*nodes, *graph.node])


def _use_dtype(proto: onnx.ModelProto, path: Path, dtype: str) -> None:
    """Give activations and weights the engine's dtype and leave float32 what has to be float32."""
    if dtype == "float32":
        return
    graph, element = proto.graph, DATA_TYPES[dtype]
    # Weights are used in the type that they are stored in, not widened.
    widened = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
    _replace_nodes(graph, [node for node in graph.node if node.op_type != "Cast"])
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = widened.get(name, name)

    routers = _routers(graph)
    norms = _gated_norms(graph)
    exact = {name for node in (*routers, *norms) for name in node.input}
    exact |= {name for node in _experts(graph) for name in node.input[8:]}
    exact |= {name for node in _scans(graph) for name in node.input[5:10]}
    exact |= {node.input[0] for node in graph.node if node.op_type == "Transpose" and node.output[0] in exact}
    for initializer in graph.initializer:
        if initializer.data_type == TensorProto.FLOAT and initializer.name not in exact:
            _convert(initializer, path, dtype)

    nodes: list[onnx.NodeProto] = []
    router_names = {node.name for node in routers}
    for node in graph.node:
        if node.name in router_names and node.op_type == "MatMul":
            tokens = f"{node.name}.tokens_float"
            nodes.append(helper.make_node("Cast", [node.input[0]], [tokens], tokens, to=TensorProto.FLOAT))
            node.input[0] = tokens
        nodes.append(node)
        if node.output[0] == "logits":
            node.output[0] = f"logits.{dtype}"
            nodes.append(helper.make_node("Cast", [node.output[0]], ["logits"], "logits.float", to=TensorProto.FLOAT))
    _replace_nodes(graph, nodes)
    _keep_float(graph, norms, element)
    for function in proto.functions:
        _convert_function(function, element)


def _gated_norms(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """What lies between a `Mamba2`, the gate of its layer and the projection out."""
    found: dict[str, onnx.NodeProto] = {}
    values = {node.output[0] for node in _scans(graph)}
    for node in graph.node:  # in topological order
        if node.op_type != "MatMul" and values.intersection(node.input):
            values.add(node.output[0])
            found[node.name] = node
    # The sum with the residual stream lies behind the projection, so only the gate is left to be followed.
    producers, waiting = _producers(graph), list(found.values())
    while waiting:
        for name in waiting.pop().input:
            producer = producers.get(name)
            if producer and producer.name not in found and producer.op_type in ("Mul", "Sigmoid"):
                found[producer.name] = producer
                waiting.append(producer)
    return [node for node in graph.node if node.name in found]


def _keep_float(graph: onnx.GraphProto, kept: list[onnx.NodeProto], element: int) -> None:
    """Let these nodes compute in float32: casts of the activations that they take and give."""
    names, producers = {node.name for node in kept}, _producers(graph)
    nodes: list[onnx.NodeProto] = []
    widened: set[str] = set()
    inner = {output for node in kept for output in node.output}
    outer = {name for node in graph.node if node.name not in names for name in node.input} & inner
    for node in graph.node:
        if node.name in names:
            for index, name in enumerate(node.input):
                if name in producers and name not in inner:
                    node.input[index] = f"{name}.float"
                    if name not in widened:
                        widened.add(name)
                        cast = helper.make_node(
                            "Cast", [name], [f"{name}.float"], f"{name}.float", to=TensorProto.FLOAT
                        )
                        nodes.append(cast)
        nodes.append(node)
        if node.name in names and node.output[0] in outer:
            name = node.output[0]
            node.output[0] = f"{name}.float"
            nodes.append(helper.make_node("Cast", [f"{name}.float"], [name], f"{name}.narrow", to=element))
    _replace_nodes(graph, nodes)


def _routers(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that make router logits: a product and, in some models, a sum with a bias."""
    producers, found = _producers(graph), []
    for node in _experts(graph):
        producer = producers[node.input[1]]
        while producer.op_type == "Add":
            found.append(producer)
            producer = producers[producer.input[0]]
        if producer.op_type != "MatMul":
            raise AssertionError(f"{node.name}: its router logits come from {producer.op_type}")
        found.append(producer)
    return found


# A body's inputs and outputs that have the engine's dtype.
_OPERANDS = {
    moe_function.OP_TYPE: {"hidden_states", "output"},
    mamba_function.OP_TYPE: {"conv_input", "dt", "conv_state", "y", "present_conv_state"},
}


def _convert_function(function: onnx.FunctionProto, element: int) -> None:
    """Let a body that computes in float32 take and give activations of another type."""
    operands = _OPERANDS[function.name]
    for node in function.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name in operands:
                    names[index] = f"{name}_float"
    taken = [name for name in function.input if name in operands]
    given = [name for name in function.output if name in operands]
    body = [
        *(helper.make_node("Cast", [name], [f"{name}_float"], to=TensorProto.FLOAT) for name in taken),
        *function.node,
        *(helper.make_node("Cast", [f"{name}_float"], [name], to=element) for name in given),
    ]
    del function.node[:]
    function.node.extend(body)


def _convert(tensor: TensorProto, path: Path, dtype: str) -> None:
    """Give a float32 initializer (a norm, a bias, a table: all are small) another type, in the model file itself."""
    values = numpy_helper.to_array(tensor, str(path.parent))
    if dtype == "float16":
        require_float16(tensor.name, values)
    tensor.CopyFrom(numpy_helper.from_array(values.astype(NUMPY_TYPES[dtype]), tensor.name))


def _replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove the nodes and weights that no output needs any more."""
    needed = {output.name for output in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    _replace_nodes(graph, reversed(nodes))
    weights = [initializer for initializer in graph.initializer if initializer.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(weights)


def _declare(graph: onnx.GraphProto, table: list[Binding]) -> None:
    """Make the graph's inputs and outputs those of the table."""
    for values, is_input in ((graph.input, True), (graph.output, False)):
        del values[:]
        values.extend(
            helper.make_tensor_value_info(binding.name, DATA_TYPES[binding.dtype], binding.shape)
            for binding in table
            if binding.is_input == is_input
        )
