# SPDX-License-Identifier: Apache-2.0
"""What a served model writes down of its requests: metrics, a log, spans. Imported inside Triton only."""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import triton_python_backend_utils as pb_utils  # exists inside Triton only

from adaptive_k_moe.model_repository.metrics import MetricsExporter, check_metrics_support
from adaptive_k_moe.model_repository.observation_options import STANDARD_OUTPUT, ObservationOptions
from adaptive_k_moe.observability.logs import SampleFilter, file_handler, get_logger
from adaptive_k_moe.observability.recorder import Recorder
from adaptive_k_moe.observability.request_records import RequestRecords, Sink
from adaptive_k_moe.runtime.telemetry import Refusal

if TYPE_CHECKING:
    from adaptive_k_moe.model_repository.requests import GenerationRequest
    from adaptive_k_moe.observability.ab_test.service import ABService
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
        self._ab_db = options.ab_db
        self._ab_test: ABService | None = None

    def watch(self, llm: LLM) -> None:
        """Observe an engine from now on."""
        self._recorder = Recorder.of(llm, keep_observations=True)
        llm.add_observer(self._recorder)
        if self._records is not None:
            llm.add_observer(self._records)
            records = self._records
            self._recorder.records_dropped = lambda: records.num_dropped
        self._exporter = MetricsExporter(self._model, self._recorder)
        if self._ab_db is not None:
            from adaptive_k_moe.observability.ab_test.service import ABService

            log = pb_utils.Logger
            self._ab_test = ABService(llm, self._ab_db, log=log.log_info, log_error=log.log_error)

    def enroll(self, request_id: str, prompts: Sequence[GenerationRequest]) -> list[GenerationRequest]:
        """The prompts of a request with their places in the A/B test that is running, if one is."""
        if self._ab_test is None:
            return list(prompts)
        # A request without any name is one of its own.
        name = request_id or uuid.uuid4().hex
        enrolled = []
        for prompt in prompts:
            params, enrollment = self._ab_test.enroll(prompt.sampling_params, prompt.user or name)
            enrolled.append(replace(prompt, sampling_params=params, enrollment=enrollment))
        return enrolled

    def refused(self, refusal: Refusal) -> None:
        """A request did not reach the engine, or the server failed it on its way back."""
        self._recorder.on_request_refused(refusal)
        if self._records is not None:
            self._records.on_request_refused(refusal)

    def close(self) -> None:
        """Write down what is left, within limits; no request is running."""
        if self._ab_test is not None:
            self._ab_test.close()
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
