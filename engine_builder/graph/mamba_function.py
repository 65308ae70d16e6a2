# SPDX-License-Identifier: Apache-2.0
"""`Mamba2` as an ONNX model-local function of standard ops: the operator's executable specification.

A `Scan` over the packed tokens that carries the states of all slots: slow, but exact, so that the same file
runs in a plain ONNX Runtime. There the states go in and come out; the operator updates them in place.

Shapes: T tokens over S sequences, K taps, h heads of width P, g groups, N the state's size.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import TensorProto, helper

from adaptive_k_moe.engine_builder.graph.moe_function import DOMAIN, FunctionBody
from adaptive_k_moe.model_config import MambaConfig

OP_TYPE = "Mamba2"

INPUTS = [
    "conv_input",
    "dt",
    "subsequence_begins",
    "past_lens",
    "state_slots",
    "conv_weight",
    "conv_bias",
    "A",
    "D",
    "dt_bias",
    "conv_state",
    "ssm_state",
]
OUTPUTS = ["y", "present_conv_state", "present_ssm_state"]


def mamba_attributes(mamba: MambaConfig) -> dict[str, Any]:
    """The operator's attributes for a model's Mamba-2 layers."""
    return {"n_groups": mamba.n_groups, "dt_min": float(mamba.dt_min)}


def make_mamba_function(mamba: MambaConfig) -> onnx.FunctionProto:
    """The operator's body for the sizes of one model's layers."""
    b = FunctionBody()
    # Each token's sequence: as many as end at or before the token lie before it, empty ones too.
    num_tokens = b.op("Squeeze", b.op("Shape", "conv_input", start=0, end=1))
    tokens = b.op("Range", b.const(0, "int64"), num_tokens, b.const(1, "int64"))  # [T]
    begins = b.op("Cast", "subsequence_begins", to=TensorProto.INT64)
    ends = b.op("Slice", begins, b.const([1], "int64"), b.const([2**31], "int64"))
    ended = b.op("LessOrEqual", b.op("Unsqueeze", ends, b.const([1], "int64")), tokens)  # [S, T]
    sequence = b.op("ReduceSum", b.op("Cast", ended, to=TensorProto.INT64), b.const([0], "int64"), keepdims=0)
    slots = b.op("Gather", b.op("Cast", "state_slots", to=TensorProto.INT64), sequence)
    # A sequence without a slot reads the first one and writes back what it found there.
    has_slot = b.op("GreaterOrEqual", slots, b.const(0, "int64"))
    slots = b.op("Max", slots, b.const(0, "int64"))
    # A sequence's first token starts from zero states if nothing came before it.
    begins_here = b.op("Equal", b.op("Gather", begins, sequence), tokens)
    no_past = b.op("Equal", b.op("Gather", "past_lens", sequence), b.const(0, "int32"))
    fresh = b.op("And", begins_here, no_past)

    # softplus + dt_bias, limited, and exp(dt A): [T, h].
    steps = b.op("Softplus", b.op("Add", "dt", "dt_bias"))
    steps = b.op("Max", steps, b.const(float(mamba.dt_min)))
    decays = b.op("Exp", b.op("Mul", steps, "A"))
    b.nodes.append(
        helper.make_node(
            "Scan",
            ["conv_state", "ssm_state", "conv_input", steps, decays, slots, has_slot, fresh],
            ["present_conv_state", "present_ssm_state", "y"],
            num_scan_inputs=6,
            body=_token_graph(mamba),
        )
    )
    return helper.make_function(
        DOMAIN, OP_TYPE, INPUTS, OUTPUTS, b.nodes, [helper.make_opsetid("", 24)], list(mamba_attributes(mamba))
    )


def _token_graph(mamba: MambaConfig) -> onnx.GraphProto:
    """One token: its window of the convolution, then one step of its sequence's recurrence."""
    b = FunctionBody(prefix="token_")
    heads, width, size, groups = mamba.num_heads, mamba.head_dim, mamba.state_size, mamba.n_groups
    first, zero = b.const([0], "int64"), b.const(0.0)

    def own(states: str) -> str:
        """The token's sequence's state, or zeros."""
        return b.op("Where", "fresh_in", zero, b.op("Gather", states, "slot_in", axis=0))

    def keep(states: str, state: str, name: str) -> None:
        index = b.op("Reshape", "slot_in", b.const([1, 1], "int64"))
        kept = b.op("Where", "has_slot_in", state, b.op("Gather", states, "slot_in", axis=0))
        b.op("ScatterND", states, index, b.op("Unsqueeze", kept, first), name=name)

    window = b.op("Concat", own("conv_state_in"), b.op("Unsqueeze", "token_in", first), axis=0)  # [K, channels]
    mixed = b.op("ReduceSum", b.op("Mul", window, "conv_weight"), first, keepdims=0)
    mixed = b.op("Add", mixed, "conv_bias")
    mixed = b.op("Mul", mixed, b.op("Sigmoid", mixed))
    newest = b.op("Slice", window, b.const([1], "int64"), b.const([mamba.conv_kernel], "int64"), first)
    keep("conv_state_in", newest, "conv_state_out")

    sizes = [mamba.intermediate_size, groups * size, groups * size]
    names = [f"token_split_{part}" for part in ("x", "b", "c")]
    b.nodes.append(helper.make_node("Split", [mixed, b.const(sizes, "int64")], names, axis=0))
    x = b.op("Reshape", names[0], b.const([heads, 1, width], "int64"))

    def per_head(shared: str) -> str:
        """B or C of each head's group: [h, N, 1]."""
        grouped = b.op("Reshape", shared, b.const([groups, 1, size], "int64"))
        spread = b.op("Expand", grouped, b.const([groups, heads // groups, size], "int64"))
        return b.op("Reshape", spread, b.const([heads, size, 1], "int64"))

    column = b.const([heads, 1, 1], "int64")
    step, decay = b.op("Reshape", "step_in", column), b.op("Reshape", "decay_in", column)
    taken = b.op("Mul", per_head(names[1]), b.op("Mul", step, x))  # [h, N, P]
    state = b.op("Add", b.op("Mul", decay, own("ssm_state_in")), taken)
    keep("ssm_state_in", state, "ssm_state_out")
    read = b.op("ReduceSum", b.op("Mul", per_head(names[2]), state), b.const([1], "int64"), keepdims=1)
    skip = b.op("Mul", b.op("Reshape", "D", column), x)
    y = b.op("Where", "has_slot_in", b.op("Add", read, skip), zero)
    b.op("Reshape", y, b.const([heads * width], "int64"), name="y_out")

    def value(name: str, dtype: int, *shape: int | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, dtype, list(shape))

    f32 = TensorProto.FLOAT
    conv, ssm = (None, *mamba.conv_state_shape), (None, *mamba.ssm_state_shape)
    inputs = [
        value("conv_state_in", f32, *conv),
        value("ssm_state_in", f32, *ssm),
        value("token_in", f32, mamba.conv_dim),
        value("step_in", f32, heads),
        value("decay_in", f32, heads),
        value("slot_in", TensorProto.INT64),
        value("has_slot_in", TensorProto.BOOL),
        value("fresh_in", TensorProto.BOOL),
    ]
    outputs = [
        value("conv_state_out", f32, *conv),
        value("ssm_state_out", f32, *ssm),
        value("y_out", f32, heads * width),
    ]
    return helper.make_graph(b.nodes, "token", inputs, outputs)


def keep_states_in_place(model: onnx.ModelProto) -> None:
    """Leave each `Mamba2` its first output alone, for runtimes whose operator updates its states in place."""
    dropped = set()
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type == OP_TYPE:
            dropped.update(node.output[1:])
            del node.output[1:]
    kept = [output for output in model.graph.output if output.name not in dropped]
    del model.graph.output[:]
    model.graph.output.extend(kept)
