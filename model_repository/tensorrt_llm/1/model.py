# SPDX-License-Identifier: Apache-2.0
"""Entry point that Triton's Python backend loads; the model is in the installed package."""

from adaptive_k_moe.model_repository.alias_model import AliasModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
