# SPDX-License-Identifier: Apache-2.0
"""Lowering for torch: the graph in the engine's dtype, with paged attention and the operators, as ``rank0.onnx``."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import helper

from adaptive_k_moe.engine_builder.graph import keep_states_in_place
from adaptive_k_moe.engine_builder.graph.moe_function import DOMAIN
from adaptive_k_moe.engine_builder.targets.rewriting import drop_unused, joined_cache, producers_of, use_dtype
from adaptive_k_moe.engine_format.torch import ENGINE_ONNX, PAGED_ATTENTION
from adaptive_k_moe.model_config import PretrainedConfig


def lower_for_torch(directory: Path, model: PretrainedConfig) -> None:
    """Replace ``model.onnx`` by ``rank0.onnx`` and ``rank0.onnx.data``."""
    source, engine = directory / "model.onnx", directory / ENGINE_ONNX
    proto = onnx.load(source, load_external_data=False)
    del proto.functions[:]
    keep_states_in_place(proto)
    _use_paged_attention(proto.graph, model)
    use_dtype(proto, source, model.dtype)
    drop_unused(proto.graph)
    needed = {name for node in proto.graph.node for name in node.input}
    inputs = [value for value in proto.graph.input if value.name in needed]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"{ENGINE_ONNX}.data"
    onnx.save(proto, engine)
    source.with_name(source.name + ".data").rename(engine.with_name(f"{ENGINE_ONNX}.data"))
    source.unlink()


def _use_paged_attention(graph: onnx.GraphProto, model: PretrainedConfig) -> None:
    """Let attention take the new keys and values alone, and the graph know nothing of the past."""
    producers = producers_of(graph)
    for node in graph.node:
        if node.op_type != "Attention":
            continue
        caches = [joined_cache(producers, name) for name in node.input[1:3]]
        scale = next(attribute.f for attribute in node.attribute if attribute.name == "scale")
        paged = helper.make_node(
            PAGED_ATTENTION,
            [node.input[0], *(cache.input[1] for cache in caches)],
            node.output,
            name=node.name,
            domain=DOMAIN,
            layer=int(caches[0].output[0].split(".")[1]),
            scale=scale,
            sliding_window=model.sliding_window or 0,
        )
        node.CopyFrom(paged)
    outputs = [output for output in graph.output if not output.name.startswith("present.")]
    del graph.output[:]
    graph.output.extend(outputs)
