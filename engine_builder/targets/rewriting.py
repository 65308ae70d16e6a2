# SPDX-License-Identifier: Apache-2.0
"""What the lowerings for GPUs share: the graph's dtype, and what becomes of nodes that nothing needs.

The rewrites work on the file, so every architecture's graph takes the same way and the models know nothing of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx
from onnx import TensorProto, helper, numpy_helper

from adaptive_k_moe.engine_builder.graph import mamba_function, moe_function
from adaptive_k_moe.engine_builder.graph.graph_builder import DATA_TYPES, NUMPY_TYPES, require_float16
from adaptive_k_moe.engine_builder.graph.moe_function import DOMAIN

# What repeats the cache's heads for the query's; runtimes' attention does that itself.
_SPREADING = ("Reshape", "Expand", "Unsqueeze")


def use_dtype(proto: onnx.ModelProto, path: Path, dtype: str) -> None:
    """Give activations and weights the engine's dtype and leave float32 what has to be float32.

    The router's product, the entropies, the policy tables, the gated norm of Mamba layers and the logits are float32.

    Args:
        proto: the graph, rewritten in place.
        path: its file, beside which its weights lie.
        dtype: the engine's; "float32" changes nothing.
    """
    if dtype == "float32":
        return
    graph, element = proto.graph, DATA_TYPES[dtype]
    # Weights are used in the type that they are stored in, not widened.
    widened = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
    replace_nodes(graph, [node for node in graph.node if node.op_type != "Cast"])
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = widened.get(name, name)

    routers = _routers(graph)
    norms = _gated_norms(graph)
    exact = {name for node in (*routers, *norms) for name in node.input}
    exact |= {name for node in experts(graph) for name in node.input[8:]}
    exact |= {name for node in scans(graph) for name in node.input[5:10]}
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
    replace_nodes(graph, nodes)
    _keep_float(graph, norms, element)
    for function in proto.functions:
        _convert_function(function, element)


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove the nodes and weights that no output needs any more."""
    needed = {output.name for output in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    replace_nodes(graph, reversed(nodes))
    weights = [initializer for initializer in graph.initializer if initializer.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(weights)


def experts(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The `AdaptiveKMoe` of each MoE layer."""
    return [node for node in graph.node if (node.domain, node.op_type) == (DOMAIN, moe_function.OP_TYPE)]


def scans(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The `Mamba2` of each recurrent layer."""
    return [node for node in graph.node if (node.domain, node.op_type) == (DOMAIN, mamba_function.OP_TYPE)]


def producers_of(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """The node that makes each value."""
    return {output: node for node in graph.node for output in node.output}


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Let the graph have these nodes."""
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)


def joined_cache(producers: dict[str, onnx.NodeProto], name: str) -> onnx.NodeProto:
    """The node that joins past and new keys (or values), of which an `Attention` takes this value."""
    node = producers[name]
    while node.op_type in _SPREADING:
        node = producers[node.input[0]]
    if not node.output[0].startswith("present."):
        raise AssertionError(f"{name} does not come from a cache")
    return node


def _gated_norms(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """What lies between a `Mamba2`, the gate of its layer and the projection out."""
    found: dict[str, onnx.NodeProto] = {}
    values = {node.output[0] for node in scans(graph)}
    for node in graph.node:  # in topological order
        if node.op_type != "MatMul" and values.intersection(node.input):
            values.add(node.output[0])
            found[node.name] = node
    # The sum with the residual stream lies behind the projection, so only the gate is left to be followed.
    producers, waiting = producers_of(graph), list(found.values())
    while waiting:
        for name in waiting.pop().input:
            producer = producers.get(name)
            if producer and producer.name not in found and producer.op_type in ("Mul", "Sigmoid"):
                found[producer.name] = producer
                waiting.append(producer)
    return [node for node in graph.node if node.name in found]


def _keep_float(graph: onnx.GraphProto, kept: list[onnx.NodeProto], element: int) -> None:
    """Let these nodes compute in float32: casts of the activations that they take and give."""
    names, producers = {node.name for node in kept}, producers_of(graph)
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
    replace_nodes(graph, nodes)


def _routers(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that make router logits: a product and, in some models, a sum with a bias."""
    producers, found = producers_of(graph), []
    for node in experts(graph):
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
