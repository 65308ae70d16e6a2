# SPDX-License-Identifier: Apache-2.0
"""Mamba2's other bindings: its specification as an ONNX function in a plain ONNX Runtime, and OpenVINO's operation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
import pytest
from onnx import TensorProto, helper

from adaptive_k_moe import plugin
from adaptive_k_moe.engine_builder.graph import keep_states_in_place, make_mamba_function
from adaptive_k_moe.engine_builder.graph.mamba_function import DOMAIN, OP_TYPE, mamba_attributes
from adaptive_k_moe.model_config import MambaConfig
from adaptive_k_moe.plugin.description import MAMBA

from mamba_oracle import CASES, Array, Case, assert_close, copied, make_inputs, oracle

MODELS = [case for case in CASES if case.dt_max == float("inf")]  # models limit the steps from below alone


def model_of(case: Case, *, function: bool) -> onnx.ModelProto:
    """A model of one node, with the function body or without."""
    mamba = MambaConfig(
        num_heads=case.heads,
        head_dim=case.head_dim,
        state_size=case.state_size,
        n_groups=case.n_groups,
        conv_kernel=case.taps,
        dt_min=case.dt_min,
        layers=[0],
    )
    inputs = make_inputs(case)

    def value(name: str, rank: int, dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, dtype, [None] * rank)

    integer = {"subsequence_begins", "past_lens", "state_slots"}
    ports = [
        value(name, array.ndim, TensorProto.INT32 if name in integer else TensorProto.FLOAT)
        for name, array in zip(MAMBA.input_names(), inputs.values(), strict=True)
    ]
    results = [value(name, rank) for name, rank in zip(MAMBA.output_names(), (2, 3, 4), strict=True)]
    node = helper.make_node(
        OP_TYPE, MAMBA.input_names(), MAMBA.output_names(), domain=DOMAIN, **mamba_attributes(mamba)
    )
    return helper.make_model(
        helper.make_graph([node], "operator", ports, results),
        ir_version=11,
        opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, 1)],
        functions=[make_mamba_function(mamba)] if function else [],
    )


def feed_of(inputs: dict[str, Array]) -> dict[str, Array]:
    """The inputs by the names of the ONNX node."""
    return dict(zip(MAMBA.input_names(), inputs.values(), strict=True))


@pytest.mark.parametrize("case", [*MODELS, Case((13, 2), (1, 0), dt_min=0.8)], ids=str)
def test_the_function_is_the_operator(case: Case) -> None:
    model = model_of(case, function=True)
    onnx.checker.check_model(model)
    inputs = make_inputs(case)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y, conv_state, ssm_state = session.run(MAMBA.output_names(), feed_of(inputs))
    for found, expected in zip((y, conv_state, ssm_state), oracle(case, inputs), strict=True):
        assert_close(found, expected, 1e-5)
    by_operator = plugin.mamba2(**inputs, n_groups=case.n_groups, dt_min=case.dt_min)
    assert_close(by_operator, y, 1e-5)
    assert_close(inputs["conv_state"], conv_state, 1e-5)
    assert_close(inputs["ssm_state"], ssm_state, 1e-5)


def test_the_function_leaves_the_states_of_a_sequence_without_a_slot() -> None:
    case = Case((3, 1, 5), (0, 6, 3))
    inputs = make_inputs(case)
    inputs["state_slots"][[0, 2]] = -1
    session = ort.InferenceSession(
        model_of(case, function=True).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = session.run(MAMBA.output_names(), feed_of(inputs))
    y = plugin.mamba2(**inputs, n_groups=case.n_groups)
    for value, expected in zip(found, (y, inputs["conv_state"], inputs["ssm_state"]), strict=True):
        assert_close(value, expected, 1e-5)


def request_of(path: Path) -> Any:
    core = ov.Core()
    core.add_extension(str(plugin.openvino_extension_path()))
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    return core.compile_model(core.read_model(path), "CPU", options).create_infer_request()


def openvino_files(case: Case, directory: Path) -> list[Path]:
    """The operator's model in ONNX, and saved by OpenVINO in its own format."""
    model = model_of(case, function=False)
    keep_states_in_place(model)
    onnx.save(model, directory / "operator.onnx")
    core = ov.Core()
    core.add_extension(str(plugin.openvino_extension_path()))
    ov.save_model(core.read_model(directory / "operator.onnx"), directory / "operator.xml", compress_to_fp16=False)
    return [directory / "operator.onnx", directory / "operator.xml"]


@pytest.mark.parametrize("case", [CASES[5], CASES[6], Case((1, 1), (4, 0)), Case((13, 2), (1, 0), dt_min=0.8)], ids=str)
def test_openvino_updates_the_states_where_the_application_keeps_them(case: Case, tmp_path: Path) -> None:
    for path in openvino_files(case, tmp_path):
        request = request_of(path)
        expected = make_inputs(case)
        y = plugin.mamba2(**expected, n_groups=case.n_groups, dt_min=case.dt_min)
        inputs = make_inputs(case)
        for name, array in feed_of(inputs).items():
            request.set_tensor(name, ov.Tensor(array, shared_memory=True))
        request.infer()
        np.testing.assert_array_equal(request.get_tensor("y").data, y)
        # The arrays themselves: nothing was read back.
        np.testing.assert_array_equal(inputs["conv_state"], expected["conv_state"])
        np.testing.assert_array_equal(inputs["ssm_state"], expected["ssm_state"])


def test_openvino_goes_on_from_the_states_that_a_step_left(tmp_path: Path) -> None:
    case = Case((9, 4), (0, 0))
    whole = make_inputs(case)
    expected = plugin.mamba2(**whole, n_groups=case.n_groups)
    request = request_of(openvino_files(case, tmp_path)[1])
    inputs = copied(make_inputs(case))
    for name, array in feed_of(inputs).items():
        request.set_tensor(name, ov.Tensor(array, shared_memory=True))
    for begin, end in ((0, 1), (1, 2), (2, 4)):  # both sequences advance at their own pace
        lengths = (end - begin, 2 * (end - begin) if end < 4 else 0)
        pasts = (begin, min(2 * begin, 4))
        own = [np.arange(begin, end), np.arange(9 + pasts[1], 9 + pasts[1] + lengths[1])]
        step = {
            "conv_input": inputs["conv_input"][np.concatenate(own)],
            "dt": inputs["dt"][np.concatenate(own)],
            "subsequence_begins": np.cumsum((0, *lengths)).astype(np.int32),
            "past_lens": np.array(pasts, np.int32),
        }
        for name, array in step.items():
            request.set_tensor(name, ov.Tensor(array, shared_memory=True))
        request.infer()
        found = request.get_tensor("y").data
        np.testing.assert_array_equal(found, expected[np.concatenate(own)])
    slot = inputs["state_slots"][1]
    np.testing.assert_array_equal(inputs["ssm_state"][slot], whole["ssm_state"][slot])


def test_openvino_refuses_inputs_that_do_not_fit(tmp_path: Path) -> None:
    case = Case((3, 2), (1, 0))
    request = request_of(openvino_files(case, tmp_path)[0])
    inputs = make_inputs(case)
    inputs["state_slots"] = np.array([2, 2], np.int32)
    for name, array in feed_of(inputs).items():
        request.set_tensor(name, ov.Tensor(array))
    with pytest.raises(RuntimeError, match="Mamba2: input state_slots has 2 twice"):
        request.infer()
