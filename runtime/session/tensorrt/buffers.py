# SPDX-License-Identifier: Apache-2.0
"""What lies on both sides of the bus, and the caches, which lie on the GPU alone."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.engine_format.tensorrt import ITEM_SIZES, Binding, Shape
from adaptive_k_moe.policy import PolicyTables
from adaptive_k_moe.runtime.session.tensorrt.cuda import Bytes, Cuda, aligned
from adaptive_k_moe.runtime.session.tensorrt.slots import Exchange

# What unused rows and columns of the policy tables hold; the columns of `k_values` repeat their row's last.
_PADDING = {"policy_kind": 0, "thresholds": np.inf, "k_values": 1}


class Mirror:
    """Memory here and, laid out alike, on the GPU; taken from front to back and given back all at once.

    Args:
        cuda: the device.
        size: bytes.
    """

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.size = aligned(size)
        self.used = 0
        self._cuda = cuda
        self._address = cuda.allocate(self.size)
        self._pinned = cuda.allocate_pinned(self.size)

    def take(self, size: int) -> int:
        """The offset of that many bytes that nobody else has.

        Raises:
            ValueError: there are not so many left.
        """
        offset = self.used
        if size > self.size - offset:
            raise ValueError(f"{size} bytes asked for of {self.size - offset}")
        self.used = offset + aligned(size)
        return offset

    def reset(self) -> None:
        """Take everything back; copies that are under way must be over."""
        self.used = 0

    def address(self, offset: int) -> int:
        """Where an offset lies on the GPU."""
        return self._address + offset

    def view(self, offset: int, dtype: npt.DTypeLike, *shape: int) -> npt.NDArray[Any]:
        """Where it lies here, as an array."""
        size = prod(shape) * np.dtype(dtype).itemsize
        return self._bytes(offset, size).view(dtype).reshape(shape)

    def upload(self, stream: int) -> None:
        """Copy what is taken to the GPU."""
        self._cuda.upload(self._address, self._bytes(0, self.used), stream)

    def download(self, offset: int, size: int, stream: int) -> None:
        """Copy bytes from the GPU."""
        self._cuda.download(self._bytes(offset, size), self._address + offset, stream)

    def _bytes(self, offset: int, size: int) -> Bytes:
        return self._pinned[offset : offset + size]


class Readback:
    """Room for outputs on the GPU, and their way into the caller's arrays.

    Args:
        cuda: the device.
        size: bytes of all outputs between two calls of `deliver`.
    """

    def __init__(self, cuda: Cuda, size: int) -> None:
        self._mirror = Mirror(cuda, size)
        self._fetched: list[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]] = []

    def has_room(self, size: int) -> bool:
        """Whether so many bytes can be taken at once."""
        return size <= self._mirror.size - self._mirror.used

    def take(self, size: int) -> int:
        """The offset of room for an output."""
        return self._mirror.take(size)

    def address(self, offset: int) -> int:
        """Where that lies on the GPU."""
        return self._mirror.address(offset)

    def fetch(
        self,
        offset: int,
        source_rows: npt.NDArray[Any],
        target: npt.NDArray[Any],
        target_rows: npt.NDArray[Any],
        stream: int,
    ) -> None:
        """Let the stream copy an output back; `deliver` puts its `source_rows` into the `target_rows` of an array."""
        if len(source_rows):
            source = self._mirror.view(offset, target.dtype, int(source_rows.max()) + 1, *target.shape[1:])
            self._mirror.download(offset, source.nbytes, stream)
            self._fetched.append((source, source_rows, target, target_rows))

    def deliver(self) -> None:
        """Fill the callers' arrays, when the copies are over, and take all room back."""
        for source, source_rows, target, target_rows in self._fetched:
            target[target_rows] = source[source_rows]
        self.reset()

    def reset(self) -> None:
        """Take all room back and forget what is under way."""
        self._fetched.clear()
        self._mirror.reset()


class PolicyBuffers:
    """The policy tables on the GPU, at fixed addresses and in their largest shapes, so that new ones change neither.

    Args:
        cuda: the device.
        bindings: the inputs that are fields of `PolicyTables`.
    """

    def __init__(self, cuda: Cuda, bindings: list[Binding]) -> None:
        self.shapes = {binding.name: binding.profiles[0].max for binding in bindings}
        self._dtypes = {binding.name: binding.dtype for binding in bindings}
        sizes = {name: prod(shape) * ITEM_SIZES[self._dtypes[name]] for name, shape in self.shapes.items()}
        self._mirror = Mirror(cuda, sum(aligned(size) for size in sizes.values()))
        self._offsets = {name: self._mirror.take(size) for name, size in sizes.items()}
        self.addresses = {name: self._mirror.address(offset) for name, offset in self._offsets.items()}

    def write(self, tables: PolicyTables, stream: int) -> None:
        """Copy tables to the GPU; the stream must be waited for before the next call."""
        for name, shape in self.shapes.items():
            table = getattr(tables, name)
            padded = self._mirror.view(self._offsets[name], self._dtypes[name], *shape)
            padded[...] = _PADDING.get(name, 0)
            padded[tuple(slice(size) for size in table.shape)] = table
            if name == "k_values":
                _, rows, columns = table.shape
                padded[:, :rows, columns:] = table[..., -1:]
        self._mirror.upload(stream)


class Cache:
    """One cache or state of all slots on the GPU, [slots, …].

    Args:
        cuda: the device.
        binding: the input.
        num_slots: places.
    """

    def __init__(self, cuda: Cuda, binding: Binding, num_slots: int) -> None:
        self.name = binding.name
        self.slot_shape = binding.profiles[0].min[1:]
        self.slot_bytes = binding.slot_bytes
        self._num_slots = num_slots
        self._size = num_slots * self.slot_bytes
        # Caches are bound from a sequence's slot on; of states all slots are, and an input says which are meant.
        self._as_a_whole = binding.shape[0] == "num_slots"
        # Keys and values are [heads, tokens, head_dim], of which a sequence fills the first tokens of each head.
        by_token = self.name.startswith("past_key_values.")
        self._height = self.slot_shape[0] if by_token else 1
        self._pitch = self.slot_bytes // self._height
        self._token_bytes = self._pitch // self.slot_shape[1] if by_token else None
        self._cuda = cuda
        self._base = cuda.allocate(self._size)

    def clear_all(self, stream: int) -> None:
        """Fill all slots with zeros."""
        self._cuda.clear(self._base, self._size, stream)

    def clear(self, place: int, extent: int, stream: int) -> None:
        """Fill what a sequence of so many tokens left in a slot with zeros."""
        width = self._width(extent)
        self._cuda.clear_rows(self.address(place), width=width, height=self._height, pitch=self._pitch, stream=stream)

    def address(self, place: int) -> int:
        """Where a slot begins."""
        return self._base + place * self.slot_bytes

    def bound_address(self, place: int) -> int:
        """Where it is bound for sequences from a slot on."""
        return self._base if self._as_a_whole else self.address(place)

    def bound_shape(self, batch: int) -> Shape:
        """The shape that it is bound in for so many sequences."""
        return (self._num_slots if self._as_a_whole else batch, *self.slot_shape)

    def exchange(self, exchange: Exchange, scratch: int, stream: int) -> None:
        """Let two slots change places, by way of `scratch`, as large as a slot, if both hold something."""
        first, second = self.address(exchange.first), self.address(exchange.second)
        if exchange.first_extent and exchange.second_extent:
            extent = max(exchange.first_extent, exchange.second_extent)
            self._copy(scratch, first, extent, stream)
            self._copy(first, second, extent, stream)
            self._copy(second, scratch, extent, stream)
        elif exchange.first_extent:
            self._copy(second, first, exchange.first_extent, stream)
            self.clear(exchange.first, exchange.first_extent, stream)
        elif exchange.second_extent:
            self._copy(first, second, exchange.second_extent, stream)
            self.clear(exchange.second, exchange.second_extent, stream)

    def _copy(self, to: int, source: int, extent: int, stream: int) -> None:
        width = self._width(extent)
        self._cuda.copy_rows(to, source, width=width, height=self._height, pitch=self._pitch, stream=stream)

    def _width(self, extent: int) -> int:
        """Bytes of so many tokens in each run; a recurrent state is one piece, whatever came into it."""
        return self._pitch if self._token_bytes is None else extent * self._token_bytes
