# SPDX-License-Identifier: Apache-2.0
"""Calls as clients of TensorRT-LLM's Triton repository make them, and a reader of Triton's metrics."""

from __future__ import annotations

import queue
import re
import urllib.request
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.utils import np_to_triton_dtype

DTYPES = {
    "max_tokens": np.int32,
    "end_id": np.int32,
    "pad_id": np.int32,
    "top_k": np.int32,
    "beam_width": np.int32,
    "num_return_sequences": np.int32,
    "min_tokens": np.int32,
    "min_length": np.int32,
    "seed": np.uint64,
    "random_seed": np.uint64,
}


def tensors(prompts: list[str], **inputs: Any) -> dict[str, np.ndarray]:
    """Inputs shaped [batch, 1], or [batch, n] for lists; an array goes as it is."""
    made = {"text_input": np.array([[prompt] for prompt in prompts], dtype=object)}
    for name, value in inputs.items():
        if isinstance(value, np.ndarray):
            made[name] = value
            continue
        row = value if isinstance(value, list) else [value]
        if isinstance(row[0], str):
            dtype: Any = object
        elif isinstance(row[0], bool):
            dtype = bool
        else:
            dtype = DTYPES.get(name, np.float32)
        made[name] = np.array([row] * len(prompts), dtype)
    return made


def infer(
    url: str, inputs: dict[str, np.ndarray], *, model: str = "ensemble", request_id: str = "1", timeout: float = 60
) -> list[dict[str, np.ndarray]]:
    """All responses of one request; a refusal raises `InferenceServerException`."""
    answers: queue.Queue[Any] = queue.Queue()
    with grpcclient.InferenceServerClient(url) as client:
        client.start_stream(lambda result, error: answers.put(error if error is not None else result))
        wire = []
        for name, array in inputs.items():
            tensor = grpcclient.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array)
            wire.append(tensor)
        client.async_stream_infer(model, wire, request_id=request_id, enable_empty_final_response=True)
        responses = []
        while True:
            answer = answers.get(timeout=timeout)
            if isinstance(answer, Exception):
                raise answer
            response = answer.get_response()
            if response.outputs:
                responses.append({output.name: answer.as_numpy(output.name) for output in response.outputs})
            if response.parameters["triton_final_response"].bool_param:
                return responses


def text_of(responses: list[dict[str, np.ndarray]], batch_index: int = 0, sequence_index: int = 0) -> str:
    return "".join(
        response["text_output"].item().decode()
        for response in responses
        if response["batch_index"].item() == batch_index and response["sequence_index"].item() == sequence_index
    )


def metric(url: str, name: str, **labels: str) -> float:
    """Sum of a metric's series that have the labels; 0 if there is none."""
    with urllib.request.urlopen(f"http://{url}/metrics", timeout=60) as answer:
        page = answer.read().decode()
    total = 0.0
    for series, value in re.findall(rf"^{name}\{{(.*?)\}} (\S+)$", page, re.MULTILINE):
        present = dict(re.findall(r'(\w+)="(.*?)"', series))
        if labels.items() <= present.items():
            total += float(value)
    return total
