# SPDX-License-Identifier: Apache-2.0
"""OpenVINO's engine file, and the pass that loads it: from explicit past keys and values to paged attention.

The pass is done each time an engine is loaded (it takes milliseconds), because OpenVINO cannot read its own paged
attention back from a file. The builder runs the same pass to check that a model's attention matches.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from adaptive_k_moe.errors import EngineError
from adaptive_k_moe.model_config import PretrainedConfig

ENGINE_XML = "rank0.xml"
"""The engine's file in its directory; its weights lie beside it."""


def keep_float32(xml: Path, products: Collection[str]) -> None:
    """Mark products in an engine's file, so that they stay float32 where the rest becomes bfloat16.

    A router decides which experts run, and near a tie bfloat16 would decide otherwise.
    The mark is OpenVINO's own ("precise"). Its Python interface can read it and not set it, so it is written here.

    Args:
        xml: the engine's file.
        products: names of its products.
    """
    tree = ElementTree.parse(xml)
    for layer in tree.iter("layer"):
        if layer.get("type") == "MatMul" and layer.get("name") in products:
            info = ElementTree.Element("rt_info")
            ElementTree.SubElement(info, "attribute", {"name": "precise", "version": "0"})
            layer.insert(1, info)  # after its data
    tree.write(xml, encoding="utf-8", xml_declaration=True)


def use_paged_attention(graph: Any, model: PretrainedConfig) -> None:
    """Replace past keys and values by block tables, in place, and let ``input_ids`` be [T].

    The graph's inputs ``past_key_values.N.*`` and outputs ``present.N.*`` go; ``key_cache.N``,
    ``value_cache.N``, ``past_lens``, ``subsequence_begins``, ``block_indices``, ``block_indices_begins``
    and ``max_context_len`` come. Recurrent layers' ``past_lens`` and ``subsequence_begins`` become the same inputs.

    Args:
        graph: an `openvino.Model` as the engine builder wrote it.
        model: the model's sizes.

    Raises:
        EngineError: OpenVINO did not recognise the attention of every layer.
    """
    from openvino import PartialShape, Type
    from openvino import opset13 as op
    from openvino._offline_transformations import paged_attention_transformation
    from openvino.op.util import Variable, VariableInfo

    parameters = {name: node for node in graph.get_parameters() for name in node.output(0).get_names()}
    results = {name: node for node in graph.get_results() for name in node.input(0).get_source_output().get_names()}
    # The transformation finds its inputs by their friendly names.
    for name, parameter in parameters.items():
        parameter.set_friendly_name(name)
    if not model.attention_layers:
        _pack_tokens(graph, parameters)
        return
    # The transformation brings inputs of these names.
    shared = {name: parameters[name] for name in ("past_lens", "subsequence_begins") if name in parameters}
    for name, parameter in shared.items():
        parameter.set_friendly_name(f"recurrent.{name}")
        parameter.output(0).set_names({f"recurrent.{name}"})
    added = []
    for name, shape, kind in (("beam_idx", [-1], Type.i32), ("attention_mask", [-1, -1], Type.i64)):
        parameter = op.parameter(PartialShape(shape), kind, name)
        parameter.output(0).set_names({name})
        added.append(parameter)
    heads, width = model.num_key_value_heads, model.head_dim
    batch = op.gather(op.shape_of(parameters["input_ids"]), op.constant(np.array([0])), op.constant(np.int64(0)))
    sinks = []
    for layer in model.attention_layers:
        for kind in ("key", "value"):
            past, present = f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
            info = VariableInfo()
            info.data_shape, info.data_type, info.variable_id = PartialShape([-1, heads, -1, width]), Type.f32, past
            variable = Variable(info)
            empty = op.concat([batch, op.constant(np.array([heads, 0, width]))], 0)
            stored = op.read_value(op.broadcast(op.constant(np.float32(0)), empty), variable)
            state = op.gather(stored, added[0], op.constant(np.int64(0)))
            for consumer in list(parameters[past].output(0).get_target_inputs()):
                consumer.replace_source_output(state.output(0))
            sinks.append(op.assign(results[present].input(0).get_source_output().get_node(), variable))
            graph.remove_result(results[present])
            graph.remove_parameter(parameters[past])
    graph.add_parameters(added)
    graph.add_sinks(sinks)
    paged_attention_transformation(graph)
    brought = {name: node for node in graph.get_parameters() for name in node.output(0).get_names()}
    for name, parameter in shared.items():
        _replace_parameter(graph, parameter, brought[name].output(0))
    matched = sum(node.get_type_name() == "PagedAttentionExtension" for node in graph.get_ops())
    if matched != len(model.attention_layers):
        raise EngineError(
            f"OpenVINO recognised paged attention in {matched} of {len(model.attention_layers)} layers, so this model "
            "cannot run on the openvino target."
        )


def _pack_tokens(graph: Any, parameters: dict[str, Any]) -> None:
    """What the transformation does for ``input_ids`` and the unused positions, where there is no attention."""
    from openvino import PartialShape, Type
    from openvino import opset13 as op

    tokens = op.parameter(PartialShape([-1]), Type.i64, "input_ids")
    column = op.unsqueeze(tokens, op.constant(np.int64(1)))
    graph.add_parameters([tokens])
    _replace_parameter(graph, parameters["input_ids"], column.output(0))
    tokens.output(0).set_names({"input_ids"})
    if "position_ids" in parameters:
        graph.remove_parameter(parameters["position_ids"])
    graph.validate_nodes_and_infer_types()


def _replace_parameter(graph: Any, parameter: Any, output: Any) -> None:
    for consumer in list(parameter.output(0).get_target_inputs()):
        consumer.replace_source_output(output)
    graph.remove_parameter(parameter)
