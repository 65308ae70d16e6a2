# SPDX-License-Identifier: Apache-2.0
"""How often to ask after clients."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """Paces a look-around whose cost grows with the number of requests.

    Asking Triton whether a client has gone takes about 0.15 ms. So a look is due at a fixed interval, but
    with very many requests never takes more than a tenth of the thread's time.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._next = time.monotonic()

    def seconds_left(self) -> float:
        """Until the next look is due; 0 if it is."""
        return max(0.0, self._next - time.monotonic())

    @contextmanager
    def look(self) -> Iterator[None]:
        """Surrounds a look-around."""
        started = time.monotonic()
        try:
            yield
        finally:
            ended = time.monotonic()
            self._next = ended + max(self._interval, 9.0 * (ended - started))
