# SPDX-License-Identifier: Apache-2.0
"""kill -9 in the midst of writing, again and again, with two processes on one file: nothing acknowledged is lost."""

from __future__ import annotations

import contextlib
import math
import random
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from adaptive_k_moe.observability.ab_test import Experiment, Variant
from adaptive_k_moe.observability.ab_test.store import Store

WRITER = Path(__file__).with_name("ab_writer.py")
ROUNDS, WRITERS = 13, 4  # 52 kills


def test_nothing_acknowledged_is_lost_by_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "ab.db"
    with Store(path) as store:
        store.start(Experiment("e", (Variant("control", "full"), Variant("less", "top1", 2.0))))
    generator = random.Random(11)
    acknowledged: list[str] = []
    for attempt in range(ROUNDS):
        writers = [
            subprocess.Popen(
                [sys.executable, WRITER, path, f"{attempt}-{number}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,  # a line read ahead would be lost to `communicate`
            )
            for number in range(WRITERS)
        ]
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n", writer.communicate()[1].decode()
        generator.shuffle(writers)
        for writer in writers:
            time.sleep(generator.uniform(0, 0.05))
            writer.kill()
        for writer in writers:
            said, complained = writer.communicate(timeout=60)
            assert complained == b"" and writer.returncode == -9
            # A line that was cut off says nothing.
            acknowledged += said.decode().split("\n")[:-1]
    assert len(acknowledged) > 500

    connection = sqlite3.connect(path)
    with contextlib.closing(connection):
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        written = {
            identity: values
            for identity, *values in connection.execute(
                "SELECT request_id, name, latency, answer_logprob FROM requests JOIN variants ON variants.id = variant"
            )
        }
    assert not set(acknowledged) - written.keys()
    assert len(acknowledged) == len(set(acknowledged))
    # Requests, scores and sums are of one transaction: all say the same.
    with Store(path) as store:
        stored = store.read()
    for variant in ("control", "less"):
        chosen = [values for values in written.values() if values[0] == variant]
        assert all(values[2] == -1.5 for values in chosen)
        logarithms = np.array([math.log(values[1]) for values in chosen])
        latency, quality = stored.sums[variant]["latency"], stored.sums[variant]["quality"]
        assert stored.num_requests[variant] == latency.count == quality.count == len(chosen)
        assert latency.mean == pytest.approx(logarithms.mean())
        assert latency.squares == pytest.approx(((logarithms - logarithms.mean()) ** 2).sum())
