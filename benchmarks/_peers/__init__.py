# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks/peers.py` compares: the checkpoints, each stack's preparation and the process that runs it.

A stack's ``serve_*.py`` runs in the stack's own environment, so it imports nothing of this project but
``worker.py``, which needs only the standard library.
"""
