# SPDX-License-Identifier: Apache-2.0
"""`torch.ops.adaptive_k` held to the oracles, on whatever device: for a CPU, the interpreter and a GPU alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cuda_mamba
import numpy as np
import numpy.typing as npt
import torch
from cuda_cases import Inputs, check_output, check_routing, make_inputs, routing_arguments
from cuda_launcher import DTYPES, Layer, Result

from mamba_oracle import Case  # isort: skip

Array = npt.NDArray[Any]
Tensors = dict[str, Any]

FORMATS: dict[str, dict[str, Any]] = {
    "float16": {"element": "float16"},
    "bfloat16": {"element": "bfloat16"},
    "float32": {"element": "float32"},
    "int8": {"element": "bfloat16", "weights": "int8", "group_size": 32},
    "int8 rows": {"element": "float32", "weights": "int8"},
    "int4": {"element": "bfloat16", "weights": "int4", "group_size": 64},
    "int4 rows": {"element": "float32", "weights": "int4"},
}
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"scoring": "sigmoid", "activation": "relu2", "routed_scaling_factor": 2.5},
    "groups": {"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "activation": "geglu"},
}


def to_torch(array: Array, device: str) -> Any:
    if array.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(device)
    return torch.from_numpy(array.copy()).to(device)


def to_numpy(tensor: Any) -> Array:
    tensor = tensor.cpu()
    return (
        tensor.view(torch.int16).numpy().view(DTYPES["bfloat16"]) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    )


def tensors_of(inputs: Inputs, device: str) -> Tensors:
    return {name: to_torch(array, device) for name, array in inputs.items() if array is not None}


def attributes_of(layer: Layer) -> dict[str, Any]:
    word = "" if layer.weights == "element" else layer.weights
    return {**routing_arguments(layer), "activation": layer.activation, "weight_format": word}


def make(router: str, form: str, tokens: int) -> tuple[Layer, Inputs, Inputs]:
    """A layer of small sizes, its inputs and the oracle's."""
    layer = Layer(tokens, 64, 128, 8, **{**FORMATS[form], **ROUTERS[router]}, max_k=4)
    return layer, *make_inputs(layer, tokens, bias=router != "softmax", most=4)


def routing_of(tensors: Tensors, layer: Layer) -> tuple[Any, ...]:
    names = ("router_logits", "policy_index", "policy_kind", "thresholds", "k_values")
    optional = {name: tensors.get(name) for name in ("correction_bias", "expert_norms")}
    found: tuple[Any, ...] = torch.ops.adaptive_k.route(
        *(tensors[name] for name in names), **optional, **routing_arguments(layer)
    )
    return found


def check_moe(layer: Layer, inputs: Inputs, exact: Inputs, device: str) -> None:
    """Outputs, routing and load of one call each of `moe` and `route`."""
    tensors = tensors_of(inputs, device)
    output, k, entropy, load = torch.ops.adaptive_k.moe(**tensors, **attributes_of(layer))
    assert output.dtype == tensors["hidden_states"].dtype and output.device == tensors["hidden_states"].device
    routed_k, routed_entropy, experts, weights = routing_of(tensors, layer)
    assert torch.equal(k, routed_k)
    torch.testing.assert_close(entropy, routed_entropy, rtol=0, atol=0, equal_nan=True)
    result = Result(*(to_numpy(part) for part in (output, k, entropy, load, experts, weights)))
    check_routing(layer, exact, result)
    check_output(layer, exact, result)
    chosen = result.experts[result.experts >= 0]
    np.testing.assert_array_equal(to_numpy(load), np.bincount(chosen, minlength=layer.experts))


def check_ranges(layer: Layer, inputs: Inputs, exact: Inputs, device: str) -> None:
    """Calls that share out the experts: each the oracle's part, and what they decide is that of all experts."""
    whole = torch.ops.adaptive_k.moe(**tensors_of(inputs, device), **attributes_of(layer))
    for first, end in ((0, 3), (3, 7), (7, 8)):
        part = replace(layer, first_expert=first, local_experts=end - first)
        sliced = {"up", "down", "up_scales", "down_scales"}
        mine, mine_exact = (
            {name: array[first:end] if array is not None and name in sliced else array for name, array in all_.items()}
            for all_ in (inputs, exact)
        )
        output, *decided = torch.ops.adaptive_k.moe(
            **tensors_of(mine, device), **attributes_of(layer), first_expert=first
        )
        assert all(torch.equal(left, right) for left, right in zip(decided, whole[1:], strict=True))
        check_output(part, mine_exact, Result(*(to_numpy(value) for value in (output, *decided))))


def check_mamba(case: Case, element: str, device: str) -> None:
    """Outputs and states of one call of `mamba2`."""
    inputs, exact = cuda_mamba.make(case, element)
    tensors = tensors_of(inputs, device)
    attributes = {"n_groups": case.n_groups, "dt_min": case.dt_min}
    if np.isfinite(case.dt_max):
        attributes["dt_max"] = case.dt_max
    y = torch.ops.adaptive_k.mamba2(**tensors, **attributes)
    found = (to_numpy(part) for part in (y, tensors["conv_state"], tensors["ssm_state"]))
    cuda_mamba.check(case, exact, element, tuple(found))  # type: ignore[arg-type]
