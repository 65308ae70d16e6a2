# SPDX-License-Identifier: Apache-2.0
"""Weight-only quantisation: what is stored, how it is rounded, and how a graph of standard ops reads it.

A row's values are integers times a scale, symmetric about zero: one scale a row, or one for `group_size`
neighbours along it. Two int4 share a byte, the one with the even index in the low half, both in two's
complement: so ONNX's own int4 has it, and the operator's weights too (``plugin/cuda/moe/launcher.h``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from adaptive_k_moe.engine_config import Target
from adaptive_k_moe.errors import BuildError
from adaptive_k_moe.model_config import PretrainedConfig, QuantAlgo, QuantizationConfig, WeightOnlyPrecision
from adaptive_k_moe.plugin.description import WEIGHT_FORMATS

GROUP_SIZES = (128, 64, 32)
"""The sizes of groups that the kernels and TensorRT have, the usual one first."""

QUANT_ALGOS: dict[tuple[WeightOnlyPrecision, str], QuantAlgo] = {
    ("int8", "A16"): "W8A16",
    ("int8", "A8"): "W8A8",
    ("int4", "A16"): "W4A16",
    ("int4", "A8"): "W4A8",
}
"""By the weights' precision and the activations'."""

# Scales that are tried for each group, as shares of the one by which the largest value is kept: with few bits
# cutting it off costs less than it saves the others. The one with the least squared error is taken.
_SHRINKS = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85)}

# Values that are rounded at once: what the processor's cache holds.
_CHUNK = 1 << 17

_SCALE_TYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

Array = npt.NDArray[Any]


def plan_weight_only(
    model: PretrainedConfig,
    target: Target,
    precision: WeightOnlyPrecision | None,
    quant_algo: QuantAlgo | None,
    group_size: int | None,
) -> QuantizationConfig | None:
    """How a model's weights are quantised; None is not at all.

    Args:
        model: its sizes.
        target: what will run the engine.
        precision: "int8", one scale a row, or "int4", one scale a group; None is what `quant_algo` says.
        quant_algo: None is the target's: weights of `precision`, and activations rounded to int8 for "openvino", of
            the model's dtype for the others.
        group_size: of int4; None is the largest of `GROUP_SIZES` that divides the rows of every product.

    Raises:
        BuildError: the model's rows are of lengths that the kernels do not read in this format, or what is asked for
            does not go together.
    """
    on_cpu = target == "openvino"
    if quant_algo is None:
        if precision is None:
            if group_size is not None:
                raise BuildError("group_size is for --use_weight_only with --weight_only_precision int4.")
            return None
        activations: str = "A8" if on_cpu else "A16"
        quant_algo = QUANT_ALGOS[precision, activations]
    asked = QuantizationConfig(quant_algo=quant_algo)
    if asked.rounds_activations and not on_cpu:
        raise BuildError(
            f"quant_algo {quant_algo} is for --target openvino: the {target} target multiplies with activations of "
            f"the engine's dtype, which is {QUANT_ALGOS[asked.weight_format, 'A16']}."
        )
    if precision not in (None, asked.weight_format):
        raise BuildError(
            f"quant_algo {quant_algo} has {asked.weight_format} weights, not {precision}: give one of them."
        )
    # A GPU's kernels look an embedding's rows up in the engine's dtype, and TensorRT-LLM leaves the head in it.
    excluded = ["router", "shared_expert_gate"] if on_cpu else asked.exclude_modules
    if asked.bits == 8:
        if group_size is not None:
            raise BuildError("group_size is for --weight_only_precision int4: int8 has one scale for each row.")
        _require_divisor(model, "int8", WEIGHT_FORMATS["int8"].row_multiple)
        return QuantizationConfig(quant_algo=quant_algo, exclude_modules=excluded)
    if group_size is None:
        rows = _row_lengths(model).values()
        group_size = next((size for size in GROUP_SIZES if not any(row % size for row in rows)), GROUP_SIZES[-1])
    elif group_size not in GROUP_SIZES:
        raise BuildError(f"group_size is {group_size}: it is one of {', '.join(map(str, sorted(GROUP_SIZES)))}.")
    _require_divisor(model, "int4", group_size)
    return QuantizationConfig(quant_algo=quant_algo, group_size=group_size, exclude_modules=excluded)


def _require_divisor(model: PretrainedConfig, precision: str, divisor: int) -> None:
    for name, length in _row_lengths(model).items():
        if length % divisor:
            raise BuildError(
                f"{precision} weights need rows of a multiple of {divisor} values, but the model's {name} is {length}."
            )


def _row_lengths(model: PretrainedConfig) -> dict[str, int]:
    """Lengths of the rows of every weight that is quantised, by the name of the size."""
    moe, shared, mamba = model.moe, model.moe.shared_expert, model.mamba
    lengths = {
        "hidden_size": model.hidden_size,
        "num_attention_heads x head_dim": model.num_attention_heads * model.head_dim,
        "experts' intermediate_size": moe.intermediate_size,
        "experts' latent size": moe.latent_size,
        "shared expert's intermediate_size": shared and shared.intermediate_size,
        "dense layers' intermediate_size": model.dense_mlp and model.dense_mlp.intermediate_size,
        "Mamba layers' inner size": mamba and mamba.intermediate_size,
    }
    if not model.attention_layers:
        del lengths["num_attention_heads x head_dim"]
    return {name: length for name, length in lengths.items() if length}


def quantise(name: str, rows: Array, quantization: QuantizationConfig, dtype: str) -> tuple[Array, Array]:
    """Round rows to integers and scales.

    Args:
        name: of the weight, for the error.
        rows: [..., K] of any float type.
        quantization: bits and group size.
        dtype: of the scales.

    Returns:
        The values, int8 [..., K], or [..., K / 2] where two share a byte; and the scales, [..., K / group size],
        or [..., 1] for one a row.

    Raises:
        BuildError: a weight is not finite, or beyond the range of the scales' type.
    """
    bits, shape = quantization.bits, rows.shape
    size = quantization.group_size or shape[-1]
    groups = rows.reshape(-1, size)
    values: npt.NDArray[np.int8] = np.empty(groups.shape, np.int8)
    scales = np.empty((len(groups), 1), _SCALE_TYPES[dtype])
    step = max(1, _CHUNK // size)
    for start in range(0, len(groups), step):
        part = slice(start, start + step)
        values[part], scales[part] = _round(name, groups[part].astype(np.float32), bits, dtype)
    values = values.reshape(shape)
    if bits == 4:
        values = (values[..., 0::2] & 15) | (values[..., 1::2] << 4)
    return values, scales.reshape(*shape[:-1], -1)


def _round(name: str, groups: Array, bits: int, dtype: str) -> tuple[Array, Array]:
    """Integers and scales of some groups, [G, group size] float32; see `quantise`."""
    largest = np.abs(groups).max(-1, keepdims=True)
    if not largest.max(initial=0.0) <= ml_dtypes.finfo(_SCALE_TYPES[dtype]).max:
        raise BuildError(f"{name} has values that are not finite or beyond {dtype}'s range: it cannot be quantised.")
    limit = 2 ** (bits - 1) - 1
    tried: list[tuple[Array, Array]] = []
    for shrink in _SHRINKS[bits]:
        scales = (largest * shrink / limit).astype(_SCALE_TYPES[dtype])
        scales[scales == 0] = 1  # a group of zeros, or of numbers too small for the type
        tried.append((np.rint(groups / scales.astype(np.float32)).clip(-limit - 1, limit), scales))
    if len(tried) == 1:
        return tried[0]
    errors = [
        np.square(values * scales.astype(np.float32) - groups).sum(-1, dtype=np.float64) for values, scales in tried
    ]
    best, rows = np.argmin(errors, axis=0), np.arange(len(groups))
    all_values, all_scales = (np.stack(column) for column in zip(*tried, strict=True))
    return all_values[best, rows], all_scales[best, rows]


def dequantise_in_function(
    op: Callable[..., str], const: Callable[..., str], values: str, scales: str, quantization: QuantizationConfig
) -> str:
    """Nodes of a function body that give a weight's float32 values back.

    TensorRT takes constants of integers before a `DequantizeLinear` or a plugin alone, so that is what makes
    floats of the bytes, with a scale of 1; two int4 are told apart by arithmetic.

    Args:
        op: adds a node and returns its value's name.
        const: adds a constant and returns its name.
        values: int8 [E, N, K], or [E, N, K / 2].
        scales: [E, N, K / group size] of any float type.
        quantization: bits and group size.

    Returns:
        [E, N, K] float32.
    """
    last = const([-1], "int64")
    weights = op("DequantizeLinear", values, const(1.0))
    if quantization.bits == 4:
        high = op("Floor", op("Mul", weights, const(1 / 16)))
        low = op("Sub", weights, op("Mul", high, const(16.0)))  # 0 to 15
        low = op("Where", op("Less", low, const(8.0)), low, op("Sub", low, const(16.0)))
        weights = op("Concat", op("Unsqueeze", low, last), op("Unsqueeze", high, last), axis=-1)
        weights = op("Reshape", weights, const([0, 0, -1], "int64"))
    scales = op("Cast", scales, to=TensorProto.FLOAT)
    if quantization.group_size is None:
        return op("Mul", weights, scales)
    groups = op("Reshape", weights, const([0, 0, -1, quantization.group_size], "int64"))
    scaled = op("Mul", groups, op("Unsqueeze", scales, last))
    return op("Reshape", scaled, const([0, 0, -1], "int64"))
