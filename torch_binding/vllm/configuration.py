# SPDX-License-Identifier: Apache-2.0
"""What the user says: a policy file, in the environment, which every process of vLLM inherits."""

from __future__ import annotations

import functools
import os

from adaptive_k_moe.errors import PolicyError
from adaptive_k_moe.policy import FULL, PolicySet, read_policy_file

VARIABLE = "ADAPTIVE_K_POLICY"
REQUEST_FIELD = "adaptive_k_policy"
PROCESSOR = "adaptive_k_moe.vllm.requests:RequestPolicy"


def is_asked_for() -> bool:
    """Whether vLLM is to follow policies."""
    return bool(os.environ.get(VARIABLE))


def server_policies() -> PolicySet:
    """The policies of this server.

    Raises:
        PolicyError: no file is named, or it is missing or wrong.
    """
    if not is_asked_for():
        raise PolicyError(f"{VARIABLE} names no policy file: set it before vLLM starts.")
    return _read(os.environ[VARIABLE])


@functools.lru_cache(maxsize=8)
def _read(path: str) -> PolicySet:
    return read_policy_file(path)


def policy_names(policies: PolicySet) -> list[str]:
    """All names that a request may give, in the order of the tables."""
    return list(dict.fromkeys([FULL, *policies.policies]))
