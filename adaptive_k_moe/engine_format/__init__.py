# SPDX-License-Identifier: Apache-2.0
"""What builder and runtime agree on about an engine's own file, by target; its ``config.json`` is `engine_config`."""
