# SPDX-License-Identifier: Apache-2.0
"""Subcommands of ``adaptive-k`` about engines: build, inspect, policy."""
