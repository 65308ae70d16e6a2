# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests: the bundled model's checkpoint and its engine, built once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Peers and engines share two cores; more threads than cores make everything slower.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from checkpoints import MIXTRAL_SMALL, REPOSITORY

POLICIES = {
    "unit": "nats",
    "default": "full",
    "policies": {
        "balanced": {"kind": "entropy", "thresholds": [1.2], "k": [1, 2]},
        "top1": {"kind": "fixed", "k": 1},
        "mass": {"kind": "top_p", "p": 0.6, "k_min": 1},
        "relative": {"kind": "ratio", "ratio": 0.5},
    },
}


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def checkpoint_dir() -> Path:
    """The bundled trained Mixtral."""
    return MIXTRAL_SMALL


@pytest.fixture(scope="session")
def engine_dir(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of the bundled model with one policy of each kind; tests must not change it."""
    from adaptive_k_moe.engine_builder import build
    from adaptive_k_moe.policy import PolicySet

    directory = tmp_path_factory.mktemp("engines") / "mixtral-small"
    policies = PolicySet.model_validate(POLICIES)
    build(checkpoint_dir, directory, policy=policies, max_batch_size=16, max_seq_len=512, dtype="float32")
    return directory
