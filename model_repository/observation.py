# SPDX-License-Identifier: Apache-2.0
"""What a served model writes down of its requests: metrics, a log, spans. Imported inside Triton only."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from adaptive_k_moe.model_repository.metrics import MetricsExporter, check_metrics_support
from adaptive_k_moe.model_repository.observation_options import STANDARD_OUTPUT, ObservationOptions
from adaptive_k_moe.observability.logs import SampleFilter, file_handler, get_logger
from adaptive_k_moe.observability.recorder import Recorder
from adaptive_k_moe.observability.request_records import RequestRecords, Sink
from adaptive_k_moe.runtime.telemetry import Refusal

if TYPE_CHECKING:
    from adaptive_k_moe.observability.spans import RequestSpans
    from adaptive_k_moe.runtime import LLM

_CLOSE_SECONDS = 5.0


class Observation:
    """Everything that watches one engine.

    Args:
        options: what to write down.
        model: the served model's name.

    Raises:
        ServerError: the log cannot be written, or the OTLP endpoint is no address.
        DependencyError: a package is missing, or Triton is too old.
    """

    def __init__(self, options: ObservationOptions, model: str) -> None:
        check_metrics_support()
        self._model = model
        self._spans: RequestSpans | None = None
        self._handler: logging.Handler | None = None
        sinks: list[Sink] = []
        if options.request_log is not None:
            sinks.append(self._open_log(options))
        if options.otlp_endpoint is not None:
            from adaptive_k_moe.observability.spans import RequestSpans

            self._spans = RequestSpans.to_otlp(options.otlp_endpoint, model)
            sinks.append(self._spans.export)
        self._records = RequestRecords(sinks) if sinks else None

    def watch(self, llm: LLM) -> None:
        """Observe an engine from now on."""
        self._recorder = Recorder.of(llm, keep_observations=True)
        llm.add_observer(self._recorder)
        if self._records is not None:
            llm.add_observer(self._records)
            records = self._records
            self._recorder.records_dropped = lambda: records.num_dropped
        self._exporter = MetricsExporter(self._model, self._recorder)

    def refused(self, refusal: Refusal) -> None:
        """A request did not reach the engine, or the server failed it on its way back."""
        self._recorder.on_request_refused(refusal)
        if self._records is not None:
            self._records.on_request_refused(refusal)

    def close(self) -> None:
        """Write down what is left, within limits; no request is running."""
        self._exporter.close()
        if self._records is not None:
            self._records.close(_CLOSE_SECONDS)
        if self._spans is not None:
            self._spans.close()
        if self._handler is not None:
            self._handler.close()

    def _open_log(self, options: ObservationOptions) -> Sink:
        logger = get_logger("inference", with_text=options.log_prompts)
        if options.request_log == STANDARD_OUTPUT:
            self._handler = logging.StreamHandler(sys.stdout)
        else:
            assert options.request_log is not None
            self._handler = file_handler(options.request_log, max_bytes=options.max_bytes)
        if options.sample < 1.0:
            self._handler.addFilter(SampleFilter(options.sample))
        logger.logger.addHandler(self._handler)
        logger.logger.propagate = False
        return logger.log_inference
