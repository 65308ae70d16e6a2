# SPDX-License-Identifier: Apache-2.0
"""Options of commands that open an engine: what its session computes on, and caches in."""

from __future__ import annotations

import argparse


def add_session_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``--device`` and ``--kv_cache_dtype``, in the words of `Device` and `KvCacheDtype`."""
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        help="of an engine of the target torch (default: the first GPU in CUDA_VISIBLE_DEVICES, else the CPU)",
    )
    parser.add_argument(
        "--kv_cache_dtype",
        choices=["auto", "float32", "bfloat16", "int8"],
        default="auto",
        help="of cached keys and values; auto, the default, is what the engine's attention computes in",
    )
