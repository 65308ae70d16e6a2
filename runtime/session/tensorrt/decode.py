# SPDX-License-Identifier: Apache-2.0
"""Decode executions, as CUDA graphs where a number of sequences comes again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adaptive_k_moe.engine_format.tensorrt import Shape
from adaptive_k_moe.errors import DeviceError
from adaptive_k_moe.runtime.session.tensorrt.cuda import Cuda
from adaptive_k_moe.runtime.session.tensorrt.engine import Context, TrtEngine
from adaptive_k_moe.runtime.session.tensorrt.plan import DECODE
from adaptive_k_moe.runtime.telemetry import logger


@dataclass
class _Own:
    """What decodes one number of sequences alone: its context, and the graph once it is captured."""

    context: Context
    graph: int | None = None


class DecodeRunner:
    """Runs decode for any number of sequences.

    The first time that a number comes, it runs on a context that all numbers share; the second time on a context of
    its own, which warms TensorRT up; the third time that is captured, and then the graph is launched. A context must
    not be changed once it is captured, so a number's shapes and addresses have to be the same each time. Where there is
    no room for another context, or TensorRT cannot be captured, the numbers without a graph go on without.

    Args:
        engine: the engine.
        cuda: the device.
        stream: what everything runs on.

    Raises:
        DeviceError: there is no room for the shared context.
    """

    def __init__(self, engine: TrtEngine, cuda: Cuda, stream: int) -> None:
        self._engine = engine
        self._cuda = cuda
        self._stream = stream
        self._shared = engine.create_context(DECODE, stream)
        self._seen: set[int] = set()
        self._own: dict[int, _Own] = {}
        self._make_graphs = True

    def run(self, batch: int, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        """Decode `batch` sequences.

        Raises:
            DeviceError: TensorRT or the device fails.
        """
        own = self._own.get(batch)
        if own is None and batch in self._seen and self._make_graphs:
            own = self._create(batch, shapes, addresses)
        elif own is not None and own.graph is None and self._make_graphs:
            own.graph = self._capture(own.context)
        self._seen.add(batch)
        if own is None:
            self._shared.bind(shapes, addresses)
            self._shared.enqueue(self._stream)
        elif own.graph is None:
            own.context.enqueue(self._stream)
        else:
            self._cuda.launch(own.graph, self._stream)

    def _create(self, batch: int, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> _Own | None:
        try:
            own = _Own(self._engine.create_context(DECODE, self._stream))
            own.context.bind(shapes, addresses)
        except DeviceError as error:
            self._give_up(error)  # or every step would leave a context behind
            return None
        self._own[batch] = own
        return own

    def _capture(self, context: Context) -> int | None:
        try:
            self._cuda.begin_capture(self._stream)
            try:
                context.enqueue(self._stream)
            finally:
                graph = self._cuda.end_capture(self._stream)
        except DeviceError as error:
            self._give_up(error)
            return None
        return graph

    def _give_up(self, error: DeviceError) -> None:
        self._make_graphs = False
        logger.warning("decode of further batch sizes runs without CUDA graphs: %s", error)
