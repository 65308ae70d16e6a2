# SPDX-License-Identifier: Apache-2.0
"""Values of a wrong type: refused by name in one sentence; NumPy's numbers are numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_k_moe.arguments import check_arguments
from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_builder.build import dry_run
from adaptive_k_moe.errors import AdaptiveKError, BuildError, RequestError, ServerError
from adaptive_k_moe.model_repository import TritonServer
from adaptive_k_moe.model_repository.observation_options import ObservationOptions
from adaptive_k_moe.runtime import Enrollment, RequestContext, SamplingParams

FIT: list[tuple[Any, list[Any], list[Any]]] = [
    (int, [0, -1, np.int64(7), np.uint8(1)], [True, 1.0, "1", None, np.float32(1), [1]]),
    (int | None, [None, 3], [False, "None"]),
    (float, [0, 1.5, np.float32(2), Fraction(1, 3)], [float("nan"), float("inf"), 10**400, True, "1.5", None, 1j]),
    (bool, [True, False], [0, 1, None, "yes", np.True_]),
    (str | Sequence[str], ["", "a", [], ["a", ""], ("a",)], [b"a", ["a", 1], {"a": 1}, None, iter("a")]),
    (Sequence[int] | None, [[], [1, 2], (3,), np.arange(3), {4}, None], ["12", [1.0], [True], b"12", 1, np.array(1)]),
    (Mapping[str, Any] | None, [{}, {"a": object()}, None], [{1: 2}, [("a", 1)], "a"]),
    (Literal["a", "b"] | None, ["a", None], ["c", [], 1]),
]


@pytest.mark.parametrize(("kind", "fitting", "others"), FIT, ids=[str(kind) for kind, _, _ in FIT])
def test_what_a_kind_takes(kind: Any, fitting: list[Any], others: list[Any]) -> None:
    check_arguments(RequestError, kind, **{f"value_{place}": value for place, value in enumerate(fitting)})
    for value in others:
        with pytest.raises(RequestError, match=r"^name is .*: it must be .*\.$") as caught:
            check_arguments(RequestError, kind, name=value)
        assert "NoneType" not in str(caught.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.decimals() | st.just(object),
    lambda some: st.lists(some) | st.dictionaries(st.text(), some) | st.sets(st.integers()),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(list(SamplingParams.__annotations__)), ANYTHING, min_size=1, max_size=4))
def test_sampling_params_take_a_value_or_refuse_it_in_a_sentence(given: dict[str, Any]) -> None:
    try:
        params = SamplingParams(**given)
    except RequestError as error:
        refused = str(error).split(" ")[0]
        assert refused in given or refused == "min_tokens"  # which max_tokens bounds
    else:
        assert SamplingParams(**{name: getattr(params, name) for name in given}) == params


def test_numbers_become_pythons_own() -> None:
    params = SamplingParams(
        max_tokens=np.int32(4), top_p=np.float32(0.5), temperature=1, stop_token_ids=np.array([1, 2]), seed=np.uint64(9)
    )
    assert [type(value) for value in (params.max_tokens, params.top_p, params.temperature)] == [int, float, float]
    assert (params.stop_token_ids, params.seed) == ((1, 2), 9)


@pytest.mark.parametrize(
    "arguments",
    [
        {"checkpoint_dir": 5},
        {"output_dir": None},
        {"target": 5},
        {"target": ["onnx"]},
        {"dtype": "float8"},
        {"weight_only_precision": 4},
        {"group_size": "64"},
        {"policy": 7},
        {"max_batch_size": None},
        {"max_input_len": "8"},
        {"max_seq_len": 64.5},
        {"max_num_tokens": True},
        {"timing_cache": 1},
        {"force": "no"},
        {"progress": 3},
    ],
)
def test_a_build_with_a_wrong_type_writes_nothing(
    arguments: dict[str, Any], tmp_path: Path, checkpoint_dir: Path
) -> None:
    (name,) = arguments
    usual: dict[str, Any] = {"checkpoint_dir": checkpoint_dir, "output_dir": tmp_path / "engine", "target": "onnx"}
    with pytest.raises(BuildError, match=f"^{name} is .*: it must be "):
        build(**{**usual, **arguments})
    assert not list(tmp_path.iterdir())
    if name in ("checkpoint_dir", "dtype", "group_size", "max_batch_size", "progress"):
        with pytest.raises(BuildError, match=f"^{name} is .*: it must be "):
            dry_run(**{"checkpoint_dir": checkpoint_dir, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        {"engine_dir": None},
        {"http_port": "8000"},
        {"host": 5},
        {"log_file": 1},
        {"num_threads": "two"},
        {"observation": {"request_log": "-"}},
        {"ready_timeout": "long"},
    ],
)
def test_a_servers_argument_of_a_wrong_type_is_one_sentence(arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(ServerError, match=f"^{name} is .*: it must be "):
        TritonServer(**{"engine_dir": "engine", **arguments})


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (RequestContext, {"client_id": 5}),
        (RequestContext, {"batch_index": "0"}),
        (RequestContext, {"trace_headers": {"traceparent": None}}),
        (Enrollment, {"experiment": None}),
        (Enrollment, {"counted": 1}),
    ],
)
def test_what_goes_with_a_request_is_refused_before_its_records_fail(kind: Any, arguments: dict[str, Any]) -> None:
    (name,) = arguments
    usual = {"experiment": "spring", "variant": "control", "unit": "me"} if kind is Enrollment else {}
    with pytest.raises(RequestError, match=f"^{name} is .*: it must be "):
        kind(**{**usual, **arguments})


def test_observation_options_of_a_wrong_type_are_one_sentence() -> None:
    wrong: dict[str, Any] = {"request_log": 1, "log_prompts": "yes", "sample": "half", "max_bytes": 0.5, "ab_db": b"a"}
    for name, value in wrong.items():
        with pytest.raises(AdaptiveKError, match=f"^{name} is .*: it must be "):
            ObservationOptions(**{name: value})
