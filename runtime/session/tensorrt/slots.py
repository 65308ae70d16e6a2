# SPDX-License-Identifier: Apache-2.0
"""Where each sequence's caches lie: slots that stay gathered at the front for the sequences that decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Exchange(NamedTuple):
    """Two places whose contents change sides, and how many tokens each of them has ever held since it was cleared."""

    first: int
    second: int
    first_extent: int
    second_extent: int


class SlotMap:
    """From the blocks that the scheduler hands out to places in the caches.

    A decode step runs over the places 0 to n - 1, so the n sequences of the step are brought there: those that are
    not change places with those in front that are not due. A place is given up rarely (when a sequence ends or
    another prefills in front of it), and then as many tokens are copied as the two have held. All of a block's content
    moves with it, so that nothing of another's ever lies behind a sequence's last token: the mask hides it, but not
    from NaN.

    Args:
        num_slots: places that exist; as many blocks.
    """

    def __init__(self, num_slots: int) -> None:
        self._place_of = list(range(num_slots))
        self._block_at = list(range(num_slots))
        # Tokens that each block has held; whether a sequence still needs them is not known here.
        self._extents = [0] * num_slots

    def place(self, block: int) -> int:
        """Where a block's content lies."""
        return self._place_of[block]

    def extent(self, block: int) -> int:
        """Tokens that the block has held since it was cleared."""
        return self._extents[block]

    def fill(self, block: int, length: int) -> None:
        """Note that a block holds so many tokens now."""
        self._extents[block] = max(self._extents[block], length)

    def clear(self, block: int) -> None:
        """Note that nothing is left in a block."""
        self._extents[block] = 0

    def gather(self, blocks: Sequence[int]) -> list[Exchange]:
        """Bring these blocks to the front, in any order among themselves; the copies that this takes, in order."""
        count, due = len(blocks), set(blocks)
        holes = [place for place in range(count) if self._block_at[place] not in due]
        outside = sorted(self._place_of[block] for block in due if self._place_of[block] >= count)
        exchanges = []
        for hole, place in zip(holes, outside, strict=True):
            one, other = self._block_at[hole], self._block_at[place]
            exchanges.append(Exchange(hole, place, self._extents[one], self._extents[other]))
            self._block_at[hole], self._block_at[place] = other, one
            self._place_of[one], self._place_of[other] = place, hole
        return exchanges
