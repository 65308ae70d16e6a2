# SPDX-License-Identifier: Apache-2.0
"""The subcommands of `adaptive-k` that look at what an engine does."""
