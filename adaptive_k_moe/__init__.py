# SPDX-License-Identifier: Apache-2.0
"""Adaptive-K mixture-of-experts inference: the router's entropy decides how many experts a token runs.

The package's root holds what every part shares: the errors, the policy schema and the engine
directory's schema. The parts are subpackages: ``engine_builder``, ``runtime``, ``plugin``, ``client``.
"""

from adaptive_k_moe.errors import AdaptiveKError

__version__ = "0.1.0"

__all__ = ["AdaptiveKError", "__version__"]
