# SPDX-License-Identifier: Apache-2.0
"""Who owns which block of the KV cache."""

from __future__ import annotations

from collections import deque


class BlockManager:
    """Hands out the physical blocks of the paged KV cache.

    Args:
        num_blocks: blocks that exist; their ids are 0 to num_blocks - 1.
        block_size: tokens that one block holds.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that somebody owns."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens of one sequence fill."""
        return -(-num_tokens // self.block_size)

    def grow(self, block_table: list[int], num_tokens: int) -> bool:
        """Append blocks to a table until it holds `num_tokens`; False, and none taken, if few are free."""
        missing = self.blocks_for(num_tokens) - len(block_table)
        if missing > len(self._free):
            return False
        block_table.extend(self._free.popleft() for _ in range(missing))
        return True

    def release(self, block_table: list[int]) -> None:
        """Take back all blocks of a table and empty it."""
        self._free.extend(block_table)
        block_table.clear()
