# SPDX-License-Identifier: Apache-2.0
"""Shows a trace of k in a terminal: a row for each token, a cell for each layer, coloured where there are colours."""

from __future__ import annotations

import math

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from adaptive_k_moe.observability.debugger import can_be_written
from adaptive_k_moe.observability.k_trace import KTrace, TokenTrace
from adaptive_k_moe.runtime.expert_runs import ExpertRuns

_HEIGHTS = "▁▂▃▄▅▆▇█"
_ASCII_HEIGHTS = ".:-=+*#@"
_TEXT_WIDTH, _LEAST_TEXT_WIDTH = 18, 3
# From few experts to all of them.
_COLOURS = ("green", "cyan", "yellow", "red")


def show(trace: KTrace, console: Console) -> None:
    """Print a trace; layers that do not fit beside each other follow below.

    Args:
        trace: what to show.
        console: where to; it knows its width and whether it has colours.
    """
    names = f"{_escaped(trace.model)}, policy {_escaped(trace.policy)}"
    bar = f"a bar's height is the entropy (full at {trace.largest_entropy:.2f} nats)"
    console.print(Text(f"{names}: {bar}, the number beside it k (trained top-{trace.full_k})"))
    cell = 1 + max((len(str(k)) for token in trace.tokens for k in token.k), default=1)
    room = console.width - len(" prompt  mean ")
    width = min(_TEXT_WIDTH, max(_LEAST_TEXT_WIDTH, room - (cell + 1)))
    at_once = max(1, (room - width) // (cell + 1))
    heights = _HEIGHTS if can_be_written(_HEIGHTS, console.encoding) else _ASCII_HEIGHTS
    for first in range(0, max(trace.num_layers, 1), at_once):
        last = min(first + at_once, trace.num_layers)
        if first or last < trace.num_layers:
            console.print(Text(f"layers {first} to {last - 1}", style="bold"))
        header = "".join(f" {str(layer)[-cell:]:<{cell}}" for layer in range(first, last))
        title = set_cell_size("token", width)
        console.print(Text(f"{title} {'part':<6}  mean{header}", style="dim"), no_wrap=True)
        for token in trace.tokens:
            row = _row(token, width)
            for layer in range(first, last):
                height = _height(token.entropy[layer] / trace.largest_entropy, heights)
                row.append(f" {height}{token.k[layer]:<{cell - 1}}", style=_colour(token.k[layer], trace.full_k))
            console.print(row, no_wrap=True, crop=True)
    if trace.tokens:
        console.print(_summary(trace))


def _row(token: TokenTrace, width: int) -> Text:
    """A token's row up to its layers; wide characters take two of the `width` columns of its text."""
    mean = sum(token.k) / len(token.k) if token.k else float("nan")
    shown = _escaped(token.text)
    if cell_len(shown) > width:
        shown = f"{set_cell_size(shown, width - 1)}…"
    return Text(f"{set_cell_size(shown, width)} {token.part:<6} {mean:5.2f}")


def _escaped(text: str) -> str:
    """A text without control characters, which would act on the terminal."""
    return repr(text)[1:-1]


def _summary(trace: KTrace) -> Text:
    k = trace.k
    runs = ExpertRuns.of(trace.full_k, k)
    by_layer = "  ".join(f"{layer}: {mean:.2f}" for layer, mean in enumerate(k.mean(axis=0).tolist()))
    return Text(
        f"{len(trace.tokens)} tokens, mean k {runs.avg_k:.3f}, {runs.compute_saved_ratio * 100:.1f} % of the expert "
        f"runs saved\n"
        f"mean k by layer  {by_layer}"
    )


def _height(share: float, heights: str) -> str:
    if math.isnan(share):
        return "?"
    return heights[min(max(int(share * len(heights)), 0), len(heights) - 1)]


def _colour(k: int, full_k: int) -> str:
    """Of a k from 1 to the trained top-k, and of one beyond it."""
    if full_k <= 1:
        return _COLOURS[0]
    share = min(max((k - 1) / (full_k - 1), 0.0), 1.0)
    return _COLOURS[round(share * (len(_COLOURS) - 1))]
