# SPDX-License-Identifier: Apache-2.0
"""Values of a wrong type: refused in one sentence where they are given and not deep inside."""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from adaptive_k_moe.errors import AdaptiveKError

# The words for what a value must be. Whatever is not here is looked at by `isinstance`.
_WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "an integer",
    float: "a finite number",
    str: "text",
    os.PathLike: "a path",
    Sequence[int]: "a list of integers",
    Sequence[str]: "a list of texts",
    Sequence[str | Sequence[int]]: "a list of texts or of lists of token ids",
    Mapping[int | str, float]: "a dictionary of token ids or texts, with finite numbers",
    Mapping[str, Any]: "a dictionary with names as keys",
    Mapping[str, str]: "a dictionary of texts",
    Mapping[str, float]: "a dictionary of texts, with finite numbers",
    Any: "anything",
}


def check_arguments(error: type[AdaptiveKError], kind: Any, **values: Any) -> None:
    """Check that arguments of a function are of the kind that it takes.

    Integers and numbers may be NumPy's, a sequence anything with a length but text; True is no integer.

    Args:
        error: what to raise.
        kind: a type, or a union of types: those of `_WORDS`, a `Literal`, classes.
        values: the arguments by name.

    Raises:
        AdaptiveKError: one is of another kind; the sentence names it.
    """
    for name, value in values.items():
        if not _is(value, kind):
            expected = " or ".join(_in_words(each) for each in _alternatives(kind) if each is not types.NoneType)
            raise error(f"{name} is {value!r}: it must be {expected}.")


def check_fields(instance: Any, error: type[AdaptiveKError]) -> None:
    """Check that each field of a dataclass is what its annotation says, and make Python's own numbers of NumPy's.

    Args:
        instance: the dataclass's; a frozen one may call this in its `__post_init__`.
        error: what to raise.

    Raises:
        AdaptiveKError: a field is of another kind; the sentence names it.
    """
    dataclass: Any = type(instance)
    kinds = kinds_of(dataclass)
    for field in fields(instance):
        value, kind = getattr(instance, field.name), kinds[field.name]
        if value is field.default:  # most are, and a request is not to wait for them
            continue
        check_arguments(error, kind, **{field.name: value})
        object.__setattr__(instance, field.name, _plain(value, kind))


def json_object(text: str) -> dict[str, Any]:
    """The type of a command's option that is a JSON object."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"it must be a JSON object: {error}") from None
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError("it must be a JSON object")
    return content


@functools.cache
def kinds_of(described: type) -> dict[str, Any]:
    """What the fields of a dataclass, or the keys of a TypedDict, are by their annotations."""
    return get_type_hints(described)


@functools.cache
def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _is(value: Any, kind: Any) -> bool:
    return any(_is_one(value, each) for each in _alternatives(kind))


def _is_one(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind that is no union."""
    if kind is Any:
        return True
    if isinstance(value, bool):  # an integer to Python, and a slip here
        return kind is bool
    if kind is int:
        return isinstance(value, Integral)
    if kind is float:
        return isinstance(value, Real) and _is_finite(value)
    origin = get_origin(kind)
    if origin is None:
        return isinstance(value, kind)
    if origin is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if origin is Mapping:
        key_kind, item_kind = get_args(kind)
        return isinstance(value, Mapping) and all(_is(k, key_kind) and _is(v, item_kind) for k, v in value.items())
    if not isinstance(value, Collection) or isinstance(value, str | bytes | Mapping):
        return False
    try:
        return all(_is(item, get_args(kind)[0]) for item in value)
    except TypeError:  # NumPy's array of no dimension
        return False


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _plain(value: Any, kind: Any) -> Any:
    """The value with numbers, and lists of numbers, as Python's own."""
    alternatives = _alternatives(kind)
    if value is None or isinstance(value, bool | str):
        return value
    if int in alternatives:
        return int(value)
    if float in alternatives:
        return float(value)
    if Sequence[int] in alternatives:
        return tuple(int(item) for item in value)
    return value


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    return _WORDS.get(kind) or f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"
