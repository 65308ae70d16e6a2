# SPDX-License-Identifier: Apache-2.0
"""Lowering for OpenVINO: the extension's operator in place of the function, ``rank0.xml`` and ``rank0.bin``."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto

from adaptive_k_moe.engine_builder.graph import keep_states_in_place
from adaptive_k_moe.engine_builder.graph.moe_function import OP_TYPE
from adaptive_k_moe.engine_config import BuildConfig, PretrainedConfig
from adaptive_k_moe.errors import BuildError
from adaptive_k_moe.plugin import openvino_extension_path
from adaptive_k_moe.runtime.session.openvino import ENGINE_XML
from adaptive_k_moe.runtime.session.paged_attention import use_paged_attention


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
        # The session does this at every load; a model that it cannot do is refused now.
        use_paged_attention(core.read_model(directory / ENGINE_XML), model)
    except RuntimeError as error:  # OpenVINO's own: a full disk, a graph that it does not read
        reason = str(error).strip().splitlines()[-1]
        raise BuildError(f"OpenVINO cannot write the engine (is the disk full?): {reason}") from error


def _use_operators(path: Path) -> None:
    """Drop the function bodies, so that the extension's operators are taken, and keep bfloat16 experts as bytes.

    OpenVINO's CPU plugin widens 16-bit constants that feed a custom operator: twice the bytes to read.
    """
    proto = onnx.load(path, load_external_data=False)
    del proto.functions[:]
    keep_states_in_place(proto)
    experts = {name for node in proto.graph.node if node.op_type == OP_TYPE for name in node.input[6:8]}
    for initializer in proto.graph.initializer:
        if initializer.name in experts and initializer.data_type == TensorProto.BFLOAT16:
            initializer.data_type = TensorProto.UINT8
            initializer.dims[-1] *= 2
    onnx.save(proto, path)
