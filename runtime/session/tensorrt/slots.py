# SPDX-License-Identifier: Apache-2.0
"""Where each sequence's caches lie: slots that stay gathered at the front for the sequences that decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Exchange(NamedTuple):
    """Two places whose contents change sides, and how many tokens of each are worth keeping."""

    first: int
    second: int
    first_length: int
    second_length: int


class SlotMap:
    """From the blocks that the scheduler hands out to places in the caches.

    A decode step runs over the places 0 to n - 1, so the n sequences of the step are brought there: those that are
    not change places with those in front that are not due. A place is given up rarely (when a sequence ends or
    another prefills in front of it), and then as many tokens are copied as the two hold.

    Args:
        num_slots: places that exist; as many blocks.
    """

    def __init__(self, num_slots: int) -> None:
        self._place_of = list(range(num_slots))
        self._block_at = list(range(num_slots))
        # Tokens in each place; whether their sequence still lives is not known here.
        self._lengths = [0] * num_slots

    def place(self, block: int) -> int:
        """Where a block's sequence lies."""
        return self._place_of[block]

    def set_length(self, block: int, length: int) -> None:
        """Note how many tokens of a block's sequence are in the caches."""
        self._lengths[self._place_of[block]] = length

    def gather(self, blocks: Sequence[int]) -> list[Exchange]:
        """Bring these blocks to the front, in any order among themselves; the copies that this takes, in order."""
        count, due = len(blocks), set(blocks)
        holes = [place for place in range(count) if self._block_at[place] not in due]
        outside = sorted(self._place_of[block] for block in due if self._place_of[block] >= count)
        exchanges = []
        for hole, place in zip(holes, outside, strict=True):
            exchanges.append(Exchange(hole, place, self._lengths[hole], self._lengths[place]))
            self._lengths[hole], self._lengths[place] = self._lengths[place], self._lengths[hole]
            one, other = self._block_at[hole], self._block_at[place]
            self._block_at[hole], self._block_at[place] = other, one
            self._place_of[one], self._place_of[other] = place, hole
        return exchanges
