# SPDX-License-Identifier: Apache-2.0
"""What an A/B test is: its variants, what is measured of a request, and which harm stops a variant."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from adaptive_k_moe.errors import ExperimentError
from adaptive_k_moe.observability.ab_test.assignment import Assigner, fraction

CONTROL = "control"
"""Name of the variant that the others are compared with; without one it is the first."""

DEFAULT_GUARDRAILS = ("quality:0.05", "error_rate:0.05")
"""What stops a variant unless other guardrails are asked for."""

MAX_ROWS = 200_000
"""Requests that are kept one by one; older ones live on in the sums alone."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class Quantity:
    """One quantity of a request.

    Attributes:
        name: its name.
        kind: how two variants are compared: "ratio" of geometric means (the logarithm is what is observed),
            "difference" of means, or "rate", a difference of means of what is 0 or 1.
        label: in words.
        harm: 1 if more is worse, -1 if less is worse, 0 if neither.
        scored: whether only scored requests have it.
        percent: whether its values and differences are written as percentages.
    """

    name: str
    kind: Literal["ratio", "difference", "rate"]
    label: str
    harm: int
    scored: bool = False
    percent: bool = False


QUANTITIES = {
    metric.name: metric
    for metric in (
        Quantity("latency", "ratio", "latency, arrival to end", 1),
        Quantity("ttft", "ratio", "time to first token", 1),
        Quantity("time_per_token", "ratio", "latency a generated token", 1),
        Quantity("avg_k", "difference", "experts run a token and layer", 0),
        Quantity("error_rate", "rate", "requests that ended in an error", 1, percent=True),
        Quantity("cancelled_rate", "rate", "requests given up by their client", 1, percent=True),
        Quantity("quality", "difference", "log-probability lost against full's likeliest token", 1, scored=True),
        Quantity("agreement", "difference", "tokens that are also full's likeliest", -1, scored=True, percent=True),
        Quantity("own_loss", "difference", "log-probability lost from the own policy to full", 1, scored=True),
        Quantity("answer_logprob", "difference", "log-probability of the answer under full", 0, scored=True),
    )
}
"""Everything that is compared, by name."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One arm.

    Attributes:
        name: its name.
        policy: the engine's policy that its requests follow.
        weight: its share of the requests, relative to the others'.
        stopped_at: when a guardrail stopped it, in seconds since 1970; None while it runs.
        stop_reason: the sentence.
    """

    name: str
    policy: str
    weight: float = 1.0
    stopped_at: float | None = None
    stop_reason: str | None = None

    @classmethod
    def parse(cls, text: str) -> Variant:
        """A variant from "NAME=policy" or "NAME=policy:weight".

        Raises:
            ExperimentError: it is not of that form.
        """
        name, _, rest = text.partition("=")
        policy, colon, weight = rest.rpartition(":") if ":" in rest else (rest, "", "")
        try:
            return cls(_checked_name("variant", name), policy, float(weight) if colon else 1.0)
        except ValueError:
            pass
        raise ExperimentError(f"the variant {text!r} is not of the form NAME=policy or NAME=policy:weight.")

    def __post_init__(self) -> None:
        if not self.policy:
            raise ExperimentError(
                f"the variant {self.name!r} has no policy: give NAME=policy, such as {self.name}=full."
            )
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ExperimentError(
                f"the variant {self.name!r} has the weight {self.weight:g}: it must be a number above 0."
            )


@dataclass(frozen=True, slots=True)
class Guardrail:
    """A variant is stopped once its harm is sure to be greater than the margin.

    Attributes:
        metric: name of the quantity.
        margin: harm that is borne: relative to the control for a ratio, else in the quantity's own unit.
    """

    metric: str
    margin: float

    @classmethod
    def parse(cls, text: str) -> Guardrail:
        """A guardrail from "METRIC:MARGIN".

        Raises:
            ExperimentError: it is not of that form, or there is no such quantity.
        """
        name, _, margin = text.partition(":")
        guarded = [metric.name for metric in QUANTITIES.values() if metric.harm]
        if name not in guarded:
            raise ExperimentError(f"{name!r} cannot be guarded: choose among {', '.join(guarded)}.")
        try:
            value = float(margin)
        except ValueError:
            raise ExperimentError(
                f"the guardrail {text!r} is not of the form METRIC:MARGIN, such as {name}:0.1."
            ) from None
        if not (math.isfinite(value) and value >= 0):
            raise ExperimentError(f"the guardrail {text!r} has a margin that is not 0 or more.")
        return cls(name, value)

    def __str__(self) -> str:
        return f"{self.metric}:{self.margin:.12g}"


@dataclass(frozen=True, slots=True)
class Experiment:
    """An A/B test.

    Attributes:
        name: unique in its file. It is also the salt of the assignment: servers with files of their own that
            run a test of the same name and variants assign alike.
        variants: at least two.
        guardrails: what stops a variant.
        alpha: probability that an interval ever misses the truth; and that any variant is stopped whose harm
            is within the margins.
        score_share: share of the finished requests whose quality is measured.
        max_rows: requests that are kept one by one.
        started_at: in seconds since 1970.
        stopped_at: likewise; None while it runs.
    """

    name: str
    variants: tuple[Variant, ...]
    guardrails: tuple[Guardrail, ...] = field(default_factory=lambda: tuple(map(Guardrail.parse, DEFAULT_GUARDRAILS)))
    alpha: float = 0.05
    score_share: float = 0.1
    max_rows: int = MAX_ROWS
    started_at: float = 0.0
    stopped_at: float | None = None

    def __post_init__(self) -> None:
        _checked_name("experiment", self.name)
        names = [variant.name for variant in self.variants]
        if len(names) < 2:
            raise ExperimentError(f"the experiment {self.name!r} needs at least two variants: one and its control.")
        if len(set(names)) < len(names):
            raise ExperimentError(f"the experiment {self.name!r} has two variants of one name.")
        if not 0 < self.alpha < 0.5:
            raise ExperimentError(f"alpha is {self.alpha:g}: it must be between 0 and 0.5.")
        if not 0 <= self.score_share <= 1:
            raise ExperimentError(f"score_share is {self.score_share:g}: it must be between 0 and 1.")
        if self.max_rows < 1:
            raise ExperimentError(f"max_rows is {self.max_rows}: it must be at least 1.")
        if self.score_share == 0 and (unseen := [g for g in self.guardrails if QUANTITIES[g.metric].scored]):
            raise ExperimentError(
                f"the guardrail {unseen[0]} needs a score_share above 0: it looks at scored requests."
            )

    @property
    def control(self) -> Variant:
        """What the others are compared with."""
        return next((variant for variant in self.variants if variant.name == CONTROL), self.variants[0])

    @property
    def treatments(self) -> tuple[Variant, ...]:
        """All but the control."""
        control = self.control
        return tuple(variant for variant in self.variants if variant is not control)

    def variant(self, name: str) -> Variant:
        """The variant of a name.

        Raises:
            ExperimentError: there is none.
        """
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise ExperimentError(f"the experiment {self.name!r} has no variant {name!r}.")

    def assigner(self) -> Assigner:
        """The rule that says which of `variants` a unit belongs to."""
        return Assigner(self.name, [variant.weight for variant in self.variants])

    def is_scored(self, request_id: str) -> bool:
        """Whether a request is of those whose quality is measured."""
        return fraction(self.name, "score", request_id) < self.score_share


def _checked_name(kind: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ExperimentError(
            f"{name!r} cannot be the name of {'an' if kind[0] in 'aeiou' else 'a'} {kind}: "
            "use up to 64 letters, digits, dots, dashes and underscores."
        )
    return name
