# SPDX-License-Identifier: Apache-2.0
"""The metrics of this process's engines for Prometheus, by an HTTP server of their own.

Example::

    from adaptive_k_moe.observability import metrics

    metrics.start_http_server(9090)

Every `LLM` of the process is counted from then on, those that are opened later too. `definitions.METRICS` says what
there is; a Triton server exports the same on its own metrics port.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from adaptive_k_moe.errors import DependencyError, ServerError
from adaptive_k_moe.observability.definitions import MODEL_LABEL, Metric, format_limit
from adaptive_k_moe.observability.histogram import HistogramValue
from adaptive_k_moe.observability.recorder import Recorder, Sample

if TYPE_CHECKING:
    from adaptive_k_moe.runtime import LLM


class MetricsServer:
    """A running HTTP server with the metrics at `/metrics`; a context manager that closes it.

    Attributes:
        port: where it listens.
    """

    def __init__(self, server: Any, thread: threading.Thread) -> None:
        self._server = server
        self._thread = thread
        self.port: int = server.server_port

    def close(self) -> None:
        """Stop listening; counting goes on."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Collector:
    """A `prometheus_client` collector of any number of engines."""

    def __init__(self) -> None:
        self._recorders: dict[str, tuple[weakref.ref[LLM], Recorder]] = {}
        self._lock = threading.Lock()

    def observe(self, llm: LLM, model: str | None = None) -> None:
        """Count an `LLM`, until it is collected; one that is counted already stays as it is.

        Args:
            llm: it is not kept alive.
            model: value of the label `model`; None is the architecture's name, with a number if it is taken.
        """
        with self._lock:
            self._forget_dead()
            if any(reference() is llm for reference, _ in self._recorders.values()):
                return
            recorder = Recorder.of(llm)
            stem = model or llm.config.pretrained_config.architecture
            name = next(name for name in _numbered(stem) if name not in self._recorders)
            self._recorders[name] = (weakref.ref(llm), recorder)
        llm.add_observer(recorder)

    def collect(self) -> Iterator[Any]:
        """The metric families, as `prometheus_client` wants them."""
        with self._lock:
            self._forget_dead()
            recorders = [(name, recorder) for name, (_, recorder) in self._recorders.items()]
        families: dict[str, Any] = {}
        for name, recorder in recorders:
            for sample in recorder.collect():
                if sample.metric.name not in families:
                    families[sample.metric.name] = _family(sample.metric)
                _add(families[sample.metric.name], name, sample)
        return iter(families.values())

    def describe(self) -> Iterable[Any]:
        """Nothing: what there is depends on the engines."""
        return []

    def _forget_dead(self) -> None:
        for name in [name for name, (reference, _) in self._recorders.items() if reference() is None]:
            del self._recorders[name]


def start_http_server(port: int = 9090, addr: str = "127.0.0.1", registry: Any = None) -> MetricsServer:
    """Count every `LLM` of this process and serve the counts to Prometheus, in the background.

    Args:
        port: 0 picks a free one.
        addr: address to listen on; "0.0.0.0" lets other machines in.
        registry: a `prometheus_client.CollectorRegistry`; None is that library's own, which has the process's
            memory and processor time, too.

    Raises:
        DependencyError: `prometheus_client` is not installed.
        ServerError: the port cannot be used.
    """
    try:
        import prometheus_client
    except ModuleNotFoundError:
        raise DependencyError(
            "metrics need the package 'prometheus_client': pip install 'adaptive-k-moe[observability]'."
        ) from None
    collector(prometheus_client.REGISTRY if registry is None else registry)
    try:
        server, thread = prometheus_client.start_http_server(
            port, addr, prometheus_client.REGISTRY if registry is None else registry
        )
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ServerError(f"the metrics port {port} of {addr} cannot be used ({reason}): choose another.") from None
    return MetricsServer(server, thread)


def collector(registry: Any) -> Collector:
    """The collector of all `LLM`s in a registry, made and registered at the first call."""
    from adaptive_k_moe.runtime.llm import watch_llms

    with _collectors_lock:
        if registry in _collectors:
            return _collectors[registry]
        made = _collectors[registry] = Collector()
    watch_llms(made.observe)
    registry.register(made)
    return made


_collectors: weakref.WeakKeyDictionary[Any, Collector] = weakref.WeakKeyDictionary()
_collectors_lock = threading.Lock()


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    number = 2
    while True:
        yield f"{stem}-{number}"
        number += 1


def _family(metric: Metric) -> Any:
    from prometheus_client import core

    kinds = {
        "counter": core.CounterMetricFamily,
        "gauge": core.GaugeMetricFamily,
        "histogram": core.HistogramMetricFamily,
    }
    return kinds[metric.kind](metric.name, metric.help, labels=[MODEL_LABEL, *metric.labels])


def _add(family: Any, model: str, sample: Sample) -> None:
    labels = [model, *sample.labels]
    if isinstance(sample.value, HistogramValue):
        buckets = [(format_limit(limit), count) for limit, count in sample.value.cumulative()]
        family.add_metric(labels, buckets, sample.value.sum)
    else:
        family.add_metric(labels, sample.value)
