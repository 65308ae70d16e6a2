# SPDX-License-Identifier: Apache-2.0
"""Writes requests and scores to a database until it is killed, and prints each as soon as it is acknowledged."""

from __future__ import annotations

import itertools
import os
import random
import sys

from adaptive_k_moe.observability.ab_test.records import RequestRecord, ScoreRecord
from adaptive_k_moe.observability.ab_test.store import Store

path, name = sys.argv[1:]
store = Store(path, create=False)
running = store.running()
assert running is not None
assigner = running.assigner()
generator = random.Random(name)
numbers = itertools.count()
os.write(1, b"ready\n")
while True:
    batch: list[RequestRecord | ScoreRecord] = []
    identities = [f"{name}-{next(numbers)}" for _ in range(generator.randint(1, 20))]
    for identity in identities:
        variant = running.variants[assigner.assign(identity)].name
        batch.append(
            RequestRecord(
                experiment=running.name,
                variant=variant,
                unit=identity,
                request_id=identity,
                outcome="stop",
                latency_seconds=generator.lognormvariate(0, 1),
                num_tokens=4,
                avg_k=1.5,
            )
        )
        batch.append(ScoreRecord(identity, -1.5, -1.0, -1.2, 0.9))
    store.record(batch)
    os.write(1, "".join(f"{identity}\n" for identity in identities).encode())
