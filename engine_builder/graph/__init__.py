# SPDX-License-Identifier: Apache-2.0
"""The ONNX graph: nodes in memory, weights streamed to external data, the operator's function body."""

from adaptive_k_moe.engine_builder.graph.graph_builder import GraphBuilder
from adaptive_k_moe.engine_builder.graph.mamba_function import keep_states_in_place, make_mamba_function
from adaptive_k_moe.engine_builder.graph.moe_function import DOMAIN, make_moe_function

__all__ = ["DOMAIN", "GraphBuilder", "keep_states_in_place", "make_mamba_function", "make_moe_function"]
