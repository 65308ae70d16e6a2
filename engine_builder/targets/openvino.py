# SPDX-License-Identifier: Apache-2.0
"""Lowering for OpenVINO: the extension's operator in place of the function, ``rank0.xml`` and ``rank0.bin``."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
from onnx import TensorProto, helper

from adaptive_k_moe.engine_builder.graph import keep_states_in_place
from adaptive_k_moe.engine_builder.graph.moe_function import OP_TYPE
from adaptive_k_moe.engine_config import BuildConfig
from adaptive_k_moe.engine_format.openvino import ENGINE_XML, use_paged_attention
from adaptive_k_moe.errors import BuildError
from adaptive_k_moe.model_config import PretrainedConfig
from adaptive_k_moe.plugin import openvino_extension_path
from adaptive_k_moe.plugin.description import MOE

# The places of the experts' weights among the operator's inputs.
_EXPERTS = MOE.input_index("up"), MOE.input_index("down")

# A cache line. AMX takes a third more time for rows of weights that lie across two.
_ALIGNMENT = 64

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
    _use_operators(source)
    try:
        core = ov.Core()
        core.add_extension(str(openvino_extension_path()))
        graph = core.read_model(source)
        # No float16 compression: the dtype was the user's choice.
        ov.save_model(graph, directory / ENGINE_XML, compress_to_fp16=False)
        del graph
        source.unlink()
        source.with_name(source.name + ".data").unlink()
        _align_constants(directory / ENGINE_XML)
        # The session does this at every load; a model that it cannot do is refused now.
        use_paged_attention(core.read_model(directory / ENGINE_XML), model)
    except RuntimeError as error:  # OpenVINO's own: a full disk, a graph that it does not read
        reason = str(error).strip().splitlines()[-1]
        raise BuildError(f"OpenVINO cannot write the engine (is the disk full?): {reason}") from error


def _use_operators(path: Path) -> None:
    """Drop the function bodies, so that the extension's operators are taken, and make their inputs what these take.

    Experts in floating point become bytes, which OpenVINO's CPU plugin leaves in the mapped file: constants that feed a
    custom operator it widens if they have 16 bits, and copies if they are float32 and one number of them is subnormal.
    Scales in bfloat16, of which there are few, become float32.
    """
    proto = onnx.load(path, load_external_data=False)
    del proto.functions[:]
    keep_states_in_place(proto)
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


def _align_constants(xml: Path) -> None:
    """Move the constants of a saved model to the beginnings of cache lines, which OpenVINO writes without gaps."""
    tree, old = ElementTree.parse(xml), xml.with_suffix(".bin")
    moved: dict[str, int] = {}
    new = old.with_suffix(".aligned")
    piece = np.empty(_PIECE_BYTES, np.uint8).data
    with old.open("rb") as source, new.open("wb") as target:
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
