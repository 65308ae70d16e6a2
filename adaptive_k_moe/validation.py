# SPDX-License-Identifier: Apache-2.0
"""What everything that is read from a file is checked by, and pydantic's account of a wrong one as one sentence."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError


class FileModel(BaseModel):
    """Content of a file: unknown fields and numbers that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def first_error(error: ValidationError) -> tuple[str, str]:
    """Where the first error is (dotted, empty at the top) and what is wrong, without a full stop."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "it must be")
    return ".".join(str(part) for part in first["loc"]), message


def describe_first_error(error: ValidationError) -> str:
    """The first error with its place, if it has one, before it; without a full stop."""
    return ": ".join(filter(None, first_error(error)))
