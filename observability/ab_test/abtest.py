# SPDX-License-Identifier: Apache-2.0
"""`ABTest`: an A/B test used directly, by a program that serves its requests itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_k_moe.errors import ExperimentError
from adaptive_k_moe.observability.ab_test.assignment import Assigner
from adaptive_k_moe.observability.ab_test.experiment import Experiment, Variant
from adaptive_k_moe.observability.ab_test.records import RequestRecord, ScoreRecord
from adaptive_k_moe.observability.ab_test.store import Store

if TYPE_CHECKING:
    from adaptive_k_moe.observability.ab_test.results import Results

_REFRESH_SECONDS = 1.0


class ABTest:
    """An experiment in a file. Any thread may use it.

    Example::

        test = ABTest.start("ab.db", "fewer-experts", ["control=full", "treatment=balanced"])
        variant = test.assign_variant(request_id)
        ...  # answer the request with the policy test.policy(variant)
        test.record(request_id, variant, latency_seconds=0.21, num_tokens=64, avg_k=1.6)
        print(test.compute_results())

    Args:
        path: the file; see `Store`.
        experiment: the experiment's name; None is the running one, or else the last.

    Raises:
        ExperimentError: there is no such file or experiment.
    """

    def __init__(self, path: str | Path, experiment: str | None = None) -> None:
        self._store = Store(path, create=False)
        self._lock = threading.Lock()
        try:
            self._experiment = self._store.read(experiment).experiment
        except BaseException:
            self._store.close()
            raise
        self._assigner: Assigner = self._experiment.assigner()
        self._read_at = time.monotonic()

    @classmethod
    def start(cls, path: str | Path, name: str, variants: Sequence[str | Variant], **settings: Any) -> ABTest:
        """Start an experiment, in a new file or one that exists.

        Args:
            path: the file.
            name: the experiment's name; new in the file.
            variants: as "NAME=policy" or "NAME=policy:weight"; the control is the one named "control", or the
                first.
            **settings: the further attributes of `Experiment`.

        Raises:
            ExperimentError: a setting is unusable, or another experiment is running.
        """
        parsed = tuple(one if isinstance(one, Variant) else Variant.parse(one) for one in variants)
        experiment = Experiment(name, parsed, **settings)
        with Store(path) as store:
            store.start(experiment)
        return cls(path, name)

    @property
    def experiment(self) -> Experiment:
        """What it is; at most a second old."""
        with self._lock:
            if time.monotonic() - self._read_at > _REFRESH_SECONDS:
                self._experiment = self._store.read(self._experiment.name).experiment
                self._read_at = time.monotonic()
            return self._experiment

    def assign_variant(self, request_id: str, user: str | None = None) -> str:
        """Name of the variant of a request: always the same for one id, in every process.

        Args:
            request_id: the request's id.
            user: assign by this instead, so that all requests of a user have one variant.

        Returns:
            The variant; the control where the variant has been stopped.
        """
        experiment = self.experiment
        variant = experiment.variants[self._assigner.assign(request_id if user is None else user)]
        return (experiment.control if variant.stopped_at is not None else variant).name

    def policy(self, variant: str) -> str:
        """The policy that a variant's requests follow."""
        return self._experiment.variant(variant).policy

    def record(
        self,
        request_id: str,
        variant: str,
        *,
        latency_seconds: float,
        outcome: str = "stop",
        user: str | None = None,
        ttft_seconds: float | None = None,
        num_tokens: int = 0,
        avg_k: float | None = None,
    ) -> None:
        """Write a finished request; when this returns, it is on the disk.

        Args:
            request_id: the request's id; a second record of it changes nothing.
            variant: what `assign_variant` said.
            latency_seconds: from its arrival to its end.
            outcome: "stop", "length", "cancelled" or "error".
            user: as given to `assign_variant`.
            ttft_seconds: from its arrival to its first token.
            num_tokens: tokens generated.
            avg_k: mean experts run a token and layer.

        Raises:
            ExperimentError: there is no such variant, or nothing could be written.
        """
        unit = request_id if user is None else user
        assigned = self._experiment.variants[self._assigner.assign(unit)]
        record = RequestRecord(
            experiment=self._experiment.name,
            variant=self._experiment.variant(variant).name,
            unit=unit,
            counted=assigned.name == variant,
            request_id=request_id,
            outcome=outcome,
            finished_at=time.time(),
            latency_seconds=latency_seconds,
            ttft_seconds=ttft_seconds,
            num_tokens=num_tokens,
            avg_k=avg_k,
        )
        self._store.record([record])

    def record_score(self, score: ScoreRecord) -> None:
        """Write the quality of a recorded request's answer; a second score of it changes nothing."""
        self._store.record([score])

    def compute_results(self) -> Results:
        """What has been shown so far; may be looked at, and acted on, at any time."""
        from adaptive_k_moe.observability.ab_test.results import compute

        return compute(self._store.read(self._experiment.name))

    def apply_guardrails(self) -> list[str]:
        """Stop the variants that do more harm than a guardrail bears.

        Returns:
            A sentence for each that was stopped now.
        """
        return apply_guardrails(self._store, self._experiment.name)

    def close(self) -> None:
        """Close the file."""
        self._store.close()

    def __enter__(self) -> ABTest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def apply_guardrails(store: Store, experiment: str) -> list[str]:
    """Stop the variants of an experiment that do more harm than a guardrail bears; a sentence for each."""
    from adaptive_k_moe.observability.ab_test.results import violations

    stored = store.read(experiment)
    if stored.experiment.stopped_at is not None:
        return []
    return [
        f"the variant {variant.name!r} of {experiment!r} is stopped: {reason}"
        for variant, reason, results in violations(stored)
        if store.stop_variant(experiment, variant.name, reason, results)
    ]


_default: ABTest | None = None
_default_lock = threading.Lock()


def configure(path: str | Path, experiment: str | None = None) -> ABTest:
    """Choose the test of `assign_variant` and `compute_results`; arguments as for `ABTest`."""
    global _default
    chosen = ABTest(path, experiment)
    with _default_lock:
        previous, _default = _default, chosen
    if previous is not None:
        previous.close()
    return chosen


def default() -> ABTest:
    """The test that `configure` chose.

    Raises:
        ExperimentError: it has not been called.
    """
    if _default is None:
        raise ExperimentError("no A/B test is chosen: call ab_test.configure(FILE) first.")
    return _default
