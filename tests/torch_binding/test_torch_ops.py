# SPDX-License-Identifier: Apache-2.0
"""`torch.ops.adaptive_k` against the oracles, and as torch's compiler sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cuda_cases import make_inputs, make_unread
from cuda_launcher import Layer
from cuda_mamba import CASES
from torch_cases import (
    FORMATS,
    ROUTERS,
    attributes_of,
    check_mamba,
    check_moe,
    check_ranges,
    make,
    routing_of,
    tensors_of,
)

from adaptive_k_moe.errors import DependencyError
from adaptive_k_moe.plugin.description import MAMBA, MOE
from adaptive_k_moe.torch import cuda_library, ops

from mamba_oracle import make_inputs as make_scan  # isort: skip

OPS = torch.ops.adaptive_k


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_moe_and_route_are_the_oracles(kernels: str, tokens: int, form: str, router: str) -> None:
    if kernels == "cpu" and form == "float16":
        with pytest.raises(ValueError, match="float16', which CPUs do not compute"):
            check_moe(*make(router, form, tokens), "cpu")
        return
    if kernels == "interpreter" and form == "float32" and tokens > 8:
        tokens = 9  # float32 decodes, which the interpreter takes a minute for
    check_moe(*make(router, form, tokens), "cpu")


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4 rows"])
def test_ranges_of_the_experts_are_the_oracles_parts(kernels: str, form: str) -> None:
    check_ranges(*make("sigmoid", form, 7), "cpu")


@pytest.mark.parametrize("case", CASES[:8:2], ids=str)
def test_mamba2_is_the_oracles(kernels: str, case: Any) -> None:
    for element in ("float32",) if kernels == "cpu" else ("float32", "bfloat16"):
        check_mamba(case, element, "cpu")


def test_nothing_in_is_nothing_out(kernels: str) -> None:
    layer, inputs, _ = make("softmax", "bfloat16", 0)
    output, k, entropy, load = OPS.moe(**tensors_of(inputs, "cpu"), **attributes_of(layer))
    assert output.shape == (0, 64) and k.shape == entropy.shape == (0,)
    assert load.tolist() == [0] * 8


def test_a_step_that_reads_nothing_has_no_load(kernels: str) -> None:
    layer = Layer(5, 64, 64, 8, element="bfloat16", max_k=4)
    output, k, _, load = OPS.moe(**tensors_of(make_unread(layer), "cpu"), **attributes_of(layer))
    assert not k.any() and not load.any() and not output.any()


@pytest.mark.parametrize("form", ["bfloat16", "int4"])
def test_moe_passes_torchs_checks(kernels: str, form: str) -> None:
    layer, inputs, _ = make("sigmoid", form, 5)
    tensors, attributes = tensors_of(inputs, "cpu"), attributes_of(layer)
    torch.library.opcheck(OPS.moe.default, (), {**tensors, **attributes})


def test_route_passes_torchs_checks(kernels: str) -> None:
    layer, inputs, _ = make("groups", "float32", 5)
    tensors = tensors_of(inputs, "cpu")
    arguments = {argument.name for argument in OPS.route.default._schema.arguments}
    given = {name: value for name, value in {**tensors, **attributes_of(layer)}.items() if name in arguments}
    torch.library.opcheck(OPS.route.default, (), given)


def test_mamba2_passes_torchs_checks(kernels: str) -> None:
    case = CASES[7]
    inputs = {name: np.nan_to_num(array) for name, array in make_scan(case).items()}  # opcheck compares; NaN differ
    torch.library.opcheck(OPS.mamba2.default, (), {**tensors_of(inputs, "cpu"), "n_groups": case.n_groups})


class Block(torch.nn.Module):
    """An operator between others, as in a model."""

    def __init__(self, layer: Layer, tensors: dict[str, Any]) -> None:
        super().__init__()
        self.attributes = attributes_of(layer)
        self.given = {name: value for name, value in tensors.items() if name not in self.step}

    step = ("hidden_states", "router_logits", "policy_index")

    def forward(self, hidden_states: Any, router_logits: Any, policy_index: Any) -> tuple[Any, ...]:
        output, k, entropy, load = OPS.moe(
            hidden_states * 2, router_logits, policy_index, **self.given, **self.attributes
        )
        return output + hidden_states, k, entropy, (load > 0).sum()


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_compiled_and_exported_it_is_the_same(kernels: str, form: str) -> None:
    """One graph for every number of tokens."""
    layer, inputs, _ = make("softmax", form, 6)
    tensors = tensors_of(inputs, "cpu")
    block = Block(layer, tensors)
    step = tuple(tensors[name] for name in Block.step)
    sizes = {name: {0: torch.export.Dim("tokens", min=2, max=64)} for name in Block.step}
    exported = torch.export.export(block, step, dynamic_shapes=sizes).module()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (6, 3):
        some = tuple(tensor[:rows] for tensor in step)
        expected = block(*some)
        for other in (exported, compiled):
            for left, right in zip(expected, other(*some), strict=True):
                torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_route_compiles(kernels: str) -> None:
    layer, inputs, _ = make("groups", "float32", 5)
    tensors = tensors_of(inputs, "cpu")
    compiled = torch.compile(lambda given: routing_of(given, layer), fullgraph=True, backend="aot_eager")
    for left, right in zip(routing_of(tensors, layer), compiled(tensors), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize(("op", "operator"), [(ops.MOE_OP, MOE), (ops.MAMBA_OP, MAMBA)], ids=["moe", "mamba2"])
def test_the_schema_is_the_table(op: ops.Op, operator: Any) -> None:
    schema = getattr(OPS, op.name).default._schema
    given = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    assert given == [tensor.name.lower() for tensor in operator.inputs]
    attributes = {argument.name: argument.default_value for argument in schema.arguments if argument.kwarg_only}
    expected = {name: value for name, value in operator.defaults().items() if name != "has_expert_norms"}
    assert attributes == {name: None if value == float("inf") else value for name, value in expected.items()}
    changed = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    assert changed == list(op.states)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a type": ({"policy_index": lambda t: t.long()}, "policy_index is torch.int64 but must be torch.int32"),
    "a shape": ({"down": lambda t: t[:, :32].contiguous()}, r"input down has shape \[8, 32, 128\]"),
    "fewer tokens": ({"router_logits": lambda t: t[:2]}, "router_logits"),
    "weights of two types": ({"down": lambda t: t.float()}, "down is torch.float32 but must be torch.bfloat16"),
    "weights out of order": ({"up": lambda t: t.mT.contiguous().mT}, "up must be contiguous; it is never copied"),
    "bytes of no format": (
        {"up": lambda t: t.char()[..., :16].contiguous(), "down": torch.Tensor.char},
        "up is torch.int8",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_a_sentence(kernels: str, name: str) -> None:
    tensors = tensors_of(make("softmax", "bfloat16", 5)[1], "cpu")
    changes, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        OPS.moe(**{**tensors, **{key: change(tensors[key]) for key, change in changes.items()}})


def test_integers_without_scales_are_refused(kernels: str) -> None:
    tensors = tensors_of(make("softmax", "int8", 5)[1], "cpu")
    del tensors["up_scales"]
    with pytest.raises(ValueError, match="up_scales"):
        OPS.moe(**tensors)


def test_a_gradient_is_refused() -> None:
    layer, inputs, _ = make("softmax", "float32", 3)
    tensors = tensors_of(inputs, "cpu")
    tensors["hidden_states"].requires_grad_()
    output, *_ = OPS.moe(**tensors, **attributes_of(layer))
    with pytest.raises(RuntimeError, match="has no gradient"):
        output.sum().backward()


def test_a_library_that_is_not_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv(cuda_library.VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(DependencyError, match=r"none\.so is not there: build it with `make cuda`"):
        cuda_library.cuda_library.__wrapped__()
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF")
    with pytest.raises(DependencyError, match="does not load"):
        cuda_library.CudaLibrary(broken)


def test_weights_that_vector_loads_cannot_read_are_refused(interpreter_library: str) -> None:
    layer = Layer(3, 64, 64, 8, element="bfloat16", max_k=2)
    tensors = tensors_of(make_inputs(layer, 0)[0], "cpu")
    shifted = torch.empty(tensors["up"].numel() + 1, dtype=torch.bfloat16)[1:].view(tensors["up"].shape)
    call = ops.MOE_OP.read((), {**tensors, "up": shifted, **attributes_of(layer)})
    with pytest.raises(ValueError, match="up must begin at a multiple of 16 bytes"):
        cuda_library.CudaLibrary(interpreter_library).moe(*call, None)
