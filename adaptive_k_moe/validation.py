# SPDX-License-Identifier: Apache-2.0
"""Pydantic's account of a wrong file, as one sentence of ours."""

from __future__ import annotations

from pydantic import ValidationError


def first_error(error: ValidationError) -> tuple[str, str]:
    """Where the first error is (dotted, empty at the top) and what is wrong, without a full stop."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "it must be")
    return ".".join(str(part) for part in first["loc"]), message


def describe_first_error(error: ValidationError) -> str:
    """The first error with its place, if it has one, before it; without a full stop."""
    return ": ".join(filter(None, first_error(error)))
