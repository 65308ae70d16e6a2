# SPDX-License-Identifier: Apache-2.0
"""Which variant a request belongs to: a hash decides, so every replica and every restart says the same."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Sequence


def hash64(*parts: str) -> int:
    """64 bits of a hash of some texts; the same everywhere and always."""
    content = b"".join(
        len(part).to_bytes(8, "big") + part for part in (text.encode(errors="replace") for text in parts)
    )
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def fraction(*parts: str) -> float:
    """A number in [0, 1), uniform over texts; the same everywhere and always."""
    return (hash64(*parts) >> 11) / (1 << 53)


class Assigner:
    """Assigns units to variants in proportion to their weights.

    Args:
        salt: an experiment's own word: the units of one experiment's variant are spread over all variants of
            another.
        weights: of the variants, each above 0.
    """

    def __init__(self, salt: str, weights: Sequence[float]) -> None:
        self._salt = salt
        total = sum(weights)
        self._limits = [partial / total for partial in itertools.accumulate(weights)]

    def assign(self, unit: str) -> int:
        """Index of the variant of a unit: of a request's id, or a user's."""
        # The last limit may have been rounded to a little less than 1.
        return min(bisect.bisect_right(self._limits, fraction(self._salt, unit)), len(self._limits) - 1)
