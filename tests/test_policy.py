# SPDX-License-Identifier: Apache-2.0
"""Policy files: what they may say, what is refused, and the tables they become."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_k_moe.calibration.families import DROPPED_AT
from adaptive_k_moe.errors import PolicyError
from adaptive_k_moe.plugin import description
from adaptive_k_moe.policy import (
    KIND_SHARED_EXPERTS,
    KIND_SHARED_PRICE,
    MAX_K,
    PolicySet,
    PolicyTables,
    Rule,
    compile_policies,
    parse_policy_set,
    read_policy_file,
)
from adaptive_k_moe.policy_kinds import KINDS, ONE_NUMBER

from checkpoints import REPOSITORY


def policies(**named: Any) -> dict[str, Any]:
    return {"policies": named}


def tables(content: dict[str, Any], *, experts: int = 8, top_k: int = 2, layers: int = 3) -> PolicyTables:
    fitted = parse_policy_set(content, "policies").for_model(
        num_experts=experts, num_experts_per_tok=top_k, num_moe_layers=layers
    )
    return compile_policies(fitted, num_experts=experts, num_experts_per_tok=top_k, num_moe_layers=layers)


def test_full_is_always_there_and_is_the_default() -> None:
    found = tables({})
    assert found.names == ["full"]
    assert found.default == 0
    assert (found.k_values == 2).all()
    assert np.isinf(found.thresholds).all()


def test_rows_with_fewer_choices_are_padded_so_that_the_padding_is_never_another_choice() -> None:
    found = tables(
        policies(
            two={"kind": "entropy", "thresholds": [0.4], "k": [1, 2]},
            three={"kind": "entropy", "thresholds": [0.3, 0.9], "k": [1, 2, 2]},
        )
    )
    row = found.index("two")
    np.testing.assert_array_equal(found.thresholds[0, row], np.array([0.4, np.inf], np.float32))
    np.testing.assert_array_equal(found.k_values[0, row], [1, 2, 2])


def test_bits_become_nats() -> None:
    content = {"unit": "bits", **policies(a={"kind": "entropy", "thresholds": [1.5], "k": [1, 2]})}
    assert tables(content).thresholds[0, 1, 0] == pytest.approx(1.5 * math.log(2), rel=1e-6)


def test_a_layers_own_rule_goes_before_the_common_one_and_unnamed_layers_run_full() -> None:
    found = tables(
        policies(
            mixed={
                "kind": "entropy",
                "thresholds": [0.5],
                "k": [1, 2],
                "layers": {"1": {"thresholds": [0.7], "k": [1, 2]}},
            },
            only={"kind": "entropy", "layers": {"2": {"thresholds": [0.1], "k": [1, 2]}}},
        )
    )
    np.testing.assert_allclose(found.thresholds[:, found.index("mixed"), 0], [0.5, 0.7, 0.5])
    assert found.k_values[0, found.index("only")].tolist() == [2, 2]
    assert found.k_values[2, found.index("only")].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("kind", "number", "name"), [(1, "p", "top_p"), (2, "ratio", "ratio"), (3, "p", "contribution")]
)
def test_kinds_with_one_number_have_rules_of_single_layers(kind: int, number: str, name: str) -> None:
    mixed = {"kind": name, number: 0.5, "k_max": 2, "layers": {"1": {number: 0.7, "k_min": 2}}}
    only = {"kind": name, "layers": {"2": {number: 0.25, "k_max": 3}}}
    content = {**policies(mixed=mixed, only=only), "expert_norms": [[1.0] * 8] * 3}
    found = tables(content, top_k=4)
    row = found.index("mixed")
    assert found.policy_kind[row] == kind
    np.testing.assert_allclose(found.thresholds[:, row, 0], [0.5, 0.7, 0.5])
    assert found.k_values[:, row].tolist() == [[1, 2], [2, 4], [1, 2]]
    # A layer that nobody names runs the trained top-k, whatever its number would say.
    row = found.index("only")
    assert found.k_values[:, row].tolist() == [[4, 4], [4, 4], [1, 3]]
    assert found.thresholds[2, row, 0] == 0.25
    again = parse_policy_set(parse_policy_set(content, "x").to_json(), "x")
    assert again == parse_policy_set(content, "x")
    # And as the engine keeps it, fitted to the model.
    fitted = again.for_model(num_experts=8, num_experts_per_tok=4, num_moe_layers=3)
    assert parse_policy_set(fitted.to_json(), "x") == fitted


def test_a_k_above_the_trained_top_k_in_a_layers_rule_is_capped() -> None:
    rule = {"kind": "top_p", "layers": {"1": {"p": 0.5, "k_max": 6}}}
    with pytest.warns(UserWarning, match="k = 6 is above the trained top-k and was capped to 2"):
        assert tables(policies(a=rule)).k_values[1, 1].tolist() == [1, 2]


def test_norms_are_relative_to_their_layers_mean_and_one_where_nobody_has_measured() -> None:
    assert (tables({}).expert_norms == 1).all()
    norms = [[1.0, 2.0, 3.0, 2.0], [0.0, 0.0, 0.0, 8.0]]
    found = tables({"expert_norms": norms}, experts=4, layers=2).expert_norms
    assert found.dtype == np.float32
    assert found.tolist() == [[0.5, 1, 1.5, 1], [0, 0, 0, 4]]
    largest = tables({"expert_norms": [[1e308] * 4, [0.0, 0.0, 1e308, 1e308]]}, experts=4, layers=2)
    assert largest.expert_norms.tolist() == [[1, 1, 1, 1], [0, 0, 2, 2]]


@pytest.mark.parametrize(
    ("norms", "sentence"),
    [
        (None, "policy 'a' weighs experts by the norm of their output, but there are no expert_norms"),
        ([[1.0] * 8] * 2, "expert_norms are of 2 layers of 8 experts, but the model has 3 MoE layers of 8"),
        ([[1.0] * 8, [1.0] * 8, [1.0] * 7], "3 layers of 7 or 8 experts"),
        ([[1.0] * 8, [0.0] * 8, [1.0] * 8], "the expert_norms of layer 1 are all 0"),
        ([[1.0] * 8, [], [1.0] * 8], "the expert_norms of layer 1 are all 0 or none at all"),
        ([], "expert_norms has no layer"),
        ([[-1.0] * 8] * 3, "greater than or equal to 0"),
        ([[float("inf")] * 8] * 3, "finite number"),
        ("many", "valid list"),
    ],
)
def test_norms_that_cannot_be_used_are_refused(norms: Any, sentence: str) -> None:
    content = {**policies(a={"kind": "contribution", "p": 0.5}), "expert_norms": norms}
    with pytest.raises(PolicyError, match=sentence) as caught:
        tables(content)
    assert "\n" not in str(caught.value)


def test_more_policies_than_an_engine_has_rows_are_refused() -> None:
    rules = {f"p{i}": {"kind": "fixed", "k": 1} for i in range(64)}
    with pytest.raises(PolicyError, match="65 policies, 'full' among them, are too many: an engine holds at most 64"):
        tables(policies(**rules))
    rules.pop("p0")
    assert len(tables(policies(**rules)).names) == 64


def test_k_above_the_trained_top_k_is_capped_with_a_warning_unless_allowed() -> None:
    rule = {"kind": "entropy", "thresholds": [0.6, 1.2], "k": [1, 2, 4]}
    with pytest.warns(UserWarning, match="above the trained top-k"):
        assert tables(policies(seed=rule)).k_values[0, 1].tolist() == [1, 2, 2]
    allowed = {**policies(seed=rule), "allow_above_top_k": True}
    assert tables(allowed).k_values[0, 1].tolist() == [1, 2, 4]
    with pytest.raises(PolicyError, match="at most 3 experts"):
        tables(allowed, experts=3)


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ({"kind": "entropy", "thresholds": [0.9, 0.3], "k": [1, 2, 2]}, "thresholds must rise"),
        ({"kind": "entropy", "thresholds": [0.3, 0.3], "k": [1, 2, 2]}, "thresholds must rise"),
        ({"kind": "entropy", "thresholds": [0.3], "k": [1, 2, 2]}, "1 thresholds need 2 values of k, not 3"),
        ({"kind": "entropy", "thresholds": [0.3], "k": [0, 2]}, "greater than or equal to 1"),
        ({"kind": "entropy"}, "give thresholds and k, or layers"),
        ({"kind": "entropy", "thresholds": [0.3]}, "belong together"),
        ({"kind": "fixed", "k": 0}, "greater than or equal to 1"),
        ({"kind": "fixed", "k": 1.5}, "valid integer"),
        ({"kind": "top_p", "p": 1.5}, "less than or equal to 1"),
        ({"kind": "top_p", "p": 0}, "greater than 0"),
        ({"kind": "top_p"}, "give p, or layers"),
        ({"kind": "top_p", "layers": {}}, "give p, or layers"),
        ({"kind": "top_p", "k_min": 1, "k_max": 2, "layers": {"0": {"p": 0.5}}}, "k_min and k_max need p beside them"),
        ({"kind": "top_p", "p": 0.5, "k_min": 2, "k_max": 1}, "k_min 2 is above k_max 1"),
        ({"kind": "top_p", "p": 0.5, "layers": {"0": {"p": 0.5, "k_min": 2, "k_max": 1}}}, "k_min 2 is above k_max 1"),
        ({"kind": "top_p", "layers": {"0": {"p": 1.5}}}, "layers.0.p: it must be less than or equal to 1"),
        ({"kind": "top_p", "layers": {"0": {"ratio": 0.5}}}, "layers.0.p: Field required"),
        ({"kind": "top_p", "layers": {"-1": {"p": 0.5}}}, "greater than or equal to 0"),
        ({"kind": "top_p", "layers": {"3": {"p": 0.5}}}, "names layer 3, but the model's 3 MoE layers are 0 to 2"),
        ({"kind": "ratio", "ratio": -0.1}, "greater than or equal to 0"),
        ({"kind": "ratio"}, "give ratio, or layers"),
        ({"kind": "ratio", "k_min": 2, "layers": {"0": {"ratio": 0.5}}}, "k_min and k_max need ratio beside them"),
        ({"kind": "ratio", "layers": {"0": {"ratio": 2}}}, "less than or equal to 1"),
        ({"kind": "ratio", "layers": {"9": {"ratio": 0.5}}}, "names layer 9"),
        ({"kind": "contribution"}, "give p, or layers"),
        ({"kind": "contribution", "p": -1}, "greater than 0"),
        ({"kind": "contribution", "layers": {"0": {"p": 0}}}, "greater than 0"),
        ({"kind": "contribution", "layers": {"7": {"p": 0.5}}}, "names layer 7"),
        ({"kind": "entropy", "thresholds": [0.01 * i for i in range(33)], "k": [1] * 34}, "has 34 values of k"),
        (
            {"kind": "entropy", "layers": {"0": {"thresholds": [0.01 * i for i in range(33)], "k": [1] * 34}}},
            "at most 33",
        ),
        ({"kind": "magic"}, "'magic'"),
        ({"kind": "fixed", "k": 1, "layer": 2}, "Extra inputs"),
    ],
)
def test_a_wrong_rule_is_refused_in_one_sentence(rule: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PolicyError, match=sentence) as caught:
        tables({**policies(wrong=rule), "expert_norms": [[1.0] * 8] * 3})
    assert "wrong" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(PolicyError, match="layers are 0 to 2"):
        tables(policies(a={"kind": "entropy", "layers": {"3": {"thresholds": [], "k": [1]}}}))
    with pytest.raises(PolicyError, match="'full' is the trained top-k"):
        tables(policies(full={"kind": "fixed", "k": 1}))
    with pytest.raises(PolicyError, match="the default 'b' is not among"):
        tables({"default": "b", **policies(a={"kind": "fixed", "k": 1})})
    with pytest.raises(PolicyError, match="not one of this engine's policies: full, a"):
        tables(policies(a={"kind": "fixed", "k": 1})).index("c")


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot read the policy file"):
        read_policy_file(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(PolicyError, match="is not JSON"):
        read_policy_file(tmp_path / "broken.json")


@pytest.mark.parametrize(("name", "top_k", "experts"), [("mixtral", 2, 8), ("nemotron3_nano", 6, 128)])
@pytest.mark.filterwarnings("ignore:policy 'seed'")
def test_the_seeds_settings_ship_as_examples(name: str, top_k: int, experts: int) -> None:
    path = REPOSITORY / "examples" / "policies" / f"{name}.json"
    found = tables(json.loads(path.read_text()), experts=experts, top_k=top_k)
    assert "seed" in found.names


@given(
    st.lists(st.floats(0, 5, width=32), unique=True, max_size=4).map(sorted),
    st.data(),
)
def test_json_round_trip(thresholds: list[float], data: st.DataObject) -> None:
    ks = data.draw(st.lists(st.integers(1, 8), min_size=len(thresholds) + 1, max_size=len(thresholds) + 1))
    content = policies(a={"kind": "entropy", "thresholds": thresholds, "k": ks})
    once = parse_policy_set(content, "x")
    assert parse_policy_set(json.loads(json.dumps(once.to_json())), "x") == once
    assert isinstance(once, PolicySet)


def test_every_kind_of_a_policy_file_is_in_the_table_of_kinds() -> None:
    union, _ = get_args(Rule)
    assert {get_args(kind.model_fields["kind"].annotation)[0] for kind in get_args(union)} == set(KINDS)
    assert set(ONE_NUMBER) == set(DROPPED_AT)
    for name in ONE_NUMBER:
        whole = {"kind": name, KINDS[name].parameter: KINDS[name].keeps_all}
        content = {**policies(a=whole), "expert_norms": [[1.0] * 8] * 3}
        assert tables(content).policy_kind[1] == KINDS[name].number


def test_shared_rows_have_a_price_or_a_number_of_experts() -> None:
    found = tables(
        policies(
            price={"kind": "shared", "price": 0.05, "k_min": 0, "layers": {"1": {"price": 0.2, "k_max": 1}}},
            number={"kind": "shared", "experts": 3},
            late={"kind": "shared", "layers": {"2": {"experts": 2}}},
        )
    )
    price, number, late = (found.index(name) for name in ("price", "number", "late"))
    assert found.policy_kind[[price, number, late]].tolist() == [4, 5, 5]
    np.testing.assert_array_equal(found.thresholds[:, price, 0], np.array([0.05, 0.2, 0.05], np.float32))
    assert found.k_values[:, price].tolist() == [[0, 2], [1, 1], [0, 2]]
    assert found.thresholds[0, number, 0] == 3 and found.k_values[0, number].tolist() == [1, 2]
    assert found.k_values[:, late].tolist() == [[2, 2], [2, 2], [1, 2]]  # layers without a rule run full


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"kind": "shared"}, "give price or experts, or layers"),
        ({"kind": "shared", "price": 0.1, "experts": 2}, "give price or experts, and not both"),
        ({"kind": "shared", "price": 0}, "greater than 0"),
        ({"kind": "shared", "price": 0.1, "layers": {"0": {"experts": 1}}}, "do not go together in one policy"),
        ({"kind": "shared", "k_min": 0, "layers": {"0": {"experts": 1}}}, "k_min and k_max need price or experts"),
        ({"kind": "phases", "prefill": {"kind": "fixed", "k": 1}}, "decode"),
        ({"kind": "phases", "prefill": {"kind": "fixed", "k": 1}, "decode": {"kind": "phases"}}, "decode"),
    ],
)
def test_unusable_shared_and_phases_are_refused(policy: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        tables(policies(a=policy))


def test_a_rule_for_each_phase_has_a_row_for_each() -> None:
    mixed = {"kind": "phases", "prefill": {"kind": "fixed", "k": 1}, "decode": {"kind": "shared", "price": 0.1}}
    found = tables(policies(mixed=mixed, top1={"kind": "fixed", "k": 1}))
    assert found.names == ["full", "mixed", "top1"]
    assert found.decode_row == [0, 3, 2]
    assert found.policy_of_row.tolist() == [0, 1, 2, 1]
    assert found.policy_kind.tolist() == [0, 0, 0, 4]
    assert found.k_values[0, 1].tolist() == [1, 1] and found.k_values[0, 3].tolist() == [1, 2]


def test_phases_are_written_and_read_as_they_were() -> None:
    content = policies(
        a={"kind": "phases", "prefill": {"kind": "ratio", "ratio": 0.2}, "decode": {"kind": "shared", "experts": 2}}
    )
    fitted = parse_policy_set(content, "policies").for_model(num_experts=8, num_experts_per_tok=2, num_moe_layers=3)
    again = parse_policy_set(json.loads(json.dumps(fitted.to_json())), "again")
    assert again.policies["a"] == fitted.policies["a"]
    with pytest.raises(PolicyError, match="names layer 7"):
        tables(policies(a={**content["policies"]["a"], "prefill": {"kind": "ratio", "layers": {"7": {"ratio": 0.1}}}}))


def test_limits_and_kinds_are_those_of_the_operators_description() -> None:
    assert MAX_K == description.MAX_K
    numbers = dict(description.POLICY_KINDS)
    assert (numbers.pop("shared_price"), numbers.pop("shared_experts")) == (KIND_SHARED_PRICE, KIND_SHARED_EXPERTS)
    assert numbers == {name: kind.number for name, kind in KINDS.items() if name not in ("fixed", "shared")}


LOAD_STEPS: list[dict[str, Any]] = [{"policy": "full"}, {"policy": "a", "queue": 4}, {"policy": "b", "queue": 16}]


def _by_load(**changes: Any) -> dict[str, Any]:
    return {"kind": "by_load", "steps": LOAD_STEPS, **changes}


def _with_steps(**named: Any) -> dict[str, Any]:
    return policies(a={"kind": "fixed", "k": 1}, b={"kind": "ratio", "ratio": 0.3}, **named)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (_by_load(steps=[]), "at least 1 item"),
        (_by_load(steps=[{"policy": "full", "queue": 1}]), "the first step, 'full', is the one without load"),
        (_by_load(steps=[*LOAD_STEPS[:1], {"policy": "a"}]), "the step 'a' needs a queue or a time_between_tokens"),
        (_by_load(steps=[*LOAD_STEPS[:2], {"policy": "b", "queue": 4}]), "queue must rise from step to step"),
        (_by_load(steps=[*LOAD_STEPS, {"policy": "a", "queue": 17}]), "names one twice"),
        (_by_load(floor="c"), "the floor 'c' is not among the steps"),
        (_by_load(steps=[*LOAD_STEPS, {"policy": "c", "queue": 17}]), "'x' has a step 'c', and there is no policy"),
        (_by_load(steps=[*LOAD_STEPS, {"policy": "x", "queue": 17}]), "'x' has a step 'x', which depends on the load"),
        (_by_load(leave_share=0), "greater than 0"),
        (_by_load(leave_seconds=-1), "greater than or equal to 0"),
    ],
)
def test_unusable_policies_by_load_are_refused_in_a_sentence(policy: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message) as raised:
        tables(_with_steps(x=policy))
    assert "\n" not in str(raised.value)


def test_a_policy_by_load_has_the_rows_of_its_first_step() -> None:
    phases = {"kind": "phases", "prefill": {"kind": "fixed", "k": 1}, "decode": {"kind": "shared", "price": 0.1}}
    found = tables(_with_steps(p=phases, auto={"kind": "by_load", "steps": [{"policy": "p"}], "floor": "p"}))
    auto, p = found.index("auto"), found.index("p")
    for mine, its in ((auto, p), (found.decode_row[auto], found.decode_row[p])):
        assert mine != its
        assert found.policy_kind[mine] == found.policy_kind[its]
        assert (found.k_values[:, mine] == found.k_values[:, its]).all()
        assert (found.thresholds[:, mine] == found.thresholds[:, its]).all()
    assert list(found.by_load) == ["auto"]


def test_policies_by_load_are_written_and_read_as_they_were() -> None:
    fitted = parse_policy_set(_with_steps(auto=_by_load(floor="a")), "policies").for_model(
        num_experts=8, num_experts_per_tok=2, num_moe_layers=3
    )
    again = parse_policy_set(json.loads(json.dumps(fitted.to_json())), "again")
    assert again.policies["auto"] == fitted.policies["auto"]
    assert [step.policy for step in again.policies["auto"].reachable] == ["full", "a"]
