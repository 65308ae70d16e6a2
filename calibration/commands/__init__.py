# SPDX-License-Identifier: Apache-2.0
"""The subcommands of ``adaptive-k`` that belong to calibration."""
