# SPDX-License-Identifier: Apache-2.0
"""The options of commands that ask for an answer, from the table of what a request may ask for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from adaptive_k_moe.arguments import json_object
from adaptive_k_moe.errors import RequestError
from adaptive_k_moe.request_options import DEFAULT_MAX_TOKENS, OPTIONS_BY_NAME

_TYPES = {"INT32": int, "UINT64": int, "FP32": float, "STRING": str}


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the prompt, and what makes it a conversation."""
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to go on from; - reads standard input")
    parser.add_argument(
        "--apply_chat_template",
        action="store_true",
        help="the prompt is a user's message: put it into the model's chat template",
    )
    parser.add_argument("--system_prompt", metavar="TEXT", help="the system's message before it")
    parser.add_argument(
        "--chat_template_kwargs", type=json_object, metavar="JSON", help="what else the template knows, as an object"
    )


def read_prompt(args: argparse.Namespace) -> str | Sequence[Mapping[str, Any]]:
    """The text, or the conversation.

    Raises:
        RequestError: options of a conversation were given without `--apply_chat_template`.
    """
    if not args.apply_chat_template and (args.system_prompt is not None or args.chat_template_kwargs is not None):
        raise RequestError(
            "--system_prompt and --chat_template_kwargs are for a chat: give --apply_chat_template, too."
        )
    prompt: str = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not args.apply_chat_template:
        return prompt
    turns = [("system", args.system_prompt), ("user", prompt)]
    return [{"role": role, "content": text} for role, text in turns if text is not None]


def add_request_arguments(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """Declare those of the options of these names that have a place on a command line."""
    for name, option in OPTIONS_BY_NAME.items():
        if option.metavar is None or name not in names:
            continue
        more: dict[str, Any] = {"nargs": "+", "action": "extend"} if option.dims == (-1,) else {}
        if name == "max_tokens":
            more["default"] = DEFAULT_MAX_TOKENS
        tail = " (default: %(default)s)" if more.get("default") is not None else ""
        parser.add_argument(
            f"--{name}", type=_TYPES[option.data_type], metavar=option.metavar, help=f"{option.help}{tail}", **more
        )


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that `add_request_arguments` declared and that were given."""
    values = ((name, getattr(args, name, None)) for name, option in OPTIONS_BY_NAME.items() if option.metavar)
    return {name: value for name, value in values if value is not None}
