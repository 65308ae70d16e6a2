# SPDX-License-Identifier: Apache-2.0
"""Where sequences lie, and how a step becomes executions: without a device."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_k_moe.runtime.session.tensorrt.slots import SlotMap

LENGTH = 8


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_sequences_keep_what_they_have_and_nothing_of_others_wherever_they_are_moved(data: st.DataObject) -> None:
    """Each place is a list of tokens; an exchange copies as many as it says, by way of a scratch list."""
    num_slots = data.draw(st.integers(1, 6))
    slots = SlotMap(num_slots)
    places: list[list[str | None]] = [[None] * LENGTH for _ in range(num_slots)]
    held: dict[int, list[str]] = {block: [] for block in range(num_slots)}
    for step in range(data.draw(st.integers(1, 20))):
        due = data.draw(st.lists(st.integers(0, num_slots - 1), unique=True))
        for block in range(num_slots):
            if data.draw(st.booleans()) or len(held[block]) == LENGTH:
                held[block] = []  # a new sequence has the block
                places[slots.place(block)][: slots.extent(block)] = [None] * slots.extent(block)
                slots.clear(block)
        exchanges = slots.gather(due)
        for first, second, first_extent, second_extent in exchanges:
            extent = max(first_extent, second_extent)
            scratch = places[first][:extent]
            places[first][:extent] = places[second][:extent]
            places[second][:extent] = scratch
        assert sorted(slots.place(block) for block in due) == list(range(len(due)))
        assert len(exchanges) <= min(len(due), num_slots - len(due))
        assert not slots.gather(due)
        for block in due:
            token = f"{block} in step {step}"
            places[slots.place(block)][len(held[block])] = token
            held[block].append(token)
            slots.fill(block, len(held[block]))
        for block, tokens in held.items():
            assert places[slots.place(block)] == tokens + [None] * (LENGTH - len(tokens))
    assert sorted(slots.place(block) for block in range(num_slots)) == list(range(num_slots))
