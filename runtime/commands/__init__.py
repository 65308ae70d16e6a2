# SPDX-License-Identifier: Apache-2.0
"""The runtime's subcommands: ``adaptive-k generate`` and ``adaptive-k perplexity``."""
