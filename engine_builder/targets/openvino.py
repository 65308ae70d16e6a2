# SPDX-License-Identifier: Apache-2.0
"""Lowering for OpenVINO: the extension's operator in place of the function, ``rank0.xml`` and ``rank0.bin``."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
from onnx import TensorProto, helper

from adaptive_k_moe.engine_builder.graph import keep_states_in_place
from adaptive_k_moe.engine_builder.graph.moe_function import DOMAIN, OP_TYPE
from adaptive_k_moe.engine_config import BuildConfig
from adaptive_k_moe.engine_format.openvino import ENGINE_XML, keep_float32, use_paged_attention
from adaptive_k_moe.errors import BuildError
from adaptive_k_moe.model_config import PretrainedConfig
from adaptive_k_moe.plugin import openvino_extension_path
from adaptive_k_moe.plugin.description import MOE

# The places of the experts' weights among the operator's inputs.
_EXPERTS = MOE.input_index("up"), MOE.input_index("down")
_ROUTER_LOGITS = MOE.input_index("router_logits")

# A product with fewer columns, a gate's, is left to OpenVINO.
_LEAST_COLUMNS = 16

# A cache line. A row of weights that begins within one lies across one more, which AMX takes longer to read.
_ALIGNMENT = 64

# What is written at a time. Writes of many megabytes leave the file in the page cache in large pages, where the file
# system has them (ext4 from Linux 6.16 on, XFS): decode reads the mapped weights a tenth to a fifth faster so.
_PIECE_BYTES = 1 << 24


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
        _align_constants(directory / ENGINE_XML)
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
    """Drop the function bodies, so that the extension's operators are taken, and make their inputs what these take.

    Experts in floating point become bytes, which OpenVINO's CPU plugin leaves in the mapped file: constants that feed a
    custom operator it widens if they have 16 bits, and copies if they are float32 and one number of them is subnormal.
    Scales in bfloat16, of which there are few, become float32.
    """
    proto = onnx.load(path, load_external_data=False)
    del proto.functions[:]
    keep_states_in_place(proto)
    if model.quantization.rounds_activations if model.quantization else model.dtype == "bfloat16":
        _use_linear(proto.graph)
    layers = [node for node in proto.graph.node if node.op_type == OP_TYPE]
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    for layer in layers:
        for index, name in enumerate(layer.input):
            weight = weights.get(name)
            if weight is None:
                continue
            if index in _EXPERTS and weight.data_type in (TensorProto.FLOAT, TensorProto.BFLOAT16):
                weight.dims[-1] *= helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize
                weight.data_type = TensorProto.UINT8
            elif weight.data_type == TensorProto.BFLOAT16:
                layer.input[index] = f"{name}.float"
                cast = helper.make_node("Cast", [name], [f"{name}.float"], to=TensorProto.FLOAT)
                proto.graph.node.insert(0, cast)
    onnx.save(proto, path)


def _use_linear(graph: onnx.GraphProto) -> None:
    """Let the extension's `Linear` multiply with stored weights, in place of a product of OpenVINO's.

    A router's weight is float32 and stays as it is.
    """
    makers = {output: node for node in graph.node for output in node.output}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    gathered = {name for node in graph.node if node.op_type == "Gather" for name in node.input}
    for node in graph.node:
        transpose = makers.get(node.input[1]) if node.op_type == "MatMul" else None
        values = makers.get(transpose.input[0]) if transpose is not None and transpose.op_type == "Transpose" else None
        if values is None or values.op_type not in ("Cast", "DequantizeLinear") or values.input[0] not in stored:
            continue
        weight = stored[values.input[0]]
        if weight.dims[0] < _LEAST_COLUMNS or (values.op_type == "Cast" and weight.name in gathered):
            continue  # (a bfloat16 head that is the embedding, too, has no bytes of its own)
        formats = {TensorProto.INT8: "int8", TensorProto.INT4: "int4", TensorProto.BFLOAT16: "bfloat16"}
        inputs = [node.input[0], weight.name]
        attributes = {"weight_format": formats[weight.data_type]}
        if values.op_type == "DequantizeLinear":
            inputs.append(values.input[1])
            attributes["activation_format"] = "int8"
        linear = helper.make_node("Linear", inputs, node.output, name=node.name, domain=DOMAIN, **attributes)
        node.CopyFrom(linear)
    for tensor in {node.input[1]: stored[node.input[1]] for node in graph.node if node.op_type == "Linear"}.values():
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.data_type = TensorProto.UINT8
            tensor.dims[-1] *= 2
        elif tensor.data_type == TensorProto.INT4:
            tensor.data_type = TensorProto.INT8
            tensor.dims[-1] //= 2


def _align_constants(xml: Path) -> None:
    """Move the constants of a saved model to the beginnings of cache lines, which OpenVINO writes without gaps."""
    tree, old = ElementTree.parse(xml), xml.with_suffix(".bin")
    moved: dict[str, int] = {}
    new = old.with_suffix(".aligned")
    piece = np.empty(_PIECE_BYTES, np.uint8).data
    with old.open("rb") as source, new.open("wb", buffering=_PIECE_BYTES) as target:
        for constant in tree.iterfind(".//layer[@type='Const']/data"):
            offset, left = constant.attrib["offset"], int(constant.attrib["size"])
            if offset not in moved:  # equal constants are stored once
                target.write(b"\0" * (-target.tell() % _ALIGNMENT))
                moved[offset] = target.tell()
                source.seek(int(offset))
                while left:
                    count = source.readinto(piece[:left])
                    if not count:
                        raise BuildError(f"{old} is shorter than {xml} says.")
                    target.write(piece[:count])
                    left -= count
            constant.set("offset", str(moved[offset]))
    new.replace(old)
    tree.write(xml, encoding="utf-8", xml_declaration=True)
