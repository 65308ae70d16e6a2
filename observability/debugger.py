# SPDX-License-Identifier: Apache-2.0
"""How k follows from the entropy, layer by layer, as bars to look at.

Example::

    debugger.trace_k_selection(entropies)
    # Layer 0 | H=0.42 ████░░░░ | K=1
    # Layer 1 | H=1.23 ████████ | K=4
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.errors import RequestError

BAR_WIDTH = 8
"""Blocks of a bar."""

BLOCKS = "█░"
"""A filled block and an empty one."""

_ASCII_BLOCKS = "#."

# The rule that Adaptive-K was published with, in nats.
_THRESHOLDS = (0.6, 1.2)
_K_VALUES = (1, 2, 4)


def trace_k_selection(
    entropies: npt.ArrayLike,
    *,
    k: npt.ArrayLike | None = None,
    thresholds: Sequence[float] = _THRESHOLDS,
    k_values: Sequence[int] = _K_VALUES,
    full_bar: float = 1.0,
    file: TextIO | None = None,
) -> None:
    """Print a line for each layer: its entropy, as a number and as a bar, and its k.

    Args:
        entropies: [L] entropies of a token's routers in nats, or [T, L] of several tokens.
        k: the k that ran, of the same shape, such as `CompletionOutput.k`; None works it out by the next two.
        thresholds: rising limits in nats.
        k_values: k below each limit, and beyond the last.
        full_bar: nats of a full bar.
        file: where to; None is standard output.

    Raises:
        RequestError: the shapes do not fit each other.
    """
    rows = np.atleast_2d(np.asarray(entropies, np.float64))
    if rows.ndim != 2:
        raise RequestError(f"entropies have the shape {list(np.shape(entropies))}: give [layers] or [tokens, layers].")
    chosen = select_k(rows, thresholds, k_values) if k is None else np.atleast_2d(np.asarray(k))
    if chosen.shape != rows.shape:
        raise RequestError(f"k is of {list(chosen.shape)} tokens and layers, but the entropies of {list(rows.shape)}.")
    stream = sys.stdout if file is None else file
    blocks = BLOCKS if can_be_written(BLOCKS, getattr(stream, "encoding", None)) else _ASCII_BLOCKS
    for token, (entropy_row, k_row) in enumerate(zip(rows, chosen, strict=True)):
        if len(rows) > 1:
            print(f"Token {token}", file=file)
        for line in lines(entropy_row, k_row, full_bar, blocks):
            print(line, file=file)


def select_k(
    entropies: npt.NDArray[np.float64], thresholds: Sequence[float], k_values: Sequence[int]
) -> npt.NDArray[np.int64]:
    """The k of each entropy by an entropy rule: the first k whose limit lies above the entropy, else the last.

    Raises:
        RequestError: there is not one k more than there are thresholds, or they do not rise.
    """
    if len(k_values) != len(thresholds) + 1 or list(thresholds) != sorted(thresholds):
        raise RequestError(f"{list(thresholds)} and {list(k_values)}: thresholds must rise, and have one k more.")
    # A NaN is sorted behind all limits, as the operator has it.
    return np.asarray(k_values, np.int64)[np.searchsorted(np.asarray(thresholds), entropies, side="right")]


def lines(
    entropies: npt.NDArray[np.float64], k: npt.NDArray[np.int64], full_bar: float, blocks: str = BLOCKS
) -> Iterator[str]:
    """The lines of one token, [L] each."""
    width = len(str(len(entropies) - 1))
    for layer, (entropy, chosen) in enumerate(zip(entropies.tolist(), k.tolist(), strict=True)):
        yield f"Layer {layer:>{width}} | H={entropy:.2f} {bar(entropy, full_bar, blocks)} | K={chosen}"


def bar(entropy: float, full_bar: float, blocks: str = BLOCKS) -> str:
    """A bar of `BAR_WIDTH` of the `blocks`, filled and empty; one that has begun counts."""
    share = entropy / full_bar
    filled = BAR_WIDTH if math.isnan(share) else math.ceil(min(max(share, 0.0), 1.0) * BAR_WIDTH)
    return blocks[0] * filled + blocks[1] * (BAR_WIDTH - filled)


def can_be_written(text: str, encoding: str | None) -> bool:
    """Whether an encoding has all characters of a text; None, of a stream that takes any text, has."""
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
