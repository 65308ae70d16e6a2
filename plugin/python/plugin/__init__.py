# SPDX-License-Identifier: Apache-2.0
"""The AdaptiveKMoe operator: the binding for NumPy of the CPU implementation, and the OpenVINO extension.

`route` and `moe` run the operator on NumPy arrays; `openvino_extension_path` is what
`openvino.Core.add_extension` takes so that models with the operator can be read and compiled.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Routing", "instruction_set", "mamba2", "moe", "openvino_extension_path", "route"]

Array = npt.NDArray[Any]


def _load_tbb() -> None:
    """Loads the OpenVINO wheel's TBB, so that the libraries find it wherever the wheel lies."""
    spec = importlib.util.find_spec("openvino")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "adaptive_k_moe.plugin needs OpenVINO, which brings its thread library: "
            "pip install 'adaptive-k-moe[engine]'"
        )
    library = Path(spec.submodule_search_locations[0]) / "libs" / "libtbb.so.12"
    if library.exists():
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


_load_tbb()

from adaptive_k_moe.plugin import _plugin  # noqa: E402
from adaptive_k_moe.plugin.description import GATED_ACTIVATIONS, MOE, WEIGHT_FORMATS  # noqa: E402
from adaptive_k_moe.plugin.mamba import mamba2  # noqa: E402


class Routing(NamedTuple):
    """What `route` decides for T tokens.

    Attributes:
        k: [T] int32, the number of experts that each token runs.
        entropy: [T] float32, entropy of the softmax over all logits, in nats.
        experts: [T, max_k] int32, the first k of a row are the selected experts, best first; then -1.
        weights: [T, max_k] float32, the weight of each selected expert; then 0.
    """

    k: npt.NDArray[np.int32]
    entropy: npt.NDArray[np.float32]
    experts: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]


def openvino_extension_path() -> Path:
    """The library with the OpenVINO operation, for `openvino.Core.add_extension`.

    Raises:
        FileNotFoundError: The package was built without the extension.
    """
    path = Path(_plugin.__file__).parent / "libadaptive_k_openvino.so"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: the package was built without the OpenVINO extension")
    return path


def instruction_set() -> str:
    """The instruction set of the loops in use: portable, avx2, avx_vnni, avx512, avx512_vnni or amx.

    The environment variable ADAPTIVE_K_ISA forces one, if set before the first call.
    """
    name: str = _plugin.instruction_set()
    return name


# Of the inputs whose type the description names; those of weights are looked at on their own.
_DTYPES: dict[str, type[np.generic]] = {"element": np.float32, "float32": np.float32, "int32": np.int32}


def _inputs(given: dict[str, Any], activation: str = "silu") -> list[Array | None]:
    """The arrays in the table's order, None where one is absent; contents are never converted."""
    arrays: list[Array | None] = []
    for tensor in MOE.inputs:
        value = given.get(tensor.name)
        name = tensor.gated_name if activation in GATED_ACTIVATIONS else tensor.name
        dtype: type[np.generic] | None = {"element": np.float32, "float32": np.float32, "int32": np.int32}.get(
            tensor.type
        )
        arrays.append(value if value is None or dtype is None else _input(name, value, dtype))
    return arrays


def _input(name: str, value: npt.ArrayLike, dtype: type[np.generic]) -> Array:
    """A contiguous array of exactly that type."""
    array = np.asarray(value)
    if array.dtype != dtype:
        raise ValueError(f"AdaptiveKMoe: input {name} is {array.dtype} but must be {np.dtype(dtype).name}")
    return np.ascontiguousarray(array) if array.ndim else array


def _weights(name: str, array: Array, integers: str | None) -> tuple[Array, str]:
    """The array as the library reads it, uncopied, and its weight format, which of integers is `integers`."""
    if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
        raise ValueError(f"AdaptiveKMoe: input {name} must be a C-contiguous NumPy array; it is never copied")
    if integers is not None:
        return _input(name, array, np.int8), integers
    if array.dtype == np.float32:
        return array, "float32"
    if array.dtype == np.uint16:
        return array, "bfloat16"
    if array.dtype.name == "bfloat16":
        return array.view(np.uint16), "bfloat16"
    raise ValueError(
        f"AdaptiveKMoe: input {name} is {array.dtype} but must be float32, bfloat16 "
        "(ml_dtypes.bfloat16, or its bits as uint16) or, with scales, int8"
    )


def route(
    router_logits: npt.ArrayLike,
    policy_index: npt.ArrayLike,
    policy_kind: npt.ArrayLike,
    thresholds: npt.ArrayLike,
    k_values: npt.ArrayLike,
    *,
    correction_bias: npt.ArrayLike | None = None,
    expert_norms: npt.ArrayLike | None = None,
    scoring: str = "softmax",
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
    max_k: int = 0,
) -> Routing:
    """Decides how many and which experts each token runs, and with what weights.

    Args:
        router_logits: [T, E] float32, the router's raw logits.
        policy_index: [T] int32, the policy row of each token, clamped into [0, P).
        policy_kind: [P] int32, what each row decides by: 0 entropy, 1 top-p, 2 ratio to the best score,
            3 contribution.
        thresholds: [P, C-1] float32. Entropy rows: limits in nats between the C choices, rising, padded with
            infinity. All other rows: their parameter first.
        k_values: [P, C] int32. Entropy rows: experts to run in each choice. All other rows: the least first, the
            most last.
        correction_bias: [E] float32, added to the scores for selection, not for the weights.
        expert_norms: [E] float32, what contribution rows multiply the scores by; None is as all ones. Such a row
            runs the fewest experts that reach the share p of what the most that it may run contribute.
        scoring: "softmax" or "sigmoid".
        norm_topk_prob: Whether the selected weights are divided by their sum.
        routed_scaling_factor: Multiplies the weights in the end.
        n_group: Number of groups that the experts form.
        topk_group: Number of groups that a token selects from.
        max_k: Upper limit of k; 0 means min(E, 32).

    Returns:
        The routing, with `max_k` columns (fewer when the groups leave fewer experts).

    Raises:
        ValueError: An input or attribute does not fit; the message names it.
    """
    attributes = dict(
        scoring=scoring,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=routed_scaling_factor,
        n_group=n_group,
        topk_group=topk_group,
        max_k=max_k,
    )
    inputs = _inputs(
        dict(
            router_logits=router_logits,
            policy_index=policy_index,
            policy_kind=policy_kind,
            thresholds=thresholds,
            k_values=k_values,
            correction_bias=correction_bias,
            expert_norms=expert_norms,
        )
    )
    width = _plugin.routing_width(attributes, inputs)
    tokens = len(np.asarray(router_logits))
    routing = Routing(
        k=np.empty(tokens, np.int32),
        entropy=np.empty(tokens, np.float32),
        experts=np.empty((tokens, width), np.int32),
        weights=np.empty((tokens, width), np.float32),
    )
    _plugin.route(attributes, inputs, *routing)
    return routing


def moe(
    hidden_states: npt.ArrayLike,
    router_logits: npt.ArrayLike,
    policy_index: npt.ArrayLike,
    policy_kind: npt.ArrayLike,
    thresholds: npt.ArrayLike,
    k_values: npt.ArrayLike,
    gate_up: Array,
    down: Array,
    *,
    gate_up_scales: npt.ArrayLike | None = None,
    down_scales: npt.ArrayLike | None = None,
    weight_bits: int = 8,
    activation_format: str = "",
    correction_bias: npt.ArrayLike | None = None,
    expert_norms: npt.ArrayLike | None = None,
    activation: str = "swiglu",
    scoring: str = "softmax",
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
    max_k: int = 0,
    first_expert: int = -1,
    num_threads: int | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Runs the whole operator. Its result for a token does not depend on the other tokens, to the bit.

    Args:
        hidden_states: [T, H] float32.
        router_logits: As for `route`, and so are the other arguments of that name.
        policy_index: See `route`.
        policy_kind: See `route`.
        thresholds: See `route`.
        k_values: See `route`.
        gate_up: [E, 2I, H], gate rows then up rows, for a gated activation; else the up-projection, [E, I, H].
            float32, bfloat16 as ml_dtypes.bfloat16 or as uint16 bits, or, with scales, int8. C-contiguous; read in
            place.
        down: [E, H, I], of the same type.
        gate_up_scales: [E, 2I or I, H / group size] float32, for weights that are integers times a scale: one for
            each group of a multiple of 32 neighbours along a row, or one for the row.
        down_scales: [E, H, I / group size], of the same group size.
        weight_bits: 8, or 4 where two values share an int8, the one with the even index in the low half; the last
            dimension of weights is then half as long.
        activation_format: "int8" multiplies integer weights with activations that are rounded to int8, with a scale
            for each block of 256 neighbours (128 for weights in groups, or a smaller group); "" rounds nothing.
        correction_bias: See `route`.
        expert_norms: See `route`.
        activation: "swiglu", "geglu" (gated), "silu", "gelu", "gelu_tanh", "relu" or "relu2".
        scoring: See `route`.
        norm_topk_prob: See `route`.
        routed_scaling_factor: See `route`.
        n_group: See `route`.
        topk_group: See `route`.
        max_k: See `route`.
        first_expert: Expert parallel: the weights are of W experts from this one on; -1 is all E. Decisions, k and
            entropy are over all experts; the output is the part of the sum that these W contribute, so that the
            outputs of calls that share out the experts add up to the whole.
        num_threads: Threads to use; None means all that TBB gives.

    Returns:
        output [T, H] float32, k [T] int32, entropy [T] float32 in nats.

    Raises:
        ValueError: An input or attribute does not fit; the message names it.
    """
    if (gate_up_scales is None) != (down_scales is None):
        raise ValueError("AdaptiveKMoe: inputs gate_up_scales and down_scales must be given both, or neither")
    quantised = sorted((form.bits, form.name) for form in WEIGHT_FORMATS.values() if form.quantised)
    names = [name for bits, name in quantised if bits == weight_bits]
    if not names:
        bits_known = " or ".join(str(bits) for bits, _ in quantised)
        raise ValueError(f"AdaptiveKMoe: weight_bits is {weight_bits!r} but must be {bits_known}")
    integers = None if gate_up_scales is None else names[0]
    up_bits, weight_format = _weights("gate_up", gate_up, integers)
    down_bits, down_format = _weights("down", down, integers)
    if down_format != weight_format:
        raise ValueError(f"AdaptiveKMoe: input down is {down_format} but gate_up is {weight_format}")
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"AdaptiveKMoe: num_threads is {num_threads} but must be at least 1")
    attributes = dict(
        activation=activation,
        scoring=scoring,
        weight_format=weight_format,
        activation_format=activation_format,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=routed_scaling_factor,
        n_group=n_group,
        topk_group=topk_group,
        max_k=max_k,
        first_expert=first_expert,
    )
    inputs = _inputs(
        dict(
            hidden_states=hidden_states,
            router_logits=router_logits,
            policy_index=policy_index,
            policy_kind=policy_kind,
            thresholds=thresholds,
            k_values=k_values,
            up=up_bits,
            down=down_bits,
            up_scales=gate_up_scales,
            down_scales=down_scales,
            correction_bias=correction_bias,
            expert_norms=expert_norms,
        ),
        activation,
    )
    hidden = np.asarray(hidden_states)
    output = np.empty_like(hidden)
    tokens = len(hidden) if hidden.ndim else 0
    k = np.empty(tokens, np.int32)
    entropy = np.empty(tokens, np.float32)
    _plugin.moe(attributes, inputs, num_threads, output, k, entropy)
    return output, k, entropy
