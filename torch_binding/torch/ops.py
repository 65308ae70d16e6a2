# SPDX-License-Identifier: Apache-2.0
"""`torch.ops.adaptive_k.moe`, `route` and `mamba2`: schemas from the operators' tables, kernels for CPUs and GPUs.

Inputs are the tables', in their order, in lower case and by the names of a plain activation (`up`, not `gate_up`);
attributes follow by keyword. Weights are float32, float16 (GPUs), bfloat16 or, with scales, int8, where two values of
int4 share a byte. On a CPU the rest is computed in float32 and returned in the type of `hidden_states`.

    moe(hidden_states, ...) -> (output [T, H], k [T], entropy [T], expert_load [E])
    route(router_logits, ...) -> (k [T], entropy [T], experts [T, max_k], weights [T, max_k])
    mamba2(conv_input, ...) -> y [T, heads * head_dim], with conv_state and ssm_state updated in place

`expert_load` counts the tokens of each expert: the experts that a call reads are those above 0. None has a gradient.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from adaptive_k_moe import plugin
from adaptive_k_moe.plugin import _plugin
from adaptive_k_moe.plugin.description import MAMBA, MOE, WEIGHT_FORMATS, Attribute, Operator
from adaptive_k_moe.torch.cuda_library import cuda_library

Tensors = dict[str, Any]
"""A call's tensors by the table's names in lower case; None where one is absent."""

Attributes = dict[str, Any]
"""All attributes of the table by their names."""

_KINDS = {"integer": "int", "flag": "bool", "real": "float", "word": "str"}
_ROUTING = frozenset(inspect.signature(plugin.route).parameters)


class Op:
    """One operator of torch: its schema, and how a call of it is read.

    Args:
        name: in `torch.ops.adaptive_k`.
        operator: its table.
        results: the schema's.
        only: names of the inputs and attributes that it takes; None is all of the table.
        states: inputs that are updated in place.
    """

    def __init__(
        self,
        name: str,
        operator: Operator,
        results: str,
        only: frozenset[str] | None = None,
        states: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.operator = operator
        self.states = states
        self._results = results
        self._inputs = [tensor for tensor in operator.inputs if only is None or tensor.name in only]
        # An attribute that says which inputs there are is read off the call.
        told = {tensor.presence for tensor in operator.inputs}
        self._attributes = [
            attribute
            for attribute in operator.attributes
            if attribute.name not in told and (only is None or attribute.name in only)
        ]

    @property
    def schema(self) -> str:
        """In torch's words."""
        arguments = []
        for tensor in self._inputs:
            alias = f"({chr(ord('a') + self.states.index(tensor.name))}!)" if tensor.name in self.states else ""
            optional = tensor.presence != "always"
            arguments.append(f"Tensor{alias}{'?' * optional} {tensor.name.lower()}{'=None' * optional}")
        arguments += ["*", *(f"{_typed(attribute)}={_default(attribute)}" for attribute in self._attributes)]
        return f"{self.name}({', '.join(arguments)}) -> {self._results}"

    def read(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Tensors, Attributes]:
        """The tensors, ready for a kernel, and the attributes of a call.

        Raises:
            ValueError: a tensor's type, device or layout does not fit.
        """
        given = dict(zip((tensor.name.lower() for tensor in self._inputs), arguments, strict=False)) | keywords
        attributes = self.operator.defaults()
        attributes |= {name: value for name in attributes if (value := given.get(name)) is not None}
        tensors: Tensors = {}
        for tensor in self.operator.inputs:
            value = given.get(tensor.name.lower())
            if tensor.presence in attributes:
                attributes[tensor.presence] = value is not None
            tensors[tensor.name.lower()] = (
                None if value is None else self._ready(tensor.name, tensor.type, value, given)
            )
        if "up" in given:
            attributes["weight_format"] = form = _weight_format(tensors, str(attributes["weight_format"]))
            for tensor in self.operator.inputs:
                there = tensors[tensor.name.lower()] is not None
                if tensor.presence == "quantised" and there != WEIGHT_FORMATS[form].quantised:
                    word = "needed" if not there else "not taken"
                    raise ValueError(f"{self.operator.name}: input {tensor.name} is {word} with weights of {form}")
        return tensors, attributes

    def _ready(self, name: str, kind: str, value: Any, given: Tensors) -> Any:
        first = given[self._inputs[0].name.lower()]
        wanted = {"int32": torch.int32, "float32": torch.float32, "element": first.dtype}.get(kind, value.dtype)
        if value.dtype != wanted:
            raise ValueError(f"{self.operator.name}: input {name} is {value.dtype} but must be {wanted}")
        if value.device != first.device:
            raise ValueError(f"{self.operator.name}: input {name} is on {value.device} but must be on {first.device}")
        if (kind == "weights" or name in self.states) and not value.is_contiguous():
            raise ValueError(f"{self.operator.name}: input {name} must be contiguous; it is never copied")
        return value.detach().contiguous()


def _typed(attribute: Attribute) -> str:
    # A schema has no word for infinity.
    endless = attribute.type == "real" and math.isinf(float(attribute.default))
    return f"{_KINDS[attribute.type]}{'?' * endless} {attribute.name}"


def _default(attribute: Attribute) -> str:
    match attribute.type:
        case "word":
            return f'"{attribute.default}"'
        case "flag":
            return str(bool(attribute.default))
        case "real" if math.isinf(float(attribute.default)):
            return "None"
        case _:
            return str(attribute.default)


def _weight_format(tensors: Tensors, given: str) -> str:
    """The word for the weights' type; bytes are told apart by the length of a row, unless `given` says."""
    up, hidden = tensors["up"], tensors["hidden_states"]
    if tensors["down"].dtype != up.dtype:
        raise ValueError(f"{MOE.name}: input down is {tensors['down'].dtype} but must be {up.dtype}, as up is")
    if up.dtype.is_floating_point:
        found = [str(up.dtype).removeprefix("torch.")]
    else:
        bits = 8 * up.element_size() * up.shape[-1] // max(hidden.shape[-1], 1)
        found = [form.name for form in WEIGHT_FORMATS.values() if form.quantised and form.bits == bits]
    if given in found or (not given and found and found[0] in WEIGHT_FORMATS):
        return given or found[0]
    raise ValueError(
        f"{MOE.name}: input up is {up.dtype} of {tuple(up.shape)}, which is "
        f"{f'not {given}' if given else f'none of {sorted(WEIGHT_FORMATS)}'} beside {hidden.shape[-1]} hidden values"
    )


MOE_OP = Op("moe", MOE, "(Tensor output, Tensor k, Tensor entropy, Tensor expert_load)")
ROUTE_OP = Op("route", MOE, "(Tensor k, Tensor entropy, Tensor experts, Tensor weights)", only=_ROUTING)
MAMBA_OP = Op("mamba2", MAMBA, "Tensor y", states=("conv_state", "ssm_state"))


# Kernels for CPUs. -----------------------------------------------------------------------------------------------


def _arrays(operator: Operator, tensors: Tensors) -> Iterator[Any]:
    """As the compiled module takes them: float32, but for integers and for weights, which are read in place."""
    for tensor in operator.inputs:
        value = tensors[tensor.name.lower()]
        if value is not None and tensor.type == "element" and value.dtype != torch.float32:
            value = value.float()
        elif value is not None and value.dtype == torch.bfloat16:
            value = value.view(torch.int16)  # NumPy has no name for it
        yield None if value is None else value.numpy()


def _moe_on_cpu(tensors: Tensors, attributes: Attributes) -> tuple[Any, ...]:
    hidden, logits = tensors["hidden_states"], tensors["router_logits"]
    outputs = (
        torch.empty(hidden.shape, dtype=torch.float32),
        torch.empty(hidden.shape[:1], dtype=torch.int32),
        torch.empty(hidden.shape[:1], dtype=torch.float32),
        torch.zeros(logits.shape[1:], dtype=torch.int32),
    )
    arrays = (output.numpy() for output in outputs)
    _plugin.moe(attributes, list(_arrays(MOE, tensors)), torch.get_num_threads(), *arrays)
    return outputs[0].to(hidden.dtype), *outputs[1:]


def _route_on_cpu(tensors: Tensors, attributes: Attributes) -> tuple[Any, ...]:
    inputs = list(_arrays(MOE, tensors))
    tokens, width = len(tensors["router_logits"]), _plugin.routing_width(attributes, inputs)
    outputs = tuple(
        torch.empty(shape, dtype=dtype)
        for shape in ((tokens,), (tokens, width))
        for dtype in (torch.int32, torch.float32)
    )
    _plugin.route(attributes, inputs, *(output.numpy() for output in outputs))
    return outputs


def _mamba_on_cpu(tensors: Tensors, attributes: Attributes) -> Any:
    states = tensors["conv_state"], tensors["ssm_state"]
    if any(state.dtype != torch.float32 for state in states):
        raise ValueError(f"{MAMBA.name}: on a CPU input conv_state must be torch.float32, and so all others")
    _, heads, _, width = states[1].shape
    y = torch.empty((len(tensors["dt"]), heads * width), dtype=torch.float32)
    _plugin.mamba2(attributes, list(_arrays(MAMBA, tensors)), torch.get_num_threads(), y.numpy())
    return y


# What torch.compile and torch.export see. ------------------------------------------------------------------------


def _moe_shapes(tensors: Tensors, _attributes: Attributes) -> tuple[Any, ...]:
    hidden, logits = tensors["hidden_states"], tensors["router_logits"]
    tokens, experts = logits.shape
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format),
        logits.new_empty(tokens, dtype=torch.int32),
        logits.new_empty(tokens),
        logits.new_empty(experts, dtype=torch.int32),
    )


def _route_shapes(tensors: Tensors, attributes: Attributes) -> tuple[Any, ...]:
    logits = tensors["router_logits"]
    tokens, experts = logits.shape
    shapes = [[1, int(experts)] if tensor.name == "router_logits" else None for tensor in MOE.inputs]
    width = _plugin.moe_sizes(attributes, shapes, 8)["largest_k"]
    return tuple(
        logits.new_empty(shape, dtype=dtype)
        for shape in ((tokens,), (tokens, width))
        for dtype in (torch.int32, torch.float32)
    )


def _mamba_shapes(tensors: Tensors, _attributes: Attributes) -> Any:
    _, heads, _, width = tensors["ssm_state"].shape
    return tensors["conv_input"].new_empty(tensors["dt"].shape[0], heads * width)


# The registration. -----------------------------------------------------------------------------------------------

Kernel = Callable[[Tensors, Attributes], Any]


def kernel_of(op: Op, kernel: Kernel) -> Callable[..., Any]:
    """A kernel as torch's dispatcher calls it."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        return kernel(*op.read(arguments, keywords))

    return call


def _no_gradient(name: str) -> Callable[..., Any]:
    def backward(*_: Any) -> Any:
        raise RuntimeError(f"adaptive_k::{name} has no gradient: it is for inference, under torch.no_grad()")

    return backward


_LIBRARY = torch.library.Library("adaptive_k", "DEF")

for _op, _on_cpu, _on_gpu, _shapes in (
    (MOE_OP, _moe_on_cpu, lambda *call: cuda_library().on_stream("moe", *call), _moe_shapes),
    (ROUTE_OP, _route_on_cpu, lambda *call: cuda_library().on_stream("route", *call), _route_shapes),
    (MAMBA_OP, _mamba_on_cpu, lambda *call: cuda_library().on_stream("mamba2", *call), _mamba_shapes),
):
    _LIBRARY.define(_op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_op.name, kernel_of(_op, _on_cpu), "CPU")
    _LIBRARY.impl(_op.name, kernel_of(_op, _on_gpu), "CUDA")
    torch.library.register_fake(f"adaptive_k::{_op.name}", kernel_of(_op, _shapes), lib=_LIBRARY)
    if not _op.states:  # torch gives no gradient formula to an operator that updates its inputs
        torch.library.register_autograd(f"adaptive_k::{_op.name}", _no_gradient(_op.name), lib=_LIBRARY)
