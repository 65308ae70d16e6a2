# SPDX-License-Identifier: Apache-2.0
"""The errors that a user can cause, but for calibration's own: a sentence each, what is wrong, where, what to do."""

from __future__ import annotations


class AdaptiveKError(Exception):
    """Base of all errors raised on purpose; the command line prints it without a traceback."""


class DependencyError(AdaptiveKError):
    """A package or program that an extra brings is not installed."""


class PolicyError(AdaptiveKError):
    """A policy file, a policy's name or its values are unusable."""


class CheckpointError(AdaptiveKError):
    """A Hugging Face checkpoint is missing something, is damaged, or is of an unknown kind."""


class BuildError(AdaptiveKError):
    """A checkpoint is readable but cannot be built as asked (target, dtype, sizes)."""


class EngineError(AdaptiveKError):
    """An engine directory is missing, incomplete, altered, or of another version."""


class DeviceError(AdaptiveKError):
    """A GPU is missing, or failed a call; what the call was for has ended, and the server goes on if the GPU does."""


class DeviceMemoryError(DeviceError):
    """A GPU has no memory left for what was asked."""


class RequestError(AdaptiveKError):
    """A generation request asks for something impossible; the engine goes on serving others."""


class ServerError(AdaptiveKError):
    """The server cannot start, or stopped on its own."""


class ClientError(AdaptiveKError):
    """A server cannot be reached, refused the request, or broke off an answer."""


class ExperimentError(AdaptiveKError):
    """An A/B test cannot be started, read, recorded or stopped."""
