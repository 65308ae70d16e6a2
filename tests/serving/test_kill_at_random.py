# SPDX-License-Identifier: Apache-2.0
"""Whatever ends the commands, at whatever moment, leaves nothing: a short run of `kill_at_random.py`."""

from __future__ import annotations

from pathlib import Path

from kill_at_random import ENDS, WAYS, kill_many


def test_nothing_is_left_by_serve_the_demo_and_the_playground(engine_dir: Path) -> None:
    killed = list(kill_many(len(WAYS) * len(ENDS), seed=13, engine_dir=engine_dir))
    assert {(each.way, each.end) for each in killed} == {(way, end) for way in WAYS for end in ENDS}
    assert [each for each in killed if each.left or each.status is None] == []
