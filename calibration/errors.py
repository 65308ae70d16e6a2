# SPDX-License-Identifier: Apache-2.0
"""The error that calibration, validation and evaluation raise on purpose."""

from __future__ import annotations

from adaptive_k_moe.errors import AdaptiveKError


class CalibrationError(AdaptiveKError):
    """A text, a budget or a rule cannot be used; the message is one sentence that says why."""
