# SPDX-License-Identifier: Apache-2.0
"""An ONNX graph of one AdaptiveKMoe node, with its weights inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OUTPUTS = ("output", "k", "entropy", "expert_load")


def layer_model(
    attributes: Mapping[str, Any],
    weights: Mapping[str, npt.NDArray[Any]],
    *,
    policies: tuple[int | str, int],
    element: int = TensorProto.FLOAT16,
    function: bool = False,
) -> bytes:
    """The serialized model.

    Args:
        attributes: of the node.
        weights: its inputs from the seventh on, which become initializers; "up" and "down" are [E, *, *].
        policies: rows and choices of the policy tables; a name is a size known at run time.
        element: ONNX's type of hidden_states.
        function: whether the file carries a body for the operator (of no use but to be there).
    """
    num_experts, hidden = weights["down"].shape[:2]
    rows, choices = policies

    def value(name: str, type_: int, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, type_, shape)

    single, integer = TensorProto.FLOAT, TensorProto.INT32
    inputs = [
        value("hidden_states", element, "T", hidden),
        value("router_logits", single, "T", num_experts),
        value("policy_index", integer, "T"),
        value("policy_kind", integer, rows),
        value("thresholds", single, rows, choices - 1),
        value("k_values", integer, rows, choices),
    ]
    outputs = [value("output", element, "T", hidden), value("k", integer, "T"), value("entropy", single, "T")]
    outputs.append(value("expert_load", integer, num_experts))
    names = [*(v.name for v in inputs), *weights]
    node = helper.make_node("AdaptiveKMoe", names, OUTPUTS, "layers.0.moe", domain="adaptive_k", **attributes)
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph([node], "layer", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("adaptive_k", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    if function:
        body = [
            helper.make_node("Constant", [], ["axis"], value=numpy_helper.from_array(np.array([1]))),
            helper.make_node("Identity", ["hidden_states"], ["output"]),
            helper.make_node("Identity", ["policy_index"], ["k"]),
            helper.make_node("ReduceMax", ["router_logits", "axis"], ["entropy"], keepdims=0),
            helper.make_node(
                "Constant", [], ["expert_load"], value=numpy_helper.from_array(np.zeros(num_experts, "i"))
            ),
        ]
        made = helper.make_function("adaptive_k", "AdaptiveKMoe", names, OUTPUTS, body, opsets[:1], [])
        model.functions.append(made)
    return bytes(model.SerializeToString())
