# SPDX-License-Identifier: Apache-2.0
"""The caches in device memory: what slots hold, and what they do not, after any moves."""

from __future__ import annotations

import numpy as np
import pytest
from fake_gpu import Gpu
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_k_moe.runtime.session.tensorrt.buffers import Cache, Mirror
from adaptive_k_moe.runtime.session.tensorrt.cuda import Cuda
from adaptive_k_moe.runtime.session.tensorrt.slots import SlotMap
from adaptive_k_moe.tensorrt_bindings import Binding, Limits

HEADS, LENGTH, WIDTH = 2, 8, 4


def binding(name: str, *shape: int) -> Binding:
    limits = Limits((1, *shape), (4, *shape), (4, *shape))
    return Binding(name, True, "float32", ("batch", *shape), (limits, limits))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_slot_holds_its_own_and_zeros_behind_it_after_any_moves(data: st.DataObject) -> None:
    gpu = Gpu(seed=data.draw(st.integers(0, 99)))
    cuda, num_slots = Cuda(gpu.cudart), data.draw(st.integers(1, 5))
    stream, slots = cuda.make_stream(), SlotMap(num_slots)
    keys = Cache(cuda, binding("past_key_values.0.key", HEADS, LENGTH, WIDTH), num_slots)
    state = Cache(cuda, binding("ssm_state.0", 3, 5), num_slots)
    scratch = cuda.allocate(keys.slot_bytes)

    def array(cache: Cache, place: int) -> np.ndarray:
        cuda.synchronize(stream)
        memory = gpu.memory.view(cache.address(place), cache.slot_bytes)
        return memory.view(np.float32).reshape(cache.slot_shape)

    for cache in (keys, state):
        cache.clear_all(stream)
    expected = np.zeros((num_slots, LENGTH), np.float32)  # by block
    states = np.zeros(num_slots, np.float32)
    for step in range(1, data.draw(st.integers(1, 15)) + 1):
        due = data.draw(st.lists(st.integers(0, num_slots - 1), unique=True))
        for block in due:
            if slots.extent(block) and (data.draw(st.booleans()) or slots.extent(block) == LENGTH):
                for cache in (keys, state):
                    cache.clear(slots.place(block), slots.extent(block), stream)
                slots.clear(block)
                expected[block], states[block] = 0, 0
        for exchange in slots.gather(due):
            for cache in (keys, state):
                cache.exchange(exchange, scratch, stream)
        for block in due:
            position = slots.extent(block)
            expected[block, position] = states[block] = step + 100 * block
            array(keys, slots.place(block))[:, position] = expected[block, position]
            array(state, slots.place(block))[...] = states[block]
            slots.fill(block, position + 1)
        for block in range(num_slots):
            found = array(keys, slots.place(block))
            np.testing.assert_array_equal(found, np.broadcast_to(expected[block][:, None], found.shape))
            assert (array(state, slots.place(block)) == states[block]).all()
    cuda.close()
    assert not gpu.left


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
