# SPDX-License-Identifier: Apache-2.0
"""Attention over paged keys and values, by torch's own scaled-dot-product attention.

A layer's keys lie in one tensor [slots, KV heads, D], a slot a token; block b begins at slot b * block size. There are
two blocks more than the scheduler knows of. One stays zeros and is read in the place of what a sequence does not have:
what another sequence left there may be no number, and a weight of zero would not keep that out. The idle rows of a
padded step write to the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class Group:
    """Sequences of a step with equally many new tokens: S of n tokens, whose past and new fill K slots at most.

    Attributes:
        rows: [S * n] where their tokens stand in the step; None is everywhere.
        size: S and n.
        write: [S * n] slots of the new tokens.
        read: [S, K] slots of each sequence's tokens, in order.
        mask: [S, 1, g * n, K] what each new token sees, for the g query heads that share keys.
    """

    rows: Any
    size: tuple[int, int]
    write: Any
    read: Any
    mask: Any


class PagedCache:
    """Keys and values of all attention layers.

    Args:
        layers: indices of the layers that have attention.
        num_blocks: blocks that the scheduler gives out.
        block_size: tokens of a block.
        heads: heads of the queries, and of keys and values.
        head_dim: D.
        dtype: of keys and values.
        device: where they lie.
        sliding_window: how many tokens a token sees, itself among them; None is all.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_blocks: int,
        block_size: int,
        heads: tuple[int, int],
        head_dim: int,
        dtype: Any,
        device: Any,
        sliding_window: int | None,
    ) -> None:
        self._block_size, self._window, self._device = block_size, sliding_window, device
        self._groups = heads[0] // heads[1]
        self._zeros = num_blocks * block_size
        self.idle_block = num_blocks + 1
        shape = ((num_blocks + 2) * block_size, heads[1], head_dim)
        self.layers = {
            layer: tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)) for layer in layers
        }

    def group(self, rows: Any, tables: Any, positions: Any) -> Group:
        """Where some sequences' tokens lie, computed on the device.

        Args:
            rows: as in `Group`.
            tables: [S, blocks] int64 block tables; what lies behind a sequence's own may be anything within the cache.
            positions: [S, n] int64 positions of the new tokens.
        """
        size, block = positions.shape, self._block_size
        keys = torch.arange(tables.shape[1] * block, device=self._device)
        slots = (tables[:, :, None] * block + torch.arange(block, device=self._device)).flatten(1)
        mask = keys <= positions[:, :, None]  # [S, n, K]
        read = torch.where(mask[:, -1], slots, self._zeros)
        if self._window is not None:
            mask &= keys > positions[:, :, None] - self._window
        spread = mask[:, None].expand(-1, self._groups, -1, -1).flatten(1, 2)[:, None]
        return Group(rows, (size[0], size[1]), slots.gather(1, positions).flatten(), read, spread)

    def attend(self, groups: Sequence[Group], attributes: Mapping[str, Any], query: Any, key: Any, value: Any) -> Any:
        """`PagedAttention`: new keys and values go into their slots, and each token's sum over what it sees comes out.

        Args:
            groups: the step's, which together have all its tokens.
            attributes: the node's.
            query: [1, heads, T, D].
            key: [1, KV heads, T, D].
            value: as `key`.

        Returns:
            [1, heads, T, D].
        """
        keys, values = self.layers[attributes["layer"]]
        query, key, value = query[0], key[0].transpose(0, 1), value[0].transpose(0, 1)
        whole = None if groups[0].rows is None else torch.empty_like(query)
        for group in groups:
            rows = group.rows
            keys.index_copy_(0, group.write, key if rows is None else key[rows])
            values.index_copy_(0, group.write, value if rows is None else value[rows])
            found = self._attend(group, query if rows is None else query[:, rows], keys, values, attributes["scale"])
            if whole is None:
                return found[None]
            whole[:, rows] = found
        assert whole is not None
        return whole[None]

    def _attend(self, group: Group, query: Any, keys: Any, values: Any, scale: float) -> Any:
        """[heads, S * n, D] of queries in that shape.

        Heads that share keys stand as more queries of one head: no key is repeated, and any kernel of torch's goes.
        """
        sequences, new = group.size
        heads, _, width = query.shape
        split = query.reshape(-1, self._groups, sequences, new, width).permute(2, 0, 1, 3, 4)
        found = functional.scaled_dot_product_attention(
            split.reshape(sequences, -1, self._groups * new, width),
            keys[group.read].transpose(1, 2),
            values[group.read].transpose(1, 2),
            attn_mask=group.mask,
            scale=scale,
        )
        joined = found.view(sequences, -1, self._groups, new, width).permute(1, 2, 0, 3, 4)
        return joined.reshape(heads, sequences * new, width)
