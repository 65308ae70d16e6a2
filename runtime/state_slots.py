# SPDX-License-Identifier: Apache-2.0
"""Who owns which slot of the recurrent states."""

from __future__ import annotations


class StateSlots:
    """Hands out the places of the states that a model's recurrent layers keep for each sequence.

    A slot is a sequence's in all layers at once. What a former owner left there needs no clearing: a
    sequence with no past starts from zero states.

    Args:
        num_slots: slots that exist; their ids are 0 to num_slots - 1. 0 for a model without such layers.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Slots that nobody owns."""
        return len(self._free)

    @property
    def available(self) -> bool:
        """Whether a sequence can have what it needs: a free slot, or none at all."""
        return self.num_slots == 0 or bool(self._free)

    def acquire(self) -> int | None:
        """A slot, the one given back last if there is one: its memory is warm. None where no slots exist.

        Only when `available`.
        """
        return self._free.pop() if self.num_slots else None

    def release(self, slot: int | None) -> None:
        """Take back a slot."""
        if slot is not None:
            self._free.append(slot)
