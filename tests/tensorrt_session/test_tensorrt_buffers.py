# SPDX-License-Identifier: Apache-2.0
"""The caches in device memory: what slots hold, and what they do not, after any moves."""

from __future__ import annotations

import numpy as np
import pytest
from fake_gpu import Gpu
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_k_moe.engine_format.tensorrt import Binding, Limits
from adaptive_k_moe.runtime.session.tensorrt.buffers import Cache, Mirror
from adaptive_k_moe.runtime.session.tensorrt.cuda import Cuda
from adaptive_k_moe.runtime.session.tensorrt.slots import SlotMap

HEADS, LENGTH, WIDTH = 2, 8, 4


def binding(name: str, *shape: int) -> Binding:
    limits = Limits((1, *shape), (4, *shape), (4, *shape))
    return Binding(name, True, "float32", ("batch", *shape), (limits, limits))


class Slots:
    """Caches of two kinds and the map over them, against arrays by block that never move."""

    def __init__(self, num_slots: int, seed: int = 0) -> None:
        self.gpu = Gpu(seed=seed)
        self.cuda = Cuda(self.gpu.cudart)
        self.stream = self.cuda.make_stream()
        self.slots = SlotMap(num_slots)
        self.keys = Cache(self.cuda, binding("past_key_values.0.key", HEADS, LENGTH, WIDTH), num_slots)
        self.state = Cache(self.cuda, binding("ssm_state.0", 3, 5), num_slots)
        self.scratch = self.cuda.allocate(self.keys.slot_bytes)
        for cache in (self.keys, self.state):
            cache.clear_all(self.stream)
        self.expected = np.zeros((num_slots, LENGTH), np.float32)
        self.states = np.zeros(num_slots, np.float32)
        self.steps = 0

    def array(self, cache: Cache, block: int) -> np.ndarray:
        self.cuda.synchronize(self.stream)
        memory = self.gpu.memory.view(cache.address(self.slots.place(block)), cache.slot_bytes)
        return memory.view(np.float32).reshape(cache.slot_shape)

    def clear(self, block: int) -> None:
        for cache in (self.keys, self.state):
            cache.clear(self.slots.place(block), self.slots.extent(block), self.stream)
        self.slots.clear(block)
        self.expected[block], self.states[block] = 0, 0

    def step(self, due: list[int]) -> None:
        """One more token in each of these blocks."""
        self.steps += 1
        for exchange in self.slots.gather(due):
            for cache in (self.keys, self.state):
                cache.exchange(exchange, self.scratch, self.stream)
        for block in due:
            position, value = self.slots.extent(block), self.steps + 100 * block
            self.expected[block, position] = self.states[block] = value
            self.array(self.keys, block)[:, position] = value
            self.array(self.state, block)[...] = value
            self.slots.fill(block, position + 1)
        for block, (tokens, state) in enumerate(zip(self.expected, self.states, strict=True)):
            found = self.array(self.keys, block)
            np.testing.assert_array_equal(found, np.broadcast_to(tokens[:, None], found.shape))
            assert (self.array(self.state, block) == state).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_slot_holds_its_own_and_zeros_behind_it_after_any_moves(data: st.DataObject) -> None:
    num_slots = data.draw(st.integers(1, 5))
    found = Slots(num_slots, seed=data.draw(st.integers(0, 99)))
    for _ in range(data.draw(st.integers(1, 15))):
        due = data.draw(st.lists(st.integers(0, num_slots - 1), unique=True))
        for block in range(num_slots):  # one that is not due begins with a longer chunk
            extent = found.slots.extent(block)
            if extent and (extent == LENGTH or data.draw(st.booleans())):
                found.clear(block)
        found.step(due)
    found.cuda.close()
    assert not found.gpu.left


def test_places_that_only_one_of_the_two_has_filled_change_sides() -> None:
    found = Slots(3)
    found.step([2])  # nothing in either
    found.step([1])  # what is in front goes back
    assert [found.slots.place(block) for block in range(3)] == [2, 0, 1]
    found.clear(1)
    found.step([2])  # what is at the back comes before a place that has been cleared
    assert [found.slots.place(block) for block in range(3)] == [2, 1, 0]


def test_a_mirror_gives_every_part_to_one_only_and_takes_all_back() -> None:
    gpu = Gpu()
    cuda = Cuda(gpu.cudart)
    stream = cuda.make_stream()
    mirror = Mirror(cuda, 1000)
    offsets = [mirror.take(size) for size in (1, 256, 257)]
    assert offsets == [0, 256, 512]
    with pytest.raises(ValueError, match="1 bytes asked for of 0"):
        mirror.take(1)
    for offset, value in zip(offsets, (1.5, 2.5, 3.5), strict=True):
        mirror.view(offset, np.float32, 3)[...] = value
    mirror.upload(stream)
    cuda.synchronize(stream)
    for offset, value in zip(offsets, (1.5, 2.5, 3.5), strict=True):
        found = gpu.memory.view(mirror.address(offset), 12).view(np.float32)
        np.testing.assert_array_equal(found, [value] * 3)
    mirror.reset()
    assert mirror.take(1024) == 0
    cuda.close()
