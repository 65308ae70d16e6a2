# SPDX-License-Identifier: Apache-2.0
"""Policies: the rules by which a token's k is decided, their file, and the tables that an engine takes.

A policy file is JSON::

    {"unit": "nats", "default": "balanced",
     "policies": {"full":     {"kind": "fixed", "k": 2},
                  "balanced": {"kind": "entropy", "thresholds": [0.6, 1.2], "k": [1, 2, 4]},
                  "tuned":    {"kind": "entropy", "thresholds": [0.5], "k": [1, 2],
                               "layers": {"0": {"thresholds": [0.4], "k": [1, 2]}}},
                  "mass":     {"kind": "top_p", "p": 0.9, "k_min": 1, "layers": {"3": {"p": 0.8}}},
                  "relative": {"kind": "ratio", "ratio": 0.2},
                  "weighed":  {"kind": "contribution", "p": 0.9},
                  "batched":  {"kind": "phases", "prefill": {"kind": "fixed", "k": 2},
                               "decode": {"kind": "shared", "price": 0.05, "k_min": 1}},
                  "auto":     {"kind": "by_load", "steps": [{"policy": "full"}, {"policy": "balanced", "queue": 4},
                                                            {"policy": "batched", "queue": 16}]}},
     "expert_norms": [[0.8, 1.2, 1.1, 0.9], ...]}

Layers are numbered over the model's MoE layers from 0. `full`, the trained top-k, always exists. `contribution`
policies need `expert_norms`, the mean norm of each expert's output in each layer: `adaptive-k calibrate` measures them.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError, model_validator

from adaptive_k_moe.errors import PolicyError
from adaptive_k_moe.policy_kinds import KINDS
from adaptive_k_moe.validation import FileModel, describe_first_error

FULL = "full"
"""Name of the policy that runs the trained top-k for every token; it exists in every engine."""

MAX_K = 32
"""Most experts a token may run: the operator's limit. Like the kinds' numbers it is in the operator's description, too
(``plugin/operator``), since schemas are read where no compiled code is; a test holds them together."""

MAX_POLICIES = 64
"""Most policies of an engine, `full` among them: the rows that every target's tables have room for."""

MAX_CHOICES = MAX_K + 1
"""Most choices of a policy: the columns that every target's tables have room for."""

# Policy kinds of the operator (input `policy_kind`) that need a word of their own.
KIND_CONTRIBUTION = KINDS["contribution"].number
KIND_SHARED_PRICE = KINDS["shared"].number
KIND_SHARED_EXPERTS = KIND_SHARED_PRICE + 1  # `shared` with a number of experts in the place of a price
_SEE_STEP = {kind.number for kind in KINDS.values() if kind.sees_step} | {KIND_SHARED_EXPERTS}

_K = Annotated[int, Field(ge=1)]
_Layer = Annotated[int, Field(ge=0)]
_Share = Annotated[float, Field(gt=0, le=1)]
_Ratio = Annotated[float, Field(ge=0, le=1)]


class EntropyChoices(FileModel):
    """Choices by entropy: `k[i]` for the first i with entropy < `thresholds[i]`, else the last k."""

    thresholds: list[float]
    k: list[_K]

    @model_validator(mode="after")
    def _consistent(self) -> EntropyChoices:
        if len(self.k) != len(self.thresholds) + 1:
            raise ValueError(
                f"{len(self.thresholds)} thresholds need {len(self.thresholds) + 1} values of k, not {len(self.k)}"
            )
        if any(low >= high for low, high in zip(self.thresholds, self.thresholds[1:], strict=False)):
            raise ValueError(f"thresholds must rise, and {self.thresholds} do not")
        return self


class EntropyPolicy(FileModel):
    """k by the router's entropy: one rule for all layers, rules for single layers, or both."""

    kind: Literal["entropy"]
    thresholds: list[float] | None = None
    k: list[_K] | None = None
    layers: dict[_Layer, EntropyChoices] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> EntropyPolicy:
        if (self.thresholds is None) != (self.k is None):
            raise ValueError("thresholds and k belong together: give both or neither")
        if self.thresholds is None and not self.layers:
            raise ValueError("give thresholds and k, or layers")
        if self.thresholds is not None and self.k is not None:
            EntropyChoices(thresholds=self.thresholds, k=self.k)
        return self

    def choices(self, layer: int, full_k: int) -> EntropyChoices:
        """The rule of one MoE layer; a layer that the policy does not name runs `full_k`."""
        if layer in self.layers:
            return self.layers[layer]
        if self.thresholds is not None and self.k is not None:
            return EntropyChoices(thresholds=self.thresholds, k=self.k)
        return EntropyChoices(thresholds=[], k=[full_k])


class FixedPolicy(FileModel):
    """The same k for every token."""

    kind: Literal["fixed"]
    k: _K
    layers: ClassVar[dict[int, EntropyChoices]] = {}

    def choices(self, layer: int, full_k: int) -> EntropyChoices:  # noqa: ARG002 (as every policy's)
        """The same for every layer: one choice."""
        return EntropyChoices(thresholds=[], k=[self.k])


class ShareChoices(FileModel):
    """The fewest experts that reach the share `p`, within [k_min, k_max]; without k_max up to the trained top-k."""

    p: _Share
    k_min: _K = 1
    k_max: _K | None = None

    @property
    def parameter(self) -> float:
        """What the operator finds first among the row's thresholds."""
        return self.p


class RatioChoices(FileModel):
    """The experts that reach `ratio`, within [k_min, k_max]; without k_max up to the trained top-k."""

    ratio: _Ratio
    k_min: _K = 1
    k_max: _K | None = None

    @property
    def parameter(self) -> float:
        """What the operator finds first among the row's thresholds."""
        return self.ratio


class _SharePolicy(FileModel):
    """A share to reach: one for all layers, single layers' own, or both."""

    kind: str
    p: _Share | None = None
    k_min: _K = 1
    k_max: _K | None = None
    layers: dict[_Layer, ShareChoices] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> _SharePolicy:
        _check_common_rule(self, "p")
        return self

    @property
    def parameter(self) -> float | None:
        """Of the rule for all layers; None where there is none."""
        return self.p

    def choices(self, layer: int, full_k: int) -> ShareChoices:
        """The rule of one MoE layer; a layer that the policy does not name runs `full_k`."""
        if layer in self.layers:
            return self.layers[layer]
        if self.p is None:
            return ShareChoices(p=1.0, k_min=full_k, k_max=full_k)
        return ShareChoices(p=self.p, k_min=self.k_min, k_max=self.k_max)


class TopPPolicy(_SharePolicy):
    """The fewest experts whose router probability reaches `p`, within [k_min, k_max]."""

    kind: Literal["top_p"]


class ContributionPolicy(_SharePolicy):
    """The fewest experts that reach the share `p` of what the best `k_max` contribute, `k_min` at least.

    An expert's contribution is its score times the mean norm of its output (`PolicySet.expert_norms`).
    """

    kind: Literal["contribution"]


class RatioPolicy(FileModel):
    """The experts whose score is at least `ratio` times the best one's, within [k_min, k_max]."""

    kind: Literal["ratio"]
    ratio: _Ratio | None = None
    k_min: _K = 1
    k_max: _K | None = None
    layers: dict[_Layer, RatioChoices] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> RatioPolicy:
        _check_common_rule(self, "ratio")
        return self

    @property
    def parameter(self) -> float | None:
        """Of the rule for all layers; None where there is none."""
        return self.ratio

    def choices(self, layer: int, full_k: int) -> RatioChoices:
        """The rule of one MoE layer; a layer that the policy does not name runs `full_k`."""
        if layer in self.layers:
            return self.layers[layer]
        if self.ratio is None:
            return RatioChoices(ratio=0.0, k_min=full_k, k_max=full_k)
        return RatioChoices(ratio=self.ratio, k_min=self.k_min, k_max=self.k_max)


def _check_common_rule(policy: _SharePolicy | RatioPolicy | SharedPolicy, name: str) -> None:
    """Refuse a policy with neither a rule for all layers nor layers, or with limits that no rule goes with."""
    if policy.parameter is not None:
        return
    if not policy.layers:
        raise ValueError(f"give {name}, or layers")
    if policy.k_min != 1 or policy.k_max is not None:
        raise ValueError(f"k_min and k_max need {name} beside them: say them in layers, or give {name}")


class SharedChoices(FileModel):
    """What the tokens of a step read together: experts that are worth `price` to them, or `experts` of them at most.

    Each token keeps its own first `k_min` experts, and runs its best among those that are read, up to `k_max`; without
    k_max up to the trained top-k.
    """

    price: Annotated[float, Field(gt=0)] | None = None
    experts: Annotated[int, Field(ge=0)] | None = None
    k_min: Annotated[int, Field(ge=0)] = 1
    k_max: _K | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> SharedChoices:
        if (self.price is None) == (self.experts is None):
            raise ValueError("give price or experts, and not both")
        return self

    @property
    def parameter(self) -> float:
        """What the operator finds first among the row's thresholds."""
        return float(self.experts or 0) if self.price is None else self.price


class SharedPolicy(FileModel):
    """Tokens agree with all others of the step on the experts to read: a rule for decode, where reading is the cost.

    What a token runs depends on the step's other tokens. `price` in one place and `experts` in another do not go
    together: a row of the operator has one kind in all layers.
    """

    kind: Literal["shared"]
    price: Annotated[float, Field(gt=0)] | None = None
    experts: Annotated[int, Field(ge=0)] | None = None
    k_min: Annotated[int, Field(ge=0)] = 1
    k_max: _K | None = None
    layers: dict[_Layer, SharedChoices] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> SharedPolicy:
        if self.price is not None or self.experts is not None:
            SharedChoices(price=self.price, experts=self.experts)
        _check_common_rule(self, "price or experts")
        every: list[SharedPolicy | SharedChoices] = [self, *self.layers.values()]
        rules = [rule for rule in every if rule.parameter is not None]
        if len({rule.price is None for rule in rules}) > 1:
            raise ValueError("price and experts do not go together in one policy: give the one or the other everywhere")
        return self

    @property
    def parameter(self) -> float | None:
        """Of the rule for all layers; None where there is none."""
        return self.price if self.experts is None else float(self.experts)

    @property
    def by_price(self) -> bool:
        """Whether experts are read for their price and not by their number."""
        rules: list[SharedPolicy | SharedChoices] = [self, *self.layers.values()]
        return all(rule.experts is None for rule in rules)

    def choices(self, layer: int, full_k: int) -> SharedChoices:
        """The rule of one MoE layer; a layer that the policy does not name runs `full_k`."""
        if layer in self.layers:
            return self.layers[layer]
        if self.parameter is None:
            free = {"price": 1.0} if self.by_price else {"experts": 0}
            return SharedChoices(k_min=full_k, k_max=full_k, **free)  # type: ignore[arg-type]
        return SharedChoices(price=self.price, experts=self.experts, k_min=self.k_min, k_max=self.k_max)


Rule = Annotated[
    EntropyPolicy | FixedPolicy | TopPPolicy | RatioPolicy | ContributionPolicy | SharedPolicy,
    Field(discriminator="kind"),
]
"""What a row of the operator's tables says."""


class PhasesPolicy(FileModel):
    """One rule for the tokens of prompts and one for those that are generated; a token follows its phase."""

    kind: Literal["phases"]
    prefill: Rule
    decode: Rule

    @property
    def layers(self) -> dict[int, Any]:
        """The layers that either rule names."""
        return {**self.prefill.layers, **self.decode.layers}


class LoadStep(FileModel):
    """A policy, and the load at which requests begin to follow it: any of the limits that it states.

    Attributes:
        policy: its name; neither the policy itself nor another of the kind `by_load`.
        queue: sequences that wait for a place in the batch.
        time_between_tokens: mean seconds between two tokens of a sequence, over the last second.
    """

    policy: str
    queue: Annotated[int, Field(ge=1)] | None = None
    time_between_tokens: Annotated[float, Field(gt=0)] | None = None


LOAD_LIMITS = ("queue", "time_between_tokens")
"""The limits of a `LoadStep`."""


class ByLoadPolicy(FileModel):
    """Requests follow one of several policies, which the runtime chooses for each step of the engine by its load.

    Attributes:
        steps: from the one without load to the one under the heaviest.
        floor: the policy beyond which it never goes; None is the last step's.
        leave_share: a step is left when the load has been below this share of each of its limits...
        leave_seconds: ... for so long.
    """

    kind: Literal["by_load"]
    steps: Annotated[list[LoadStep], Field(min_length=1)]
    floor: str | None = None
    leave_share: _Share = 0.5
    leave_seconds: Annotated[float, Field(ge=0)] = 2.0
    layers: ClassVar[dict[int, Any]] = {}

    @model_validator(mode="after")
    def _consistent(self) -> ByLoadPolicy:
        first, *others = self.steps
        names = [step.policy for step in self.steps]
        if first.queue is not None or first.time_between_tokens is not None:
            raise ValueError(f"the first step, {first.policy!r}, is the one without load and has no limit")
        for step in others:
            if step.queue is None and step.time_between_tokens is None:
                raise ValueError(f"the step {step.policy!r} needs a queue or a time_between_tokens at which it begins")
        for name in LOAD_LIMITS:
            limits = [limit for step in others if (limit := getattr(step, name)) is not None]
            if any(low >= high for low, high in itertools.pairwise(limits)):
                raise ValueError(f"{name} must rise from step to step, and {limits} does not")
        if len(set(names)) < len(names):
            raise ValueError(f"a policy can be one step only, and {names} names one twice")
        if self.floor is not None and self.floor not in names:
            raise ValueError(f"the floor {self.floor!r} is not among the steps {names}")
        return self

    @property
    def reachable(self) -> list[LoadStep]:
        """The steps up to the floor."""
        names = [step.policy for step in self.steps]
        return self.steps if self.floor is None else self.steps[: names.index(self.floor) + 1]


Policy = Annotated[Rule | PhasesPolicy | ByLoadPolicy, Field(discriminator="kind")]


def rules_of(policy: Any, policies: Mapping[str, Any]) -> list[Any]:
    """The rules of a policy of a set that fits a model: its own, or that of prefill and that of decode.

    One by load has those of its first step, for whoever runs it where nothing waits.
    """
    if isinstance(policy, ByLoadPolicy):
        policy = policies[policy.steps[0].policy]
    return [policy.prefill, policy.decode] if isinstance(policy, PhasesPolicy) else [policy]


def _operator_kind(rule: Any) -> int:
    """The operator's `policy_kind` of a rule's row."""
    return KIND_SHARED_EXPERTS if isinstance(rule, SharedPolicy) and not rule.by_price else KINDS[rule.kind].number


class PolicySet(FileModel):
    """A policy file: named policies, the unit of their thresholds, and which one is the default.

    Attributes:
        expert_norms: [L][E] mean norm of each expert's output in each MoE layer, in any unit; the mean of a layer is
            taken as 1. None where nobody has measured it.
    """

    unit: Literal["nats", "bits"] = "nats"
    default: str = FULL
    allow_above_top_k: bool = False
    policies: dict[Annotated[str, Field(min_length=1, max_length=64)], Policy] = Field(default_factory=dict)
    expert_norms: list[list[Annotated[float, Field(ge=0)]]] | None = None

    @model_validator(mode="after")
    def _norms_are_some(self) -> PolicySet:
        if self.expert_norms == []:
            raise ValueError("expert_norms has no layer: leave it out, or give a row for each MoE layer")
        for layer, norms in enumerate(self.expert_norms or []):
            if not any(norms):
                raise ValueError(f"the expert_norms of layer {layer} are all 0 or none at all")
        return self

    @model_validator(mode="after")
    def _default_exists(self) -> PolicySet:
        if self.default != FULL and self.default not in self.policies:
            raise ValueError(f"the default {self.default!r} is not among the policies {sorted(self.policies)}")
        return self

    @model_validator(mode="after")
    def _steps_exist(self) -> PolicySet:
        for name, policy in self.policies.items():
            for step in policy.steps if isinstance(policy, ByLoadPolicy) else ():
                if step.policy != FULL and step.policy not in self.policies:
                    raise ValueError(f"{name!r} has a step {step.policy!r}, and there is no policy of that name")
                if isinstance(self.policies.get(step.policy), ByLoadPolicy):
                    raise ValueError(f"{name!r} has a step {step.policy!r}, which depends on the load itself")
        return self

    def for_model(self, *, num_experts: int, num_experts_per_tok: int, num_moe_layers: int) -> PolicySet:
        """This set made to fit a model: `full` present, every k within the trained top-k, layers checked.

        Raises:
            PolicyError: `full` is not the trained top-k, a layer does not exist, a k exceeds the number of experts
                or the operator's limit, the tables would be too large, or `expert_norms` are of another model or
                missing.

        Warns:
            UserWarning: a k above the trained top-k was capped (without `allow_above_top_k`).
        """
        limit = min(num_experts, MAX_K)
        cap = limit if self.allow_above_top_k else min(num_experts_per_tok, limit)
        self._check_norms(num_moe_layers, num_experts)
        fitted: dict[str, Any] = {FULL: FixedPolicy(kind="fixed", k=num_experts_per_tok)}
        for name, policy in self.policies.items():
            if name == FULL:
                if not isinstance(policy, FixedPolicy) or policy.k != num_experts_per_tok:
                    raise PolicyError(
                        f"policy {FULL!r} is the trained top-k, for this model "
                        f'{{"kind": "fixed", "k": {num_experts_per_tok}}}: give other rules another name.'
                    )
                continue
            if max(policy.layers, default=0) >= num_moe_layers:
                raise PolicyError(
                    f"policy {name!r} names layer {max(policy.layers)}, but the model's {num_moe_layers} MoE "
                    f"layers are 0 to {num_moe_layers - 1}."
                )
            fitted[name] = _capped(name, policy, cap=cap, limit=limit, full_k=num_experts_per_tok)
        num_rules = sum(len(rules_of(policy, fitted)) for policy in fitted.values())
        if num_rules > MAX_POLICIES:
            raise PolicyError(
                f"{num_rules} policies, {FULL!r} among them, are too many: an engine holds at most {MAX_POLICIES} "
                "(one of the kind `phases` counts as two, one of the kind `by_load` as its first step)."
            )
        return self.model_copy(update={"policies": fitted})

    def _check_norms(self, num_moe_layers: int, num_experts: int) -> None:
        """Refuse norms of another model, and policies that need norms where there are none."""
        if self.expert_norms is None:
            for name, policy in self.policies.items():
                if not isinstance(policy, ByLoadPolicy) and any(
                    KINDS[rule.kind].uses_norms for rule in rules_of(policy, self.policies)
                ):
                    raise PolicyError(
                        f"policy {name!r} weighs experts by the norm of their output, but there are no expert_norms: "
                        "`adaptive-k calibrate` measures them and writes them into its policy file."
                    )
        elif len(self.expert_norms) != num_moe_layers or any(len(norms) != num_experts for norms in self.expert_norms):
            sizes = sorted({len(norms) for norms in self.expert_norms})
            raise PolicyError(
                f"the expert_norms are of {len(self.expert_norms)} layers of {' or '.join(map(str, sizes))} experts, "
                f"but the model has {num_moe_layers} MoE layers of {num_experts}."
            )

    def largest_k(self, *, num_experts_per_tok: int, num_moe_layers: int) -> dict[str, int]:
        """The most experts that each policy may run for a token, of a set that already fits the model."""
        layers = range(num_moe_layers)
        return {
            name: max(
                k
                for rule in rules_of(policy, self.policies)
                for layer in layers
                for k in _row(rule.choices(layer, num_experts_per_tok))[1]
            )
            for name, policy in self.policies.items()
        }

    def with_policy(self, name: str, definition: dict[str, Any], *, default: bool = False) -> PolicySet:
        """A copy with one policy added or replaced, checked as if it had stood in the file."""
        content = self.model_dump(mode="json", exclude_none=True)
        content["policies"][name] = definition
        if default:
            content["default"] = name
        return parse_policy_set(content, f"policy {name!r}")

    def to_json(self) -> dict[str, Any]:
        """The file's content, ready for `json.dump`."""
        content = self.model_dump(mode="json", exclude_none=True)
        for policy in content["policies"].values():
            for rule in (policy, policy.get("prefill", {}), policy.get("decode", {})):
                if not rule.get("layers", True):
                    del rule["layers"]
        if not self.allow_above_top_k:
            del content["allow_above_top_k"]
        return content


@dataclass(frozen=True, eq=False)
class PolicyTables:
    """Policies as the engine's inputs. P rows (rules), L MoE layers, C choices (at least 2).

    Attributes:
        names: policy names; a request's `policy_index` is the position in this list, and so is the row that its
            prompt's tokens follow.
        default: index of the default policy.
        decode_row: of each policy the row that its generated tokens follow: another than its index where it has a rule
            for each phase. These rows come after those of all names.
        policy_kind: [P] int32.
        thresholds: [L, P, C - 1] float32, in nats; a row with fewer choices is padded with +inf.
        k_values: [L, P, C] int32; a row with fewer choices is padded with its last k.
        expert_norms: [L, E] float32, what each expert's score is multiplied by in rows of the kind `contribution`;
            each layer's mean is 1, and all are 1 where nobody has measured them.
        by_load: the policies whose requests follow others by the engine's load. Their own rows are copies of their
            first step's.
    """

    names: list[str]
    default: int
    decode_row: list[int]
    policy_kind: npt.NDArray[np.int32]
    thresholds: npt.NDArray[np.float32]
    k_values: npt.NDArray[np.int32]
    expert_norms: npt.NDArray[np.float32]
    by_load: Mapping[str, ByLoadPolicy] = field(default_factory=dict)

    @cached_property
    def policy_of_row(self) -> npt.NDArray[np.int32]:
        """[P] the index of the policy that each row is a rule of."""
        owner = np.arange(len(self.policy_kind), dtype=np.int32)
        owner[self.decode_row] = np.arange(len(self.names), dtype=np.int32)
        return owner

    @property
    def step_policies(self) -> list[str]:
        """Names of the policies that can only be measured in decode steps.

        Their decode follows another rule than their prompts, or what a token runs depends on the step's other tokens.
        """
        return [
            name
            for index, (name, decode) in enumerate(zip(self.names, self.decode_row, strict=True))
            if decode != index or self.sees_step(index)
        ]

    def sees_step(self, index: int) -> bool:
        """Whether what a token of a policy runs depends on the step's other tokens, in one of its phases."""
        return any(self.policy_kind[row] in _SEE_STEP for row in (index, self.decode_row[index]))

    def index(self, name: str | None) -> int:
        """The index of a policy, which is its prompt's row; None is the default.

        Raises:
            PolicyError: there is no policy of that name.
        """
        if name is None:
            return self.default
        try:
            return self.names.index(name)
        except ValueError:
            raise PolicyError(
                f"adaptive_k_policy {name!r} is not one of this engine's policies: {', '.join(self.names)}."
            ) from None


def compile_policies(
    policies: PolicySet, *, num_experts: int, num_experts_per_tok: int, num_moe_layers: int
) -> PolicyTables:
    """The tables of a set that already fits the model (see `PolicySet.for_model`)."""
    per_nat = math.log(2) if policies.unit == "bits" else 1.0
    by_policy = [rules_of(policy, policies.policies) for policy in policies.policies.values()]
    rules = [first for first, *_ in by_policy]
    decode_row = list(range(len(rules)))
    for index, (_, *decode) in enumerate(by_policy):
        if decode:
            decode_row[index] = len(rules)
            rules += decode
    # [P][L] of (thresholds, k values)
    rows = [
        [_row(rule.choices(layer, num_experts_per_tok), per_nat) for layer in range(num_moe_layers)] for rule in rules
    ]
    num_choices = max([2, *(len(ks) for row in rows for _, ks in row)])
    thresholds = np.full((num_moe_layers, len(rows), num_choices - 1), np.inf, np.float32)
    k_values = np.empty((num_moe_layers, len(rows), num_choices), np.int32)
    for index, row in enumerate(rows):
        for layer, (limits, ks) in enumerate(row):
            thresholds[layer, index, : len(limits)] = limits
            k_values[layer, index] = ks + [ks[-1]] * (num_choices - len(ks))
    names = list(policies.policies)
    return PolicyTables(
        names=names,
        default=names.index(policies.default),
        decode_row=decode_row,
        policy_kind=np.array([_operator_kind(rule) for rule in rules], np.int32),
        thresholds=thresholds,
        k_values=k_values,
        expert_norms=_norms(policies, num_moe_layers, num_experts),
        by_load={name: policy for name, policy in policies.policies.items() if isinstance(policy, ByLoadPolicy)},
    )


def _row(choices: Any, per_nat: float = 1.0) -> tuple[list[float], list[int]]:
    """The thresholds and the k values of one policy in one layer, of a policy that fits the model."""
    if isinstance(choices, EntropyChoices):
        return [limit * per_nat for limit in choices.thresholds], choices.k
    assert choices.k_max is not None  # set where the policy was fitted to the model
    return [choices.parameter], [choices.k_min, choices.k_max]


def _norms(policies: PolicySet, num_moe_layers: int, num_experts: int) -> npt.NDArray[np.float32]:
    """[L, E], each layer's mean 1."""
    if policies.expert_norms is None:
        return np.ones((num_moe_layers, num_experts), np.float32)
    norms = np.array(policies.expert_norms)
    norms = norms / norms.max(axis=1, keepdims=True)  # the sum of the largest floats would be none
    relative: npt.NDArray[np.float32] = (norms / norms.mean(axis=1, keepdims=True)).astype(np.float32)
    return relative


def parse_policy_set(content: Any, source: str) -> PolicySet:
    """Check a policy file's content.

    Args:
        content: the parsed JSON.
        source: where it came from, for the error's sentence.

    Raises:
        PolicyError: naming the field and what is wrong with it.
    """
    try:
        return PolicySet.model_validate(content)
    except ValidationError as error:
        raise PolicyError(f"{source}: {describe_first_error(error)}.") from None


def read_policy_file(path: str | Path) -> PolicySet:
    """Read and check a policy file.

    Raises:
        PolicyError: the file is missing, is not JSON, or says something that policies do not know.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PolicyError(f"cannot read the policy file {path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"{path} is not JSON: {error}.") from None
    return parse_policy_set(content, str(path))


def _capped(name: str, policy: Any, *, cap: int, limit: int, full_k: int) -> Any:
    """The policy with no k above `cap`; without a k_max it goes up to `full_k`."""

    def capped(k: int) -> int:
        if k <= cap:
            return k
        if cap == limit:
            raise PolicyError(f"policy {name!r} asks for k = {k}, but a token can run at most {limit} experts here.")
        warnings.warn(
            f"policy {name!r}: k = {k} is above the trained top-k and was capped to {cap} "
            '(say "allow_above_top_k": true to keep it).',
            stacklevel=4,
        )
        return cap

    def bounded(rule: Any) -> Any:
        k_max = full_k if rule.k_max is None else capped(rule.k_max)
        k_min = capped(rule.k_min)
        if k_min > k_max:
            raise PolicyError(f"policy {name!r}: k_min {k_min} is above k_max {k_max}.")
        return rule.model_copy(update={"k_min": k_min, "k_max": k_max})

    match policy:
        case ByLoadPolicy():
            return policy
        case PhasesPolicy():
            prefill, decode = (
                _capped(name, rule, cap=cap, limit=limit, full_k=full_k) for rule in (policy.prefill, policy.decode)
            )
            return policy.model_copy(update={"prefill": prefill, "decode": decode})
        case EntropyPolicy():
            most = max(len(k or []) for k in (policy.k, *(choices.k for choices in policy.layers.values())))
            if most > MAX_CHOICES:
                raise PolicyError(f"policy {name!r} has {most} values of k, but a rule has at most {MAX_CHOICES}.")
            layers = {
                layer: choices.model_copy(update={"k": [capped(k) for k in choices.k]})
                for layer, choices in policy.layers.items()
            }
            k = None if policy.k is None else [capped(k) for k in policy.k]
            return policy.model_copy(update={"k": k, "layers": layers})
        case FixedPolicy():
            return policy.model_copy(update={"k": capped(policy.k)})
        case _:
            layers = {layer: bounded(rule) for layer, rule in policy.layers.items()}
            common = policy if policy.parameter is None else bounded(policy)
            return common.model_copy(update={"layers": layers})
