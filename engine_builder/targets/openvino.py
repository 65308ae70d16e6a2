# SPDX-License-Identifier: Apache-2.0
"""Lowering for OpenVINO: the extension's operator in place of the function, ``rank0.xml`` and ``rank0.bin``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from adaptive_k_moe.engine_builder.graph import keep_states_in_place
from adaptive_k_moe.engine_builder.graph.moe_function import OP_TYPE
from adaptive_k_moe.engine_config import BuildConfig
from adaptive_k_moe.engine_format.openvino import ENGINE_XML, keep_float32, use_paged_attention
from adaptive_k_moe.errors import BuildError
from adaptive_k_moe.model_config import PretrainedConfig
from adaptive_k_moe.plugin import openvino_extension_path
from adaptive_k_moe.plugin.description import MOE

# The places of the experts' weights among the operator's inputs.
_EXPERTS = MOE.input_index("up"), MOE.input_index("down")
_ROUTER_LOGITS = MOE.input_index("router_logits")


def lower_for_openvino(directory: Path, model: PretrainedConfig, build_config: BuildConfig) -> None:
    """Replace ``model.onnx`` by ``rank0.xml`` and ``rank0.bin``.

    Raises:
        BuildError: the attention is one that OpenVINO's paged attention does not compute.
        EngineError: OpenVINO did not recognise the attention.
    """
    import openvino as ov

    if model.sliding_window is not None and build_config.max_seq_len > model.sliding_window:
        raise BuildError(
            f"the model's attention has a sliding window of {model.sliding_window} tokens, which the openvino target "
            f"does not cut off: build with --max_seq_len {model.sliding_window} or less."
        )
    source = directory / "model.onnx"
    _use_operators(source, model)
    try:
        core = ov.Core()
        core.add_extension(str(openvino_extension_path()))
        graph = core.read_model(source)
        routers = _transpose_in_routers(graph)
        # No float16 compression: the dtype was the user's choice.
        ov.save_model(graph, directory / ENGINE_XML, compress_to_fp16=False)
        del graph
        keep_float32(directory / ENGINE_XML, routers)
        source.unlink()
        source.with_name(source.name + ".data").unlink()
        # The session does this at every load; a model that it cannot do is refused now.
        use_paged_attention(core.read_model(directory / ENGINE_XML), model)
    except RuntimeError as error:  # OpenVINO's own: a full disk, a graph that it does not read
        reason = str(error).strip().splitlines()[-1]
        raise BuildError(f"OpenVINO cannot write the engine (is the disk full?): {reason}") from error


def _transpose_in_routers(graph: Any) -> list[str]:
    """Let the routers' products transpose their weight themselves, as what OpenVINO fuses would lose its mark.

    Returns:
        The products' names.
    """
    from openvino import opset13 as op

    names = []
    for layer in [node for node in graph.get_ops() if node.get_type_name() == OP_TYPE]:
        product = layer.input(_ROUTER_LOGITS).get_source_output().get_node()
        tokens, transpose = (each.get_source_output() for each in product.inputs())
        weight = transpose.get_node().input(0).get_source_output()
        names.append(product.get_friendly_name())
        own = op.matmul(tokens, weight, transpose_a=False, transpose_b=True, name=names[-1])
        own.output(0).set_names(product.output(0).get_names())
        for consumer in list(product.output(0).get_target_inputs()):
            consumer.replace_source_output(own.output(0))
    return names


def _use_operators(path: Path, model: PretrainedConfig) -> None:
    """Drop the function bodies, so that the extension's operators are taken, and make bfloat16 inputs what these take.

    Experts become bytes: OpenVINO's CPU plugin widens 16-bit constants that feed a custom operator, which would be
    twice the bytes to read. Scales, of which there are few, become float32. Experts round their activations to int8
    where the engine may.
    """
    proto = onnx.load(path, load_external_data=False)
    del proto.functions[:]
    keep_states_in_place(proto)
    layers = [node for node in proto.graph.node if node.op_type == OP_TYPE]
    bfloat16 = {tensor.name: tensor for tensor in proto.graph.initializer if tensor.data_type == TensorProto.BFLOAT16}
    for layer in layers:
        if model.quantization is not None and model.quantization.rounds_activations:
            layer.attribute.append(helper.make_attribute("activation_format", "int8"))
        for index, name in enumerate(layer.input):
            if name not in bfloat16:
                continue
            if index in _EXPERTS:
                bfloat16[name].data_type = TensorProto.UINT8
                bfloat16[name].dims[-1] *= 2
            else:
                layer.input[index] = f"{name}.float"
                cast = helper.make_node("Cast", [name], [f"{name}.float"], to=TensorProto.FLOAT)
                proto.graph.node.insert(0, cast)
    onnx.save(proto, path)
