# SPDX-License-Identifier: Apache-2.0
"""The launcher's whole sequence (route, plan, products, combine) in the interpreter, against the NumPy oracle
and the CPU kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cuda_cases import check_all, check_plan, check_routing, expected, make_decided, make_inputs
from cuda_launcher import Interpreter, Layer

from adaptive_k_moe.plugin.description import MOE


def run_and_check(interpreter: Interpreter, layer: Layer, seed: int, logits: str = "plain", **options: Any) -> None:
    inputs, exact = make_inputs(layer, seed, logits=logits, **options)
    assert interpreter.check(layer) is None
    for schedule in (seed, seed + 1000):
        check_all(layer, exact, interpreter.run(layer, inputs, seed=schedule))


@pytest.mark.parametrize("logits", ["plain", "ties", "special"])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("experts", [1, 2, 3, 8, 31, 64, 128, 129, 200, 512])
def test_routing_follows_the_oracle(interpreter: Interpreter, experts: int, scoring: str, logits: str) -> None:
    """To 128 experts in one launch with the plan, above a block a token; every kind of policy row in each case."""
    layer = Layer(tokens=14, hidden=8, intermediate=8, experts=experts, element="float32", scoring=scoring)
    run_and_check(interpreter, layer, experts, logits, most=8, bias=scoring == "sigmoid")


@pytest.mark.parametrize("logits", ["plain", "ties", "special"])
@pytest.mark.parametrize(("experts", "scoring", "n_group"), [(8, "softmax", 1), (128, "sigmoid", 8), (1, "softmax", 1)])
def test_routing_of_more_tokens(
    interpreter: Interpreter, experts: int, scoring: str, n_group: int, logits: str
) -> None:
    """More than are planned in the same launch: a warp a token, in a kernel of its own."""
    layer = Layer(42, 8, 8, experts, element="float32", scoring=scoring, n_group=n_group, topk_group=(n_group + 1) // 2)
    run_and_check(interpreter, layer, experts, logits, bias=scoring == "sigmoid")


@pytest.mark.parametrize(
    ("experts", "n_group", "topk_group"),
    [(8, 2, 1), (64, 8, 4), (60, 4, 2), (128, 128, 9), (256, 8, 4), (512, 512, 40), (6, 2, 2)],
)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_routing_within_groups(
    interpreter: Interpreter, experts: int, n_group: int, topk_group: int, scoring: str
) -> None:
    layer = Layer(9, 8, 8, experts, element="float32", scoring=scoring, n_group=n_group, topk_group=topk_group)
    for logits in ("plain", "ties", "special"):
        run_and_check(interpreter, layer, experts, logits, bias=True)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_weights_follow_the_attributes(interpreter: Interpreter, scoring: str, bias: bool, norm: bool) -> None:
    layer = Layer(
        7, 8, 8, 16, element="float32", scoring=scoring, norm_topk_prob=norm, routed_scaling_factor=2.5, max_k=6
    )
    run_and_check(interpreter, layer, 3, "ties", bias=bias, most=16)


def test_up_to_32_experts_a_token(interpreter: Interpreter) -> None:
    for experts in (32, 96, 300):
        run_and_check(interpreter, Layer(6, 8, 8, experts, element="float32"), 5, most=32)


@pytest.mark.parametrize("tokens", [1, 2, 7, 127, 128, 129, 300])
@pytest.mark.parametrize("experts", [1, 5, 130])
def test_plan_is_the_stable_sort_by_expert(interpreter: Interpreter, tokens: int, experts: int) -> None:
    """Within one chunk of tokens, at its edge, and over several."""
    run_and_check(interpreter, Layer(tokens, 8, 8, experts, element="float32", path="prefill", max_k=4), tokens)


@pytest.mark.parametrize("tokens", [4096, 4097, 8200])
def test_plan_of_more_chunks_than_a_warp_scans_at_once(interpreter: Interpreter, tokens: int) -> None:
    """32 chunks of 128 tokens, one more, and three turns."""
    layer = Layer(tokens, 8, 8, 5, element="float32", path="route", max_k=1)
    inputs, exact = make_inputs(layer, tokens)
    check_plan(layer, exact, interpreter.run(layer, inputs))


@pytest.mark.parametrize("path", ["decode", "prefill"])
@pytest.mark.parametrize("element", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("activation", MOE.attributes[0].words)
def test_every_activation(interpreter: Interpreter, activation: str, element: str, path: str) -> None:
    run_and_check(interpreter, Layer(3, 40, 24, 4, element=element, activation=activation, path=path), 11)


@pytest.mark.parametrize("tokens", [1, 2, 3, 17])
@pytest.mark.parametrize(("hidden", "intermediate"), [(8, 8), (264, 40), (24, 1032)])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_decode_shapes(interpreter: Interpreter, tokens: int, hidden: int, intermediate: int, activation: str) -> None:
    """Rows shorter and longer than a warp's step, ragged ends, one to many tokens for an expert."""
    layer = Layer(tokens, hidden, intermediate, 3, element="float32", path="decode", activation=activation, max_k=2)
    run_and_check(interpreter, layer, tokens)


@pytest.mark.parametrize(("element", "path"), [("float32", "decode"), ("float16", "prefill")])
def test_hidden_sizes_wider_than_a_block(interpreter: Interpreter, element: str, path: str) -> None:
    """A token's output takes several blocks, the last one in part."""
    run_and_check(interpreter, Layer(3, 1112, 8, 3, element=element, path=path, max_k=2), 8)


@pytest.mark.parametrize("multiprocessors", [1, 8, 200])
def test_decode_split_over_warps(interpreter: Interpreter, multiprocessors: int) -> None:
    """More multiprocessors make more warps share a weight row; the result is the same to rounding."""
    layer = Layer(5, 520, 1544, 2, element="float32", path="decode", max_k=2)
    inputs, exact = make_inputs(layer, 1)
    check_all(layer, exact, interpreter.run(layer, inputs, multiprocessors=multiprocessors))


QUANTISED = [("int8", 32), ("int8", 64), ("int8", 0), ("int4", 32), ("int4", 64), ("int4", 0)]


@pytest.mark.parametrize("element", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("weights", "group_size"), QUANTISED)
@pytest.mark.parametrize("tokens", [1, 9])
def test_quantised_weights_decode(
    interpreter: Interpreter, tokens: int, weights: str, group_size: int, element: str
) -> None:
    layer = Layer(
        tokens, 64, 64, 4, element=element, weights=weights, group_size=group_size, path="decode", max_k=3,
        activation="relu2" if tokens == 1 else "swiglu",
    )  # fmt: skip
    run_and_check(interpreter, layer, tokens)


@pytest.mark.parametrize("element", ["float16", "bfloat16"])
@pytest.mark.parametrize(("weights", "group_size"), QUANTISED)
@pytest.mark.parametrize(
    ("tokens", "hidden", "intermediate", "activation"), [(3, 64, 128, "swiglu"), (150, 128, 64, "relu2")]
)
def test_quantised_weights_prefill(
    interpreter: Interpreter,
    tokens: int,
    hidden: int,
    intermediate: int,
    activation: str,
    weights: str,
    group_size: int,
    element: str,
) -> None:
    """One ragged tile, and experts with several; one and two steps along K."""
    layer = Layer(
        tokens, hidden, intermediate, 2, element=element, weights=weights, group_size=group_size, path="prefill",
        activation=activation, max_k=2,
    )  # fmt: skip
    run_and_check(interpreter, layer, tokens)


@pytest.mark.parametrize(
    ("weights", "hidden", "intermediate"), [("int8", 48, 208), ("int4", 32, 416), ("int8", 400, 16)]
)
@pytest.mark.parametrize("activation", ["geglu", "gelu"])
def test_quantised_prefill_with_ragged_ends(
    interpreter: Interpreter, weights: str, hidden: int, intermediate: int, activation: str
) -> None:
    """Sizes that fill neither a step along K nor a tile of weight rows."""
    layer = Layer(9, hidden, intermediate, 3, weights=weights, path="prefill", activation=activation)
    run_and_check(interpreter, layer, 6)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("multiprocessors", [1, 200])
def test_quantised_decode_split_over_warps(interpreter: Interpreter, weights: str, multiprocessors: int) -> None:
    """One, two and more turns of a warp, the last in part, with several passes over an expert's tokens."""
    layer = Layer(21, 1184, 544, 2, weights=weights, group_size=32, path="decode", max_k=2)
    inputs, exact = make_inputs(layer, 1)
    check_all(layer, exact, interpreter.run(layer, inputs, multiprocessors=multiprocessors))


@pytest.mark.parametrize("element", ["float16", "bfloat16"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_every_integer_is_unpacked_exactly(interpreter: Interpreter, weights: str, element: str) -> None:
    """One number of each row of x is 1 and the others are 0: the products are the weights themselves."""
    layer = Layer(8, 64, 64, 1, element=element, weights=weights, activation="relu", path="decode", max_k=1)
    inputs, _ = make_inputs(layer, 0)
    bits = 8 if weights == "int8" else 4
    values = np.resize(np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)), (1, 64, 64)).astype(np.int8)
    for row in range(64):
        values[0, row] = np.roll(values[0, row], row)
    packed = values if bits == 8 else (values[..., 0::2] & 0xF | values[..., 1::2] << 4).astype(np.uint8)
    dtype = inputs["hidden_states"].dtype
    identity = np.zeros((1, 64, 64), np.int8)
    identity[0, np.arange(64), np.arange(64)] = 1
    down = identity if bits == 8 else (identity[..., 0::2] & 0xF | identity[..., 1::2] << 4).astype(np.uint8)
    inputs["up"], inputs["down"] = packed, down
    inputs["up_scales"] = inputs["down_scales"] = np.ones((1, 64, 1), dtype)
    for path in ("decode", "prefill"):
        for first in range(0, 64, 8):
            hidden = np.zeros((8, 64), np.float32)
            hidden[np.arange(8), first + np.arange(8)] = 1
            inputs["hidden_states"] = hidden.astype(dtype)
            result = interpreter.run(replace(layer, path=path), inputs)
            weight = result.weights[:, :1].astype(np.float32)
            expected_rows = np.maximum(values[0, :, first : first + 8].T.astype(np.float32), 0) * weight
            np.testing.assert_array_equal(result.output, expected_rows.astype(dtype))


def test_quantised_paths_agree(interpreter: Interpreter) -> None:
    """Decode and prefill see the same weights: they differ by rounding alone."""
    layer = Layer(20, 128, 96, 4, weights="int4", group_size=32, path="decode", max_k=2)
    inputs, _ = make_inputs(layer, 1)
    decode, prefill = (interpreter.run(replace(layer, path=path), inputs) for path in ("decode", "prefill"))
    np.testing.assert_array_equal(decode.token_rows, prefill.token_rows)
    largest = np.abs(decode.output.astype(np.float32)).max()
    np.testing.assert_allclose(decode.output.astype(np.float32), prefill.output.astype(np.float32), atol=2e-3 * largest)


RANGES = [(0, 3), (3, 4), (7, 1), (0, 8)]


@pytest.mark.parametrize(("first", "count"), RANGES)
@pytest.mark.parametrize("tokens", [1, 20, 150])
@pytest.mark.parametrize(
    ("element", "weights", "path"),
    [("float32", "element", "decode"), ("float16", "element", "prefill"), ("bfloat16", "int4", "decode"),
     ("bfloat16", "int8", "prefill")],
)  # fmt: skip
def test_a_range_of_the_experts_gives_its_part_of_the_sum(
    interpreter: Interpreter, element: str, weights: str, path: str, tokens: int, first: int, count: int
) -> None:
    """Routing, sharing and k are over all experts. The plan and the launch's checks are all that knows of the range."""
    if path == "decode" and tokens > 20:
        tokens = 33
    layer = Layer(
        tokens, 64, 64, 8, element=element, weights=weights, path=path, max_k=4, first_expert=first, local_experts=count
    )  # fmt: skip
    for logits in ("plain", "special"):
        run_and_check(interpreter, layer, tokens + first, logits)
    inputs, exact = make_decided(layer, tokens)
    check_all(layer, exact, interpreter.run(layer, inputs))


def test_nobody_runs_the_experts_of_a_range(interpreter: Interpreter) -> None:
    """Every token runs the first expert; the others' part of the sum is 0."""
    for path in ("decode", "prefill"):
        for weights in ("element", "int8"):
            layer = Layer(9, 64, 64, 4, weights=weights, path=path, max_k=1, first_expert=1, local_experts=3)
            inputs, _ = make_inputs(layer, 0)
            logits = inputs["router_logits"]
            assert logits is not None
            logits[:, 0] = 50
            result = interpreter.run(layer, inputs)
            assert (result.k == 1).all() and not result.output.any() and len(result.active) == 0
            assert result.offsets.tolist() == [0, 9, 9, 9, 9]


def test_tokens_beyond_decode_take_the_prefill_path(interpreter: Interpreter) -> None:
    layer = Layer(1, 16, 16, 8, max_k=2)
    paths = [interpreter.path(replace(layer, tokens=tokens)) for tokens in (1, 8, 16, 17, 200)]
    assert paths == ["decode", "decode", "decode", "prefill", "prefill"]
    assert interpreter.path(replace(layer, experts=128, max_k=6, tokens=80)) == "decode"


def test_results_do_not_depend_on_the_schedule(interpreter: Interpreter) -> None:
    """Bit for bit, whatever order blocks and threads run in."""
    for path in ("decode", "prefill"):
        layer = Layer(140, 16, 16, 6, path=path, max_k=3)
        inputs, _ = make_inputs(layer, 2, logits="ties")
        first = interpreter.run(layer, inputs, seed=1)
        for seed in (2, 3):
            again = interpreter.run(layer, inputs, seed=seed)
            for name in ("output", "k", "entropy", "weights", "row_token"):
                assert getattr(first, name).tobytes() == getattr(again, name).tobytes(), name


@pytest.mark.parametrize("weights", ["element", "int8", "int4"])
def test_a_token_does_not_depend_on_the_others(interpreter: Interpreter, weights: str) -> None:
    """To the bit, on one path: alone, and among tokens that share its experts."""
    layer = Layer(11, 64, 64, 3, path="decode", max_k=2, weights=weights)
    inputs, _ = make_inputs(layer, 4)
    together = interpreter.run(layer, inputs)
    for t in (0, 4, 10):
        alone = {
            **inputs,
            **{name: inputs[name][t : t + 1] for name in ("hidden_states", "router_logits", "policy_index")},
        }
        result = interpreter.run(replace(layer, tokens=1), alone)
        assert result.output.tobytes() == together.output[t : t + 1].tobytes()
        assert result.entropy.tobytes() == together.entropy[t : t + 1].tobytes()


@pytest.mark.parametrize("path", ["decode", "prefill"])
def test_equals_the_cpu_kernels(interpreter: Interpreter, path: str) -> None:
    """The same float32 layer through the CPU operator: routing to the bit, outputs to rounding."""
    cpu = pytest.importorskip("adaptive_k_moe.plugin")
    for seed, (experts, scoring, groups) in enumerate(
        [(8, "softmax", (1, 1)), (128, "sigmoid", (8, 4)), (512, "softmax", (1, 1))]
    ):
        layer = Layer(
            20, 32, 24, experts, element="float32", path=path, scoring=scoring, max_k=6,
            n_group=groups[0], topk_group=groups[1], activation="relu2" if scoring == "sigmoid" else "swiglu",
        )  # fmt: skip
        inputs, _ = make_inputs(layer, seed, logits=("plain", "ties", "special")[seed], bias=scoring == "sigmoid")
        result = interpreter.run(layer, inputs, seed=seed)
        common = [inputs[name] for name in ("router_logits", "policy_index", "policy_kind", "thresholds", "k_values")]
        routing = {
            "correction_bias": inputs["correction_bias"],
            "expert_norms": inputs["expert_norms"],
            "scoring": scoring,
            "n_group": groups[0],
            "topk_group": groups[1],
            "max_k": 6,
        }
        route = cpu.route(*common, **routing)
        np.testing.assert_array_equal(result.k, route.k)
        np.testing.assert_allclose(result.entropy, route.entropy, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(result.experts, route.experts)
        np.testing.assert_allclose(result.weights, route.weights, rtol=1e-6)
        output, k, _ = cpu.moe(
            inputs["hidden_states"], *common, inputs["up"], inputs["down"], activation=layer.activation, **routing
        )
        np.testing.assert_array_equal(result.k, k)
        largest = np.nanmax(np.abs(output))
        np.testing.assert_allclose(result.output, output, atol=1e-5 * largest)


@pytest.mark.parametrize(
    ("path", "weights"), [("decode", "element"), ("prefill", "element"), ("decode", "int4"), ("prefill", "int8")]
)
def test_chosen_experts_alone_are_read(interpreter: Interpreter, path: str, weights: str) -> None:
    """What nobody chose may be anything."""
    layer = Layer(12, 64, 64, 16, path=path, weights=weights, max_k=2)
    inputs, exact = make_inputs(layer, 2)
    chosen = interpreter.run(layer, inputs).active
    unread = np.setdiff1d(np.arange(layer.experts), chosen)
    assert len(unread)
    names = ("up", "down") if weights == "element" else ("up_scales", "down_scales")
    poisoned = {name: inputs[name].copy() for name in names}
    for array in poisoned.values():
        array[unread] = np.nan
    check_all(layer, exact, interpreter.run(layer, {**inputs, **poisoned}))


@pytest.mark.parametrize("path", ["decode", "prefill"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_bad_inputs_spoil_their_own_token_only(interpreter: Interpreter, poison: float, path: str) -> None:
    layer = Layer(9, 32, 16, 3, path=path, max_k=2)
    inputs, _ = make_inputs(layer, 5)
    before = interpreter.run(layer, inputs)
    for name in ("router_logits", "hidden_states"):
        spoilt = {**inputs, name: inputs[name].copy()}
        spoilt[name][4, 1] = poison
        after = interpreter.run(layer, spoilt)
        others = np.arange(layer.tokens) != 4
        assert after.output[others].tobytes() == before.output[others].tobytes()
        assert not np.isfinite(after.output[4].astype(np.float32)).all()


def test_one_expert_costs_one_row(interpreter: Interpreter) -> None:
    """A token with k = 1 puts one row into the products, whatever others need."""
    layer = Layer(4, 8, 8, 8, element="float32", max_k=6, path="prefill")
    inputs, exact = make_inputs(layer, 0)
    inputs["policy_kind"] = np.zeros(2, np.int32)
    inputs["thresholds"] = np.full((2, 1), np.inf, np.float32)
    inputs["k_values"] = np.array([[1, 1], [6, 6]], np.int32)
    inputs["policy_index"] = np.array([0, 1, 0, 0], np.int32)
    layer.policies, layer.choices = 2, 2
    result = interpreter.run(layer, inputs)
    assert result.k.tolist() == [1, 6, 1, 1]
    assert result.offsets[-1] == 9
    check_routing(layer, {**exact, **inputs}, result)


def test_a_single_choice_needs_no_thresholds(interpreter: Interpreter) -> None:
    layer = Layer(5, 8, 8, 8, element="float32", policies=1, choices=1)
    inputs, exact = make_inputs(layer, 0)
    layer.policies, layer.choices = 1, 1
    change = {
        "policy_kind": np.zeros(1, np.int32),
        "k_values": np.array([[3]], np.int32),
        "thresholds": np.zeros((1, 0), np.float32),
    }
    result = interpreter.run(layer, {**inputs, **change, "thresholds": None})
    output, k, _ = expected(layer, {**exact, **change})
    np.testing.assert_array_equal(result.k, k)
    np.testing.assert_allclose(result.output, output, atol=1e-5)
