# SPDX-License-Identifier: Apache-2.0
"""The ``adaptive-k`` command: one subcommand a module, imported only when it is asked for.

A command's module has ``add_arguments(parser)`` and ``run(args) -> int``; both may import heavy
packages only inside ``run``, so that ``--help`` answers at once and the client needs no engine.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

from adaptive_k_moe import __version__
from adaptive_k_moe.errors import AdaptiveKError, DependencyError
from adaptive_k_moe.signals import unwinding_when_terminated


class _Command(NamedTuple):
    module: str
    summary: str


COMMANDS = {
    "build": _Command("adaptive_k_moe.engine_builder.commands.build", "convert a checkpoint into an engine"),
    "convert": _Command(
        "adaptive_k_moe.engine_builder.commands.convert", "write TensorRT-LLM's checkpoint, for trtllm-build"
    ),
    "inspect": _Command("adaptive_k_moe.engine_builder.commands.inspect", "show what is in an engine directory"),
    "policy": _Command("adaptive_k_moe.engine_builder.commands.policy", "show or change an engine's policies"),
    "generate": _Command("adaptive_k_moe.runtime.commands.generate", "generate text with no server"),
    "perplexity": _Command(
        "adaptive_k_moe.runtime.commands.perplexity", "measure a text's perplexity under each policy"
    ),
    "validate": _Command(
        "adaptive_k_moe.calibration.commands.validate", "measure the routers' entropy in two ways that must agree"
    ),
    "calibrate": _Command("adaptive_k_moe.calibration.commands.calibrate", "choose a policy by measurement"),
    "eval": _Command("adaptive_k_moe.calibration.commands.eval", "measure policies: quality, experts and time"),
    "serve": _Command("adaptive_k_moe.model_repository.commands.serve", "serve an engine with Triton"),
    "trace": _Command("adaptive_k_moe.observability.commands.trace", "show how many experts each token runs"),
    "client": _Command("adaptive_k_moe.client.commands.client", "ask a running server"),
    "playground": _Command(
        "adaptive_k_moe.observability.commands.playground", "try a running server on a page in the browser"
    ),
    "ab": _Command("adaptive_k_moe.observability.commands.ab", "compare policies on running servers by A/B tests"),
}

# The extra that brings what a subpackage imports, for the sentence when it is missing.
_EXTRAS = {
    "client": "adaptive-k-moe",
    "validate": "adaptive-k-moe[calibration,training]",
    "calibrate": "adaptive-k-moe[calibration]",
    "eval": "adaptive-k-moe[calibration]",
    "playground": "adaptive-k-moe[observability]",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status; an `AdaptiveKError` prints one line and gives 1."""
    arguments = [_with_underscores(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may have characters that the terminal's encoding has not
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as arguments are: whoever takes the text refuses it
    parser = argparse.ArgumentParser(prog="adaptive-k", description="Adaptive-K mixture-of-experts inference.")
    parser.add_argument("--version", action="version", version=f"adaptive-k-moe {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # Only the command asked for is imported; the others are names and summaries.
    asked = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.summary, description=command.summary)
        if name == asked:
            try:
                importlib.import_module(command.module).add_arguments(subparser)
            except ModuleNotFoundError as error:
                return _fail(_missing_package(name, error))
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        subparsers.choices[namespace.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        with unwinding_when_terminated():
            status = importlib.import_module(COMMANDS[namespace.command].module).run(namespace)
            sys.stdout.flush()
        return int(status)
    except AdaptiveKError as error:
        return _fail(error)
    except ModuleNotFoundError as error:
        return _fail(_missing_package(namespace.command, error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) went away; keep the interpreter from failing again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        # Commands name what they expect; this is a file that nobody thought of, or a full disk.
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        return _fail(AdaptiveKError(f"{error.filename or 'a file'} cannot be used: {error.strerror}."))


def _with_underscores(argument: str) -> str:
    """A flag as it is declared, by TensorRT-LLM's words, where it came with hyphens, as vLLM's do."""
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if re.fullmatch(r"--[a-z0-9_-]+", name) else argument


def _missing_package(command: str, error: ModuleNotFoundError) -> AdaptiveKError:
    if error.name is None or error.name.startswith("adaptive_k_moe"):
        raise error
    extra = _EXTRAS.get(command, "adaptive-k-moe[engine]")
    return DependencyError(
        f"`adaptive-k {command}` needs the package {error.name!r}: install it with pip install '{extra}'."
    )


def _fail(error: AdaptiveKError) -> int:
    print(f"adaptive-k: error: {error}", file=sys.stderr)
    return 1
