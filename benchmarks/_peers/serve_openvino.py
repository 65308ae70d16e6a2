# SPDX-License-Identifier: Apache-2.0
"""OpenVINO's own CPU plugin on optimum-intel's export, with nothing of this project.

The head is computed for the last token of a prompt only, as OpenVINO GenAI does.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from worker import serve


def keep_last_logits(model: ov.Model) -> None:
    """Put a slice of the last position in front of the head's product."""
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    hidden = node.input_value(0)
    last = ops.slice(hidden, [-1], [np.iinfo(np.int64).max], [1], [1])
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


class OpenVINO:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.vocab_size = settings["vocab_size"]
        core = ov.Core()
        model = core.read_model(f"{settings['model']}/openvino_model.xml")
        keep_last_logits(model)
        compiled = core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": settings["threads"],
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": settings["precision"],
            },
        )
        self.request = compiled.create_infer_request()
        self.inputs = {port.get_any_name() for port in compiled.inputs}
        self.rng = np.random.default_rng(0)

    def step(self, batch: int, tokens: int, past: int) -> None:
        given = {
            "input_ids": self.rng.integers(3, self.vocab_size, (batch, tokens)),
            "attention_mask": np.ones((batch, past + tokens), np.int64),
            "position_ids": np.tile(np.arange(past, past + tokens), (batch, 1)),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        self.request.infer({name: value for name, value in given.items() if name in self.inputs}, share_inputs=True)
        self.request.get_tensor("logits").data[:, -1].argmax(-1)

    def prefill(self, tokens: int) -> float:
        self.request.reset_state()
        start = time.perf_counter()
        self.step(1, tokens, 0)
        return tokens / (time.perf_counter() - start)

    def decode(self, batch: int, prompt: int, tokens: int) -> float:
        self.request.reset_state()
        self.step(batch, prompt, 0)
        start = time.perf_counter()
        for index in range(tokens):
            self.step(batch, 1, prompt + index)
        return batch * tokens / (time.perf_counter() - start)


serve(lambda settings: (OpenVINO(settings), {"openvino": ov.__version__}))
