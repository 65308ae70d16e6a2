# SPDX-License-Identifier: Apache-2.0
"""`Linear`, the dense product of engines that round, in OpenVINO."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from cases import quantise
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from adaptive_k_moe.plugin import instruction_set, openvino_extension_path

import oracle

Array = npt.NDArray[Any]


def compiled(weight: Array, scales: Array | None, features: int, **attributes: str) -> Any:
    """A compiled model of one `Linear`."""
    import openvino

    inputs = ["x", "w"] + (["s"] if scales is not None else [])
    constants = [numpy_helper.from_array(weight, "w")]
    if scales is not None:
        constants.append(numpy_helper.from_array(scales, "s"))
    graph = helper.make_graph(
        [helper.make_node("Linear", inputs, ["y"], domain="adaptive_k", **attributes)],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None, features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("adaptive_k", 1)]
    core = openvino.Core()
    core.add_extension(str(openvino_extension_path()))
    model = core.read_model(onnx.ModelProto.SerializeToString(helper.make_model(graph, opset_imports=opsets)))
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def product(weight: Array, scales: Array | None, x: Array, **attributes: str) -> Array:
    found: Array = compiled(weight, scales, x.shape[-1], **attributes)([x])[0]
    return found


def made(n: int, k: int, bits: int, group: int | None) -> tuple[Array, Array, Array]:
    """Integers, scales and what they stand for, of [n, k]."""
    values = np.random.default_rng(n).standard_normal((1, n, k)).astype(np.float32)
    integers, scales, dense = quantise(values, bits, k // (group or k), np.float32)
    return integers[0], scales[0], dense[0]


def states(count: int, k: int) -> Array:
    return np.random.default_rng(count).standard_normal((count, 1, k)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 2, 5, 40, 300])
@pytest.mark.parametrize(
    ("bits", "group", "n", "k"), [(8, None, 33, 144), (8, 64, 16, 192), (4, 32, 100, 96), (4, 128, 530, 256)]
)
def test_integers_times_activations_in_int8(count: int, bits: int, group: int | None, n: int, k: int) -> None:
    weight, scales, dense = made(n, k, bits, group)
    x = states(count, k)
    found = product(weight, scales, x, weight_format=f"int{bits}", activation_format="int8")
    rounded = np.stack([oracle.in_int8(row, group) for row in x[:, 0]])
    want = rounded @ dense.T.astype(np.float64)
    assert found.shape == (count, 1, n)
    np.testing.assert_allclose(found[:, 0], want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("count", [1, 7, 70])
def test_integers_times_exact_activations(count: int) -> None:
    weight, scales, dense = made(48, 160, 8, None)
    x = states(count, 160)
    found = product(weight, scales[:, 0], x, weight_format="int8")  # scales of whole rows may be [N]
    np.testing.assert_allclose(found[:, 0], x[:, 0] @ dense.T, rtol=0, atol=1e-5 * np.abs(found).max())


@pytest.mark.parametrize(("count", "n", "k"), [(1, 40, 70), (3, 17, 64), (33, 300, 1100)])
def test_bfloat16(count: int, n: int, k: int) -> None:
    weight = np.random.default_rng(n).standard_normal((n, k)).astype(ml_dtypes.bfloat16)
    x = states(count, k)
    found = product(weight.view(np.uint8), None, x, weight_format="bfloat16")
    seen = oracle.bfloat16(x[:, 0]) if instruction_set() == "amx" else x[:, 0].astype(np.float64)
    want = seen @ weight.astype(np.float64).T
    np.testing.assert_allclose(found[:, 0], want, rtol=0, atol=2e-6 * np.abs(want).max())


@settings(max_examples=20, deadline=None)
@given(count=st.integers(2, 200), first=st.integers(0, 198), bits=st.sampled_from([8, 4]))
def test_a_tokens_bits_do_not_depend_on_its_company(count: int, first: int, bits: int) -> None:
    weight, scales, _ = made(70, 256, bits, None if bits == 8 else 64)
    model = compiled(weight, scales, 256, weight_format=f"int{bits}", activation_format="int8")
    x = states(count, 256)
    part = slice(min(first, count - 1), None)
    whole = model([x])[0].copy()
    assert (model([x[part]])[0] == whole[part]).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "scales", "attributes", "sentence"),
    [
        ((8, 64), np.int8, (8, 1), {"weight_format": "int2"}, "weight_format is 'int2' but must be one of"),
        ((8, 64), np.int8, (8, 1), {"weight_format": "bfloat16"}, "must be bfloat16 in u8, or int8 or int4 in i8"),
        ((8, 64), np.int8, (7, 1), {"weight_format": "int8"}, r"the scales have shape \[7,1\]"),
        ((8, 72), np.int8, (8, 1), {"weight_format": "int8"}, "must be multiples of 16"),
        ((8, 128), np.int8, (8, 8), {"weight_format": "int8"}, "groups of 32"),
        ((8, 128), np.uint8, None, {"weight_format": "bfloat16", "activation_format": "int8"}, "must be empty unless"),
        ((8, 32), np.int8, (8, 1), {"weight_format": "int8"}, "but the weight takes 32 features"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    shape: tuple[int, ...], dtype: Any, scales: tuple[int, ...] | None, attributes: dict[str, str], sentence: str
) -> None:
    features = 64 if (shape[-1] in (32, 64, 128) and dtype is np.uint8) or shape[-1] == 32 else shape[-1]
    given_scales = None if scales is None else np.ones(scales, np.float32)
    with pytest.raises(RuntimeError, match=sentence):
        compiled(np.zeros(shape, dtype), given_scales, features, **attributes)
