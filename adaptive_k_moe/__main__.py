# SPDX-License-Identifier: Apache-2.0
"""``python -m adaptive_k_moe`` is the ``adaptive-k`` command."""

import sys

from adaptive_k_moe.cli import main

if __name__ == "__main__":
    sys.exit(main())
