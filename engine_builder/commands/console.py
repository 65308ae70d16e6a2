# SPDX-License-Identifier: Apache-2.0
"""What commands show besides their answer: a progress bar, and warnings as sentences."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar on the error stream where that is a terminal.

    Called with what is being done, how much of it is done, and of how much (None: not known).
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda part, done, total: bar.update(task, description=part, completed=done, total=total)


@contextmanager
def warnings_as_sentences() -> Iterator[None]:
    """Print our warnings on the error stream, a line each, once what they are about is done."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            print(f"adaptive-k: warning: {warning.message}", file=sys.stderr)
