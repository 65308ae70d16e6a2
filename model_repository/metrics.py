# SPDX-License-Identifier: Apache-2.0
"""The engine's metrics on Triton's own metrics port. Imported inside Triton only.

What is counted, and under which names, is defined in `observability.definitions`. Triton's histograms take one
observation a call, so those of which there are thousands a second are exported as the series that a histogram
consists of. Prometheus stores the same, though the page calls them gauges: as counters, some readers would add
`_total` to their names.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import triton_python_backend_utils as pb_utils  # exists inside Triton only

from adaptive_k_moe.errors import DependencyError
from adaptive_k_moe.observability.definitions import MODEL_LABEL, Metric, format_limit
from adaptive_k_moe.observability.histogram import HistogramValue
from adaptive_k_moe.observability.recorder import Recorder, Sample

_INTERVAL_SECONDS = 1.0
# Most of a processor that the export may take; of very many series, the interval grows.
_SHARE = 0.01

_Key = tuple[str, ...]


def check_metrics_support() -> None:
    """Refuse a Triton that lacks a kind of metric.

    Raises:
        DependencyError: it is too old.
    """
    if not hasattr(pb_utils.MetricFamily, "HISTOGRAM"):
        raise DependencyError("this Triton has no histogram metrics: use release 24.10 or a newer one.")


class MetricsExporter:
    """Hands a recorder's counts to Triton, now and then, on a thread of its own, with a small share of its time.

    Args:
        model: value of the label `model`.
        recorder: keeps observations.
    """

    def __init__(self, model: str, recorder: Recorder) -> None:
        self._export = _Export(model, recorder)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="adaptive-k-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hand over what is left, and end the thread."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        pause = 0.0
        while not self._stopping.wait(pause):
            began = time.thread_time()
            _guarded(self._export.all)
            pause = max(_INTERVAL_SECONDS, (time.thread_time() - began) / _SHARE)
        _guarded(self._export.all)


class _Export:
    """The metrics of one model within Triton; one thread uses it."""

    def __init__(self, model: str, recorder: Recorder) -> None:
        self._model = model
        self._recorder = recorder
        self._news: Any = None
        # A metric lives as long as its family, so both are kept.
        self._families: dict[str, Any] = {}
        self._metrics: dict[_Key, Any] = {}
        self._values: dict[_Key, float] = {}

    def all(self) -> None:
        """Hand over what has changed since the last time."""
        news = self._recorder.news()
        if news == self._news:
            return
        for sample in self._recorder.collect():
            if isinstance(sample.value, HistogramValue):
                if sample.metric.bulk:
                    self._series_of_histogram(sample, sample.value)
            elif sample.metric.kind == "counter":
                self._raise(sample, sample.value)
            else:
                self._set(sample.metric.name, _labels(sample.metric, sample.labels), sample.value, sample.metric)
        for metric, labels, value in self._recorder.take_observations():
            self._metric(metric.name, _labels(metric, labels), metric).observe(value)
        self._news = news

    def _series_of_histogram(self, sample: Sample, value: HistogramValue) -> None:
        metric, labels = sample.metric, _labels(sample.metric, sample.labels)
        if self._values.get((f"{metric.name}_count", *labels.values())) == value.count:
            return
        for limit, count in value.cumulative():
            self._set(f"{metric.name}_bucket", {**labels, "le": format_limit(limit)}, count, metric)
        self._set(f"{metric.name}_sum", labels, value.sum, metric)
        self._set(f"{metric.name}_count", labels, value.count, metric)

    def _raise(self, sample: Sample, value: float) -> None:
        """Have a counter show this value, which is never less than the last."""
        key = (sample.metric.name, *sample.labels)
        counter = self._metric(sample.metric.name, _labels(sample.metric, sample.labels), sample.metric)
        if (grown := value - self._values.get(key, 0)) > 0:
            counter.increment(grown)
            self._values[key] = value

    def _set(self, series: str, labels: dict[str, str], value: float, metric: Metric) -> None:
        key = (series, *labels.values())
        if self._values.get(key) != value:
            self._metric(series, labels, metric).set(value)
            self._values[key] = value

    def _metric(self, series: str, labels: dict[str, str], metric: Metric) -> Any:
        key = (series, *labels.values())
        if key not in self._metrics:
            kinds = pb_utils.MetricFamily
            native = metric.kind == "histogram" and not metric.bulk
            if series not in self._families:
                kind = kinds.HISTOGRAM if native else kinds.COUNTER if metric.kind == "counter" else kinds.GAUGE
                self._families[series] = kinds(name=series, description=metric.help, kind=kind)
            options = {"buckets": list(metric.buckets)} if native else {}
            self._metrics[key] = self._families[series].Metric(labels={MODEL_LABEL: self._model, **labels}, **options)
        return self._metrics[key]


def _labels(metric: Metric, values: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(metric.labels, values, strict=True))


def _guarded(function: Callable[[], None]) -> None:
    try:
        function()
    except Exception as error:  # metrics are not worth a server
        pb_utils.Logger.log_error(f"the metrics could not be handed over: {error}")
