# SPDX-License-Identifier: Apache-2.0
"""The OpenVINO operation gives what the Python binding gives, from ONNX and from OpenVINO's own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import openvino as ov
import pytest
from cases import norms, policies, quantised, tokens, weights
from onnx import TensorProto, helper, numpy_helper

from adaptive_k_moe.plugin import moe, openvino_extension_path, route
from adaptive_k_moe.runtime.session.expert_load import ExpertLoad

HIDDEN, EXPERTS, INTERMEDIATE = 40, 8, 24
FEED = ["hidden_states", "router_logits", "policy_index", "policy_kind", "thresholds", "k_values"]


@pytest.fixture(scope="module")
def core() -> ov.Core:
    core = ov.Core()
    core.add_extension(str(openvino_extension_path()))
    return core


def as_bytes(weight: Any) -> Any:
    """bfloat16 as the operator takes it from a file: the last dimension counts bytes."""
    return weight.view(np.uint8) if weight.dtype == ml_dtypes.bfloat16 else weight


def graph(
    path: Path,
    up: Any,
    down: Any,
    bias: Any = None,
    norms: Any = None,
    scales: Any = None,
    shapes: dict[str, list[Any]] | None = None,
    types: dict[str, int] | None = None,
    **attributes: Any,
) -> Path:
    """An ONNX model that is the operator alone."""
    shape = {
        "hidden_states": ["T", HIDDEN],
        "router_logits": ["T", EXPERTS],
        "policy_index": ["T"],
        "policy_kind": ["P"],
        "thresholds": ["P", "C1"],
        "k_values": ["P", "C"],
        **(shapes or {}),
    }
    integers = ("policy_index", "policy_kind", "k_values")
    kind = {name: TensorProto.INT32 if name in integers else TensorProto.FLOAT for name in FEED} | (types or {})
    up_scales, down_scales = scales or (None, None)
    optional = {"correction_bias": bias, "up_scales": up_scales, "down_scales": down_scales, "expert_norms": norms}
    constants = {"gate_up": up, "down": down, **{name: x for name, x in optional.items() if x is not None}}
    if norms is not None:
        attributes["has_expert_norms"] = 1
    node = helper.make_node(
        "AdaptiveKMoe", FEED + list(constants), ["output", "k", "entropy"], domain="adaptive_k", **attributes
    )
    model = helper.make_model(
        helper.make_graph(
            [node],
            "operator",
            [helper.make_tensor_value_info(name, kind[name], shape[name]) for name in FEED],
            [
                helper.make_tensor_value_info(name, t, None)
                for name, t in (("output", TensorProto.FLOAT), ("k", TensorProto.INT32), ("entropy", TensorProto.FLOAT))
            ],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        ir_version=11,
        opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid("adaptive_k", 1)],
    )
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {
            "activation": "relu2",
            "scoring": "sigmoid",
            "norm_topk_prob": 0,
            "routed_scaling_factor": 2.5,
            "n_group": 4,
            "topk_group": 2,
            "max_k": 3,
        },
    ],
    ids=["defaults", "all attributes"],
)
@pytest.mark.parametrize("weight_format", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("normed", [False, True])
def test_onnx_and_ir_give_the_bits_of_the_python_binding(
    core: ov.Core, tmp_path: Path, attributes: dict[str, Any], normed: bool, weight_format: str
) -> None:
    activation, arguments, scales, hidden = attributes.get("activation", "swiglu"), {}, None, HIDDEN
    if weight_format.startswith("int"):
        hidden = 64
        up, down, arguments, _ = quantised(EXPERTS, hidden, 32, activation, int(weight_format[3:]), 32)
        scales = arguments["gate_up_scales"], arguments["down_scales"]
    else:
        up, down = weights(EXPERTS, HIDDEN, INTERMEDIATE, activation, weight_format)
    bias = np.linspace(-0.2, 0.2, EXPERTS, dtype=np.float32) if attributes else None
    expert_norms = norms(EXPERTS) if normed else None
    path = graph(
        tmp_path / "op.onnx",
        as_bytes(up),
        as_bytes(down),
        bias,
        expert_norms,
        scales,
        shapes={"hidden_states": ["T", hidden]},
        weight_format=weight_format,
        **attributes,
    )
    model = core.read_model(path)
    ov.save_model(model, tmp_path / "op.xml", compress_to_fp16=False)
    for source in (model, core.read_model(tmp_path / "op.xml")):
        request = core.compile_model(source, "CPU").create_infer_request()
        for count in (3, 1, 0, 70):
            x, logits = tokens(count, hidden, EXPERTS)
            feed = (x, logits, *policies(count))
            got = request.infer(dict(zip(FEED, feed, strict=True)))
            options = {**attributes, **arguments, "norm_topk_prob": bool(attributes.get("norm_topk_prob", 1))}
            want = moe(*feed, up, down, correction_bias=bias, expert_norms=expert_norms, **options)
            for name, value in zip(("output", "k", "entropy"), want, strict=True):
                assert got[name].shape == value.shape
                np.testing.assert_array_equal(got[name], value)


def test_a_range_of_the_experts_is_the_python_bindings(core: ov.Core, tmp_path: Path) -> None:
    up, down = (weight[2:5].copy() for weight in weights(EXPERTS, HIDDEN, INTERMEDIATE, "swiglu"))
    model = core.read_model(graph(tmp_path / "op.onnx", up, down, first_expert=2))
    ov.save_model(model, tmp_path / "op.xml", compress_to_fp16=False)
    feed = (*tokens(20, HIDDEN, EXPERTS), *policies(20))
    want = moe(*feed, up, down, first_expert=2)
    assert want[0].any() and not np.array_equal(want[0], moe(*feed, up, down, first_expert=3)[0])
    for source in (model, core.read_model(tmp_path / "op.xml")):
        got = core.compile_model(source, "CPU").create_infer_request().infer(dict(zip(FEED, feed, strict=True)))
        for name, value in zip(("output", "k", "entropy"), want, strict=True):
            np.testing.assert_array_equal(got[name], value)


def test_real_bfloat16_weights_are_accepted(core: ov.Core, tmp_path: Path) -> None:
    up, down = weights(EXPERTS, HIDDEN, INTERMEDIATE, "swiglu", "bfloat16")
    assert up.dtype == ml_dtypes.bfloat16
    model = core.read_model(graph(tmp_path / "op.onnx", up, down, weight_format="bfloat16"))
    feed = (*tokens(4, HIDDEN, EXPERTS), *policies(4))
    got = core.compile_model(model, "CPU").create_infer_request().infer(dict(zip(FEED, feed, strict=True)))
    np.testing.assert_array_equal(got["output"], moe(*feed, up, down)[0])
    assert [str(o.element_type) for o in model.outputs] == [
        "<Type: 'float32'>",
        "<Type: 'int32_t'>",
        "<Type: 'float32'>",
    ]


def test_output_shapes_follow_the_inputs(core: ov.Core, tmp_path: Path) -> None:
    up, down = weights(EXPERTS, HIDDEN, INTERMEDIATE, "swiglu")
    dynamic = core.read_model(graph(tmp_path / "op.onnx", up, down))
    assert [str(o.partial_shape) for o in dynamic.outputs] == [f"[?,{HIDDEN}]", "[?]", "[?]"]
    static = core.read_model(graph(tmp_path / "op.onnx", up, down, shapes={"policy_index": [5]}))
    assert [str(o.partial_shape) for o in static.outputs] == [f"[5,{HIDDEN}]", "[5]", "[5]"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"shapes": {"router_logits": ["T", 7]}},
            r"input gate_up has shape \[8, 48, 40\] but must be \[E, 2I, H\], where E = 7 by input router_logits",
        ),
        (
            {"shapes": {"hidden_states": ["T", HIDDEN, 1]}},
            r"AdaptiveKMoe: input hidden_states has shape \[\?, 40, 1\] but must be \[T, H\]",
        ),
        (
            {"types": {"policy_index": TensorProto.INT64}},
            "AdaptiveKMoe: input policy_index has element type i64 but must be i32",
        ),
        (
            {"types": {"hidden_states": TensorProto.FLOAT16}},
            "AdaptiveKMoe: input hidden_states has element type f16 but must be f32",
        ),
        (
            {"weight_format": "bfloat16"},
            r"AdaptiveKMoe: input gate_up has element type f32 but must be u8 \(its bytes\) or bf16, by weight_format",
        ),
        (
            {"weight_format": "int2"},
            "AdaptiveKMoe: attribute weight_format is 'int2' but must be one of float32, float16, bfloat16, int8, int4",
        ),
        (
            {"weight_format": "int8"},
            r"AdaptiveKMoe: has 8 inputs but takes 10, or 11 with correction_bias \(weight_format int8\)",
        ),
        (
            {"weight_format": "int4", "scales": (np.ones((8, 48, 1), np.float32), np.ones((8, 40, 1), np.float32))},
            "AdaptiveKMoe: input gate_up has element type f32 but must be i8, by weight_format int4",
        ),
        (
            {"scales": (np.ones((8, 48, 1), np.float32), np.ones((8, 40, 1), np.float32))},
            "AdaptiveKMoe: has 10 inputs but takes 8, or 9 with correction_bias",
        ),
        ({"activation": "tanh"}, "AdaptiveKMoe: attribute activation is 'tanh' but must be one of swiglu"),
        ({"scoring": "topk"}, "AdaptiveKMoe: attribute scoring is 'topk'"),
        ({"n_group": 3}, "AdaptiveKMoe: attribute n_group must divide the number of experts"),
        (
            {"norms": np.ones(7, np.float32)},
            r"AdaptiveKMoe: input expert_norms has shape \[7\] but must be \[E\], where E = 8",
        ),
        (
            {"norms": np.ones(8, np.int32)},
            "AdaptiveKMoe: input expert_norms has element type i32 but must be f32",
        ),
        (
            {"has_expert_norms": 1},
            r"AdaptiveKMoe: has 8 inputs but takes 9, or 10 with correction_bias \(has_expert_norms\)",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused_by_name(
    core: ov.Core, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    up, down = weights(EXPERTS, HIDDEN, INTERMEDIATE, "swiglu")
    with pytest.raises(RuntimeError, match=sentence):
        core.read_model(graph(tmp_path / "op.onnx", up, down, **changes))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_norms", [False, True])
def test_the_operator_counts_its_experts_tokens_in_place(
    core: ov.Core, tmp_path: Path, with_bias: bool, with_norms: bool
) -> None:
    up, down = weights(EXPERTS, HIDDEN, INTERMEDIATE, "swiglu")
    bias = np.linspace(-0.2, 0.2, EXPERTS, dtype=np.float32) if with_bias else None
    expert_norms = norms(EXPERTS) if with_norms else None
    model = core.read_model(graph(tmp_path / "op.onnx", up, down, bias, expert_norms))
    load = ExpertLoad(model, EXPERTS)
    request = core.compile_model(model, "CPU").create_infer_request()
    for name, tensor in load.tensors.items():
        request.set_tensor(name, tensor)
    expected = np.zeros((1, EXPERTS), np.int64)
    for seed, count in enumerate((3, 1, 0, 70)):
        feed = (*tokens(count, HIDDEN, EXPERTS, seed), *policies(count, seed))
        got = request.infer(dict(zip(FEED, feed, strict=True)))
        want = moe(*feed, up, down, correction_bias=bias, expert_norms=expert_norms)
        for name, value in zip(("output", "k", "entropy"), want, strict=True):
            np.testing.assert_array_equal(got[name], value)
        chosen = route(*feed[1:], correction_bias=bias, expert_norms=expert_norms).experts
        expected += np.bincount(chosen[chosen >= 0], minlength=EXPERTS)
        np.testing.assert_array_equal(load.read(), expected)


def test_expert_load_goes_on_beyond_32_bits(core: ov.Core, tmp_path: Path) -> None:
    up, down = weights(EXPERTS, HIDDEN, INTERMEDIATE, "swiglu")
    model = core.read_model(graph(tmp_path / "op.onnx", up, down))
    load = ExpertLoad(model, EXPERTS)
    request = core.compile_model(model, "CPU").create_infer_request()
    (tensor,) = load.tensors.values()
    request.set_tensor("expert_load.0", tensor)
    tensor.data[:] = -1  # as after 2^32 - 1 tokens of each
    before = load.read()
    feed = (*tokens(70, HIDDEN, EXPERTS), *policies(70))
    got = request.infer(dict(zip(FEED, feed, strict=True)))
    assert (before == 2**32 - 1).all()
    assert (load.read() - before).sum() == got["k"].sum()


def test_an_expert_load_of_another_size_is_refused(core: ov.Core, tmp_path: Path) -> None:
    up, down = weights(EXPERTS, HIDDEN, INTERMEDIATE, "swiglu")
    model = core.read_model(graph(tmp_path / "op.onnx", up, down))
    with pytest.raises(RuntimeError, match=r"AdaptiveKMoe: expert_load has shape \[7\] but must be \[8\]"):
        ExpertLoad(model, EXPERTS - 1)


def test_shapes_that_appear_at_run_time_are_checked(core: ov.Core, tmp_path: Path) -> None:
    up, down = weights(EXPERTS, HIDDEN, INTERMEDIATE, "swiglu")
    request = core.compile_model(core.read_model(graph(tmp_path / "op.onnx", up, down)), "CPU").create_infer_request()
    x, logits = tokens(3, HIDDEN, EXPERTS)
    index, *rows = policies(2)
    with pytest.raises(
        RuntimeError, match=r"AdaptiveKMoe: input policy_index has shape \[2\] but must be \[T\], where T = 3"
    ):
        request.infer(dict(zip(FEED, (x, logits, index, *rows), strict=True)))
