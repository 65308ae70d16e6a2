# SPDX-License-Identifier: Apache-2.0
"""`AdaptiveKMoe` as an ONNX model-local function of standard ops: the operator's executable specification.

Dense and slow (every expert is computed for every token and the unchosen are masked), but exact, so
the same file runs in a plain ONNX Runtime. Bindings of the operator are compared with it in the tests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from adaptive_k_moe.engine_builder.graph.weight_only import dequantise_in_function
from adaptive_k_moe.model_config import MoeConfig, QuantizationConfig
from adaptive_k_moe.plugin.description import GATED_ACTIVATIONS, MOE, POLICY_KINDS

DOMAIN = "adaptive_k"
OP_TYPE = MOE.name


def moe_attributes(
    moe: MoeConfig, *, max_k: int, weight_format: str, activation_format: str = "", expert_norms: bool = False
) -> dict[str, Any]:
    """The operator's attributes for a model's MoE layers.

    Args:
        moe: the router's rule and the activation.
        max_k: most experts a token may run.
        weight_format: the weights' type.
        activation_format: "int8" where products may round activations to that; "" where not.
        expert_norms: whether the operator's last input is `expert_norms`.
    """
    return {
        "activation": moe.activation,
        "scoring": moe.scoring,
        "norm_topk_prob": int(moe.norm_topk_prob),
        "routed_scaling_factor": float(moe.routed_scaling_factor),
        "n_group": moe.n_group,
        "topk_group": moe.topk_group,
        "max_k": max_k,
        "weight_format": weight_format,
        "activation_format": activation_format,
        "first_expert": -1,
        "has_expert_norms": int(expert_norms),
    }


class FunctionBody:
    """Nodes of a function body; a method call adds one node and returns its value's name.

    Args:
        prefix: of the values' names; a subgraph's must differ from those around it.
    """

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._prefix = prefix

    def const(self, value: Any, dtype: str = "float32") -> str:
        """A constant."""
        name = f"{self._prefix}c{len(self.nodes)}"
        tensor = numpy_helper.from_array(np.array(value, dtype))
        self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def op(self, op_type: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """A node with one output."""
        name = name or f"{self._prefix}v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], **attributes))
        return name

    def pair(self, op_type: str, *inputs: str, **attributes: Any) -> tuple[str, str]:
        """A node with two outputs."""
        first = f"{self._prefix}v{len(self.nodes)}"
        second = f"{first}_second"
        self.nodes.append(helper.make_node(op_type, list(inputs), [first, second], **attributes))
        return first, second


def make_moe_function(
    moe: MoeConfig,
    *,
    max_k: int,
    correction_bias: bool,
    expert_norms: bool = False,
    quantization: QuantizationConfig | None = None,
    first_expert: int = -1,
) -> onnx.FunctionProto:
    """The operator's body for one configuration of its attributes.

    Args:
        moe: the router's rule and the activation.
        max_k: most experts a token may run, whatever the policy tables say.
        correction_bias: whether the operator has the input of that name after `down`: [E] float32, added to the
            scores for the choice only.
        expert_norms: whether the operator has the input of that name as its last: [E] float32, by which rows of the
            kind `contribution` multiply the scores; without it all are 1.
        quantization: of the weights, whose scales then come before `expert_norms`.
        first_expert: the attribute of that name: weights are of a range of the experts, which begins here.
    """
    b = FunctionBody()
    f32 = onnx.TensorProto.FLOAT
    # Probabilities and entropy: H = log Z - sum(p (x - max)), where p = 0 contributes nothing.
    last, zero, one = b.const([-1], "int64"), b.const(0.0), b.const(1.0)
    top = b.op("ReduceMax", "router_logits", last, keepdims=1)
    shifted = b.op("Sub", "router_logits", top)
    exps = b.op("Exp", shifted)
    total = b.op("ReduceSum", exps, last, keepdims=1)
    probs = b.op("Div", exps, total)
    used = b.op("Where", b.op("Equal", probs, zero), zero, b.op("Mul", probs, shifted))
    entropy = b.op("Sub", b.op("Log", total), b.op("ReduceSum", used, last, keepdims=1))  # [T, 1]
    flat = b.const([-1], "int64")
    b.op("Reshape", entropy, flat, name="entropy")

    scores = b.op("Sigmoid", "router_logits") if moe.scoring == "sigmoid" else probs
    # Softmax is strictly rising, so the logits themselves rank the experts, free of rounding ties.
    choice = scores
    if correction_bias:
        choice = b.op("Add", scores, "correction_bias")
    elif moe.scoring == "softmax":
        choice = "router_logits"
    # NaN ranks last among the selectable; experts of groups that are out rank behind it.
    lowest = b.const(np.finfo(np.float32).min if choice != "router_logits" else -np.inf)
    ranked = b.op("Where", b.op("IsNaN", choice), lowest, choice)
    num_experts = b.const([moe.num_experts], "int64")
    if moe.n_group > 1:
        ranked = _mask_groups(b, ranked, moe)
    # Every expert in the order of choice; equal ones by rising index.
    _, order = b.pair("TopK", ranked, num_experts, axis=-1, largest=1, sorted=1)  # [T, E]
    ordered = b.op("GatherElements", scores, order, axis=1)

    # The policy row of each token, and by its kind the number of experts.
    last_row = b.op("Sub", b.op("Shape", "policy_kind"), b.const([1], "int64"))
    row = b.op("Clip", b.op("Cast", "policy_index", to=onnx.TensorProto.INT64), b.const(0, "int64"),
               b.op("Squeeze", last_row))  # fmt: skip
    thresholds = b.op("Gather", "thresholds", row, axis=0)  # [T, C-1]
    k_values = b.op("Cast", b.op("Gather", "k_values", row, axis=0), to=onnx.TensorProto.INT64)  # [T, C]
    kind = b.op("Unsqueeze", b.op("Gather", "policy_kind", row, axis=0), last)  # [T, 1]
    below_limit = b.op("Cast", b.op("Less", entropy, thresholds), to=onnx.TensorProto.INT32)
    # The first choice whose limit is above the entropy; past all limits (and for NaN) the last one.
    always = b.op("Add", b.op("Mul", kind, b.const(0, "int32")), b.const(1, "int32"))
    first = b.op("ArgMax", b.op("Concat", below_limit, always, axis=1), axis=1, keepdims=1)
    by_entropy = b.op("GatherElements", k_values, first, axis=1)

    begin, end, axis1 = b.const([0], "int64"), b.const([1], "int64"), b.const([1], "int64")
    parameter = b.op("Slice", thresholds, begin, end, axis1)  # [T, 1]
    k_min = b.op("Slice", k_values, begin, end, axis1)
    k_max = b.op("Slice", k_values, last, b.const([np.iinfo(np.int64).max], "int64"), axis1)
    whole = b.op("ReduceSum", ordered, last, keepdims=1)
    mass = b.op("CumSum", b.op("Div", ordered, whole), b.const(1, "int64"))
    # NaN (all scores 0) reaches no share.
    below = b.op("Cast", b.op("Not", b.op("GreaterOrEqual", mass, parameter)), to=onnx.TensorProto.INT64)
    by_mass = b.op("Add", b.op("ReduceSum", below, last, keepdims=1), b.const(1, "int64"))
    best = b.op("ReduceMax", scores, last, keepdims=1)
    strong = b.op("GreaterOrEqual", ordered, b.op("Mul", parameter, best))
    by_ratio = b.op("ReduceSum", b.op("Cast", strong, to=onnx.TensorProto.INT64), last, keepdims=1)
    broken = b.op("IsNaN", entropy)

    def within(k: str) -> str:
        clamped = b.op("Min", b.op("Max", k, k_min), k_max)
        return b.op("Where", broken, k_max, clamped)

    k = b.op("Where", b.op("Equal", kind, b.const(POLICY_KINDS["top_p"], "int32")), within(by_mass), by_entropy)
    k = b.op("Where", b.op("Equal", kind, b.const(POLICY_KINDS["ratio"], "int32")), within(by_ratio), k)
    selectable = moe.num_experts * moe.topk_group // moe.n_group

    def runnable(k: str) -> str:
        return b.op("Min", b.op("Max", k, b.const(1, "int64")), b.const(min(max_k, selectable), "int64"))

    position = b.op("Unsqueeze", b.op("Range", b.const(0, "int64"), b.const(moe.num_experts, "int64"),
                                      b.const(1, "int64")), b.const([0], "int64"))  # fmt: skip
    # Contribution rows: score times norm, among the most experts that they may run. A NaN reaches no share.
    contribution = ordered
    if expert_norms:
        contribution = b.op("Mul", ordered, b.op("Gather", "expert_norms", order, axis=0))
    contribution = b.op("Where", b.op("Less", position, runnable(k_max)), contribution, zero)
    share = b.op("Mul", parameter, b.op("ReduceSum", contribution, last, keepdims=1))
    short = b.op("Not", b.op("GreaterOrEqual", b.op("CumSum", contribution, b.const(1, "int64")), share))
    short = b.op("ReduceSum", b.op("Cast", short, to=onnx.TensorProto.INT64), last, keepdims=1)
    by_contribution = b.op("Add", short, b.const(1, "int64"))
    by_kind = b.op("Equal", kind, b.const(POLICY_KINDS["contribution"], "int32"))
    k = b.op("Where", by_kind, within(by_contribution), k)
    # Rows that share: alone their tokens run k_max experts, and so they do where the softmax is undefined.
    by_price = b.op("Equal", kind, b.const(POLICY_KINDS["shared_price"], "int32"))
    by_number = b.op("Equal", kind, b.const(POLICY_KINDS["shared_experts"], "int32"))
    k = b.op("Where", b.op("Or", by_price, by_number), k_max, k)
    k = runnable(k)  # [T, 1]
    empty = b.op("Mul", b.op("Cast", order, to=f32), zero)  # zeros [T, E]

    def weigh(chosen: str) -> str:
        """The model's own weight rule over the chosen, all [T, E] in the order of choice."""
        weights = b.op("Where", chosen, ordered, zero)
        if moe.norm_topk_prob:
            kept = b.op("Add", b.op("ReduceSum", weights, last, keepdims=1), b.const(1e-20))
            weights = b.op("Div", weights, kept)
        return b.op("Mul", weights, b.const(moe.routed_scaling_factor))

    def by_expert(value: str) -> str:
        return b.op("ScatterElements", empty, order, b.op("Cast", value, to=f32), axis=1)

    alone = b.op("Less", position, k)
    # What the step reads: what those who do not share run, and the first k_min of those who do; what is worth its
    # price to them all; and of each row with a number of experts those that are worth the most to its tokens.
    shares = b.op("And", b.op("Or", by_price, by_number), b.op("Not", broken))  # [T, 1]
    kept = b.op("And", alone, b.op("Or", b.op("Not", shares), b.op("Less", position, k_min)))
    worth = by_expert(weigh(alone))
    worth = b.op("Where", shares, b.op("Mul", worth, worth), zero)
    paid = b.op("ReduceSum", b.op("Where", by_price, b.op("Div", worth, parameter), zero), begin, keepdims=0)
    paid = b.op("Or", b.op("GreaterOrEqual", paid, one),
                b.op("Greater", b.op("ReduceSum", by_expert(kept), begin, keepdims=0), zero))  # fmt: skip
    policies = b.op("Unsqueeze", b.op("Range", b.const(0, "int64"), b.op("Squeeze", b.op("Shape", "policy_kind")),
                                      b.const(1, "int64")), begin)  # fmt: skip
    follows = b.op("And", by_number, b.op("Equal", b.op("Unsqueeze", row, last), policies))  # [T, P]
    sums = b.op("MatMul", b.op("Transpose", b.op("Cast", follows, to=f32), perm=[1, 0]), worth)  # [P, E]
    sums, ranking = b.pair("TopK", b.op("Where", paid, b.const(-1.0), sums), num_experts, axis=-1)
    additions = b.op("Floor", b.op("Slice", "thresholds", begin, end, axis1))  # [P, 1]
    added = b.op("And", b.op("Greater", sums, zero), b.op("Less", b.op("Cast", position, to=f32), additions))
    added = b.op("ScatterElements", b.op("Mul", sums, zero), ranking, b.op("Cast", added, to=f32), axis=1)
    read = b.op("Or", paid, b.op("Greater", b.op("ReduceSum", added, begin, keepdims=0), zero))  # [E]
    # They choose again: the best k_max among those that are read, of the groups that the token selects from.
    there = b.op("And", b.op("Gather", read, order, axis=0), b.op("Less", position, b.const(selectable, "int64")))
    count = b.op("CumSum", b.op("Cast", there, to=onnx.TensorProto.INT64), b.const(1, "int64"))
    shared = b.op("And", there, b.op("LessOrEqual", count, k))
    chosen = b.op("Or", b.op("And", shares, shared), b.op("And", b.op("Not", shares), alone))  # [T, E], ordered
    k = b.op("ReduceSum", b.op("Cast", chosen, to=onnx.TensorProto.INT32), last, keepdims=1)
    b.op("Reshape", k, flat, name="k")
    weights = by_expert(weigh(chosen))
    chosen = by_expert(chosen)
    load = b.op("ReduceSum", chosen, begin, keepdims=0)
    b.op("Cast", load, name="expert_load", to=onnx.TensorProto.INT32)
    if first_expert >= 0:  # the output is the part of these experts alone
        first = b.const([first_expert], "int64")
        range_end = b.op("Add", first, b.op("Shape", "down", start=0, end=1))
        weights, chosen = (b.op("Slice", value, first, range_end, axis1) for value in (weights, chosen))

    # All experts on all tokens: [E, T, H].
    tokens = b.op("Unsqueeze", "hidden_states", b.const([0], "int64"))

    def matrices(name: str) -> str:
        if quantization is None:
            weights = b.op("Cast", name, to=f32)
        else:
            weights = dequantise_in_function(b.op, b.const, name, f"{name}_scales", quantization)
        return b.op("Transpose", weights, perm=[0, 2, 1])

    hidden = _activate(b, b.op("MatMul", tokens, matrices("up")), moe.activation)
    experts = b.op("MatMul", hidden, matrices("down"))

    def per_expert(value: str) -> str:
        return b.op("Unsqueeze", b.op("Transpose", value, perm=[1, 0]), last)  # [E, T, 1]

    weighted = b.op("Mul", experts, per_expert(weights))
    kept = b.op("Where", b.op("Equal", per_expert(chosen), one), weighted, zero)
    b.op("ReduceSum", kept, b.const([0], "int64"), name="output", keepdims=0)

    given = {"correction_bias": correction_bias, "quantised": quantization is not None, "expert_norms": expert_norms}
    inputs = MOE.input_names(*(name for name, there in given.items() if there))
    opset = [helper.make_opsetid("", 24)]
    # ONNX Runtime wants all outputs of a function from its nodes, so the last one is the lowering's to add.
    outputs = [name for name in MOE.output_names() if name != "expert_load"]
    return helper.make_function(DOMAIN, OP_TYPE, inputs, outputs, b.nodes, opset, list(MOE.defaults()))


def _mask_groups(b: FunctionBody, ranked: str, moe: MoeConfig) -> str:
    """Leave only the experts of the `topk_group` best groups selectable.

    A group's score is its best expert's (softmax) or the sum of its two best (sigmoid), as DeepSeek-V2
    and -V3 have it.
    """
    size = moe.num_experts // moe.n_group
    # A logit of -inf stays before the experts of groups that are out.
    ranked = b.op("Max", ranked, b.const(np.finfo(np.float32).min))
    grouped = b.op("Reshape", ranked, b.const([-1, moe.n_group, size], "int64"))
    per_group = b.const([min(2, size) if moe.scoring == "sigmoid" else 1], "int64")
    best, _ = b.pair("TopK", grouped, per_group, axis=-1)
    group_scores = b.op("ReduceSum", best, b.const([-1], "int64"), keepdims=0)  # [T, n_group]
    # A group whose score needs a NaN ranks last, whatever else is in it.
    out = b.const(-np.inf)
    group_scores = b.op("Where", b.op("Less", group_scores, b.const(-1e38)), out, group_scores)
    _, index = b.pair("TopK", group_scores, b.const([moe.topk_group], "int64"), axis=-1)
    zero, one = b.const(0.0), b.const(1.0)
    zeros = b.op("Where", b.op("IsNaN", group_scores), zero, zero)
    ones = b.op("Where", b.op("Equal", index, index), one, one)
    keep = b.op("ScatterElements", zeros, index, ones, axis=1)
    keep = b.op("Equal", b.op("Unsqueeze", keep, b.const([2], "int64")), one)
    # An expert of a kept group ranks before all others even where its logit is -inf.
    grouped = b.op("Max", grouped, b.const(np.finfo(np.float32).min))
    masked = b.op("Where", keep, grouped, out)
    return b.op("Reshape", masked, b.const([-1, moe.num_experts], "int64"))


def _activate(b: FunctionBody, projected: str, activation: str) -> str:
    """The experts' activation over the last dimension; a gated one halves it."""
    if activation in GATED_ACTIVATIONS:
        gate, up = b.pair("Split", projected, axis=-1, num_outputs=2)
        gated = b.op("Mul", gate, b.op("Sigmoid", gate)) if activation == "swiglu" else b.op("Gelu", gate)
        return b.op("Mul", gated, up)
    match activation:
        case "silu":
            return b.op("Mul", projected, b.op("Sigmoid", projected))
        case "gelu":
            return b.op("Gelu", projected)
        case "gelu_tanh":
            return b.op("Gelu", projected, approximate="tanh")
        case "relu":
            return b.op("Relu", projected)
        case "relu2":
            positive = b.op("Relu", projected)
            return b.op("Mul", positive, positive)
    raise AssertionError(f"activation {activation}")
