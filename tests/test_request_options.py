# SPDX-License-Identifier: Apache-2.0
"""The table of request options and what is made from it agree."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from adaptive_k_moe.arguments import kinds_of
from adaptive_k_moe.client.options import GenerateOptions
from adaptive_k_moe.request_arguments import add_request_arguments, given_options
from adaptive_k_moe.request_options import DEFAULT_MAX_TOKENS, OPTIONS_BY_NAME, REQUEST_OPTIONS, UNSUPPORTED_OPTIONS
from adaptive_k_moe.runtime.sampling_params import SamplingParams

PYTHON_TYPES = {"INT32": int, "UINT64": int, "FP32": float, "BOOL": bool, "STRING": str}


@pytest.mark.parametrize("described", [SamplingParams, GenerateOptions])
def test_options_have_one_type_in_python_and_on_the_wire(described: Any) -> None:
    shared = kinds_of(described).keys() & OPTIONS_BY_NAME.keys()
    assert len(shared) > 12
    for name in shared - {"logit_bias", "chat_template_kwargs"}:  # dictionaries, which no tensor is
        assert str(PYTHON_TYPES[OPTIONS_BY_NAME[name].data_type].__name__) in str(kinds_of(described)[name]), name


def test_every_option_of_a_command_line_can_be_sent_or_sampled_with() -> None:
    for name, option in OPTIONS_BY_NAME.items():
        if option.metavar is not None:
            assert name in kinds_of(GenerateOptions) or name in kinds_of(SamplingParams), name


def test_no_input_has_two_meanings() -> None:
    for kind in ("text", "tokens"):
        names = [name for option in (*REQUEST_OPTIONS, *UNSUPPORTED_OPTIONS) for name in getattr(option, kind)]
        assert len(names) == len(set(names))


def test_command_lines_give_what_was_given_and_one_default() -> None:
    parser = argparse.ArgumentParser()
    add_request_arguments(parser, GenerateOptions.__annotations__)
    assert given_options(parser.parse_args([])) == {"max_tokens": DEFAULT_MAX_TOKENS}
    assert SamplingParams().max_tokens == DEFAULT_MAX_TOKENS
    line = "--stop a b --stop c --top_k 5 --temperature 0.5 --seed 3 --user me --max_tokens 7"
    assert given_options(parser.parse_args(line.split())) == {
        "stop": ["a", "b", "c"],
        "top_k": 5,
        "temperature": 0.5,
        "seed": 3,
        "user": "me",
        "max_tokens": 7,
    }
    few = argparse.ArgumentParser()
    add_request_arguments(few, ["max_tokens"])
    with pytest.raises(SystemExit):
        few.parse_args(["--top_k", "5"])
