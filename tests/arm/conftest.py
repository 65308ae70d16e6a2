# SPDX-License-Identifier: Apache-2.0
"""Which of the operators' tests are run under the emulator, at a twentieth of a processor's speed."""

from __future__ import annotations

import re

import pytest

# Those that are minutes of arithmetic there, or ask other libraries about this machine's processor.
LEFT_TO_OTHERS = (
    r"1096-1500|beyond_the_cache|bits_of_the_float32|several_threads|transformers|openvino|every_instruction_set"
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if "test_arm_kernels" in item.nodeid]
    left = [item for item in here if re.search(LEFT_TO_OTHERS, item.nodeid)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]
