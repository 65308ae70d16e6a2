# SPDX-License-Identifier: Apache-2.0
"""How many tokens each expert has run for: counted by the operator itself, in place, where a target can."""

from __future__ import annotations

import threading
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

_OPERATOR = "AdaptiveKMoe"


@runtime_checkable
class CountsExperts(Protocol):
    """A session that knows its experts' load."""

    def expert_load(self) -> npt.NDArray[np.int64]:
        """[L, E] tokens that each expert has run for since the session was opened; from any thread."""


def moe_operators(graph: Any) -> list[Any]:
    """The nodes of an OpenVINO graph's MoE layers, in order."""
    return [node for node in graph.get_ordered_ops() if node.get_type_name() == _OPERATOR]


class ExpertLoad:
    """The counters of an OpenVINO graph's experts. Graphs need not be built for it.

    Args:
        graph: not compiled yet; each operator gets an input of the name `expert_load.LAYER`.
        num_experts: E.
    """

    def __init__(self, graph: Any, num_experts: int) -> None:
        import openvino
        from openvino import opset13

        operators = moe_operators(graph)
        names = [f"expert_load.{layer}" for layer in range(len(operators))]
        parameters = []
        for node, name in zip(operators, names, strict=True):
            parameter = opset13.parameter([num_experts], np.int32, name=name)
            parameter.output(0).get_tensor().set_names({name})
            node.set_attribute("has_expert_load", 1)
            node.set_arguments([*node.input_values(), parameter.output(0)])
            parameters.append(parameter)
        graph.add_parameters(parameters)
        graph.validate_nodes_and_infer_types()
        # The operator adds modulo 2^32; what was read is added up here.
        self._counters = np.zeros((len(operators), num_experts), np.uint32)
        self._seen = self._counters.copy()
        self._before = self._counters.copy()
        self._ran = np.empty(self._counters.shape, np.bool_)
        self._lock = threading.Lock()
        self._totals = np.zeros(self._counters.shape, np.int64)
        signed = self._counters.view(np.int32)
        self.tensors = {name: openvino.Tensor(signed[layer], shared_memory=True) for layer, name in enumerate(names)}

    def reads_of_step(self) -> npt.NDArray[np.int32]:
        """[L] experts that ran for some token since the last call; for the thread that runs the steps."""
        # Once a step: without temporaries, which would cost as much as the rest of a small model's bookkeeping.
        np.not_equal(self._counters, self._before, out=self._ran)
        reads: npt.NDArray[np.int32] = np.add.reduce(self._ran, axis=1, dtype=np.int32)
        self._before[...] = self._counters
        return reads

    def read(self) -> npt.NDArray[np.int64]:
        """[L, E] tokens so far. To be called before an expert has run for 2^32 tokens since the last time."""
        with self._lock:
            now = self._counters.copy()
            self._totals += now - self._seen  # modulo 2^32, too
            self._seen = now
            return self._totals.copy()
