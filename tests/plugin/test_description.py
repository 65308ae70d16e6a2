# SPDX-License-Identifier: Apache-2.0
"""The operators' table holds what is written elsewhere by hand: function bodies, attributes, signatures."""

from __future__ import annotations

import inspect
import itertools

import pytest

from adaptive_k_moe import plugin, policy
from adaptive_k_moe.engine_builder.graph import make_mamba_function, make_moe_function
from adaptive_k_moe.engine_builder.graph.mamba_function import mamba_attributes
from adaptive_k_moe.engine_builder.graph.moe_function import moe_attributes
from adaptive_k_moe.model_config import MambaConfig, MoeConfig, QuantizationConfig
from adaptive_k_moe.plugin.description import GATED_ACTIVATIONS, MAMBA, MOE, POLICY_KINDS, WEIGHT_FORMATS
from adaptive_k_moe.policy_kinds import KINDS

MOE_CONFIG = MoeConfig(num_experts=4, num_experts_per_tok=2, intermediate_size=8, activation="swiglu", layers=[0])
MAMBA_CONFIG = MambaConfig(num_heads=2, head_dim=4, state_size=4, n_groups=1, conv_kernel=4, layers=[0])


def read_names(function: object) -> set[str]:
    """What the nodes of a function body read and no node of it makes."""
    made = {name for node in function.node for name in node.output}  # type: ignore[attr-defined]
    return {name for node in function.node for name in node.input if name and name not in made}  # type: ignore[attr-defined]


@pytest.mark.parametrize(("bias", "norms", "quantised"), itertools.product((False, True), repeat=3))
def test_the_function_body_reads_every_input_of_the_table(bias: bool, norms: bool, quantised: bool) -> None:
    quantization = QuantizationConfig(quant_algo="W8A16") if quantised else None
    function = make_moe_function(
        MOE_CONFIG, max_k=2, correction_bias=bias, expert_norms=norms, quantization=quantization
    )
    present = ["correction_bias"] * bias + ["quantised"] * quantised + ["expert_norms"] * norms
    assert list(function.input) == MOE.input_names(*present)
    assert read_names(function) == set(function.input)
    assert [*function.output, "expert_load"] == MOE.output_names()
    assert {name for node in function.node for name in node.output} >= set(MOE.output_names())


def test_so_does_that_of_the_mamba_layers() -> None:
    function = make_mamba_function(MAMBA_CONFIG)
    assert list(function.input) == MAMBA.input_names()
    scans = [node for node in function.node if node.op_type == "Scan"]
    captured = {name for attribute in scans[0].attribute for node in attribute.g.node for name in node.input}
    assert set(function.input) <= read_names(function) | captured
    assert list(function.output) == MAMBA.output_names()


def test_a_graphs_attributes_are_the_tables() -> None:
    attributes = moe_attributes(MOE_CONFIG, max_k=2, weight_format="float32")
    assert list(attributes) == list(MOE.defaults())
    function = make_moe_function(MOE_CONFIG, max_k=2, correction_bias=False)
    assert list(function.attribute) == list(MOE.defaults())
    assert set(mamba_attributes(MAMBA_CONFIG)) <= set(MAMBA.defaults())
    for attribute in MOE.attributes:
        if attribute.words:
            assert attributes[attribute.name] in attribute.words
            assert attribute.default in attribute.words


@pytest.mark.parametrize(("call", "operator"), [(plugin.moe, MOE), (plugin.route, MOE), (plugin.mamba2, MAMBA)])
def test_the_python_functions_have_the_tables_defaults(call: object, operator: object) -> None:
    parameters = inspect.signature(call).parameters  # type: ignore[arg-type]
    shared = {name: default for name, default in operator.defaults().items() if name in parameters}  # type: ignore[attr-defined]
    assert len(shared) >= 3
    assert {name: parameters[name].default for name in shared} == shared


def test_names_are_those_of_the_weights_and_kinds_are_the_policies() -> None:
    gated = {tensor.name: tensor.gated_name for tensor in MOE.inputs if tensor.gated_name != tensor.name}
    assert gated == {"up": "gate_up", "up_scales": "gate_up_scales"}
    assert GATED_ACTIVATIONS == ("swiglu", "geglu")
    assert [(form.name, form.bits) for form in WEIGHT_FORMATS.values() if form.quantised] == [("int8", 8), ("int4", 4)]
    named = {name: kind.number for name, kind in KINDS.items() if name not in ("fixed", "shared")}
    named |= {"shared_price": policy.KIND_SHARED_PRICE, "shared_experts": policy.KIND_SHARED_EXPERTS}
    numbers = {"entropy": 0, "top_p": 1, "ratio": 2, "contribution": 3, "shared_price": 4, "shared_experts": 5}
    assert named == POLICY_KINDS == numbers


def test_an_index_counts_the_inputs_that_are_there() -> None:
    assert MOE.input_index("down") == 7
    assert MOE.input_index("up_scales", "quantised") == 8
    assert MOE.input_index("up_scales", "quantised", "correction_bias") == 9
    with pytest.raises(ValueError, match="AdaptiveKMoe: has no input that bias names"):
        MOE.input_names("bias")
