# SPDX-License-Identifier: Apache-2.0
"""Policies: the rules by which a token's k is decided, their file, and the tables that an engine takes.

A policy file is JSON::

    {"unit": "nats", "default": "balanced",
     "policies": {"full":     {"kind": "fixed", "k": 2},
                  "balanced": {"kind": "entropy", "thresholds": [0.6, 1.2], "k": [1, 2, 4]},
                  "tuned":    {"kind": "entropy", "thresholds": [0.5], "k": [1, 2],
                               "layers": {"0": {"thresholds": [0.4], "k": [1, 2]}}},
                  "mass":     {"kind": "top_p", "p": 0.9, "k_min": 1},
                  "relative": {"kind": "ratio", "ratio": 0.2}}}

Layers are numbered over the model's MoE layers from 0. `full`, the trained top-k, always exists.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adaptive_k_moe.errors import PolicyError
from adaptive_k_moe.validation import first_error

FULL = "full"
"""Name of the policy that runs the trained top-k for every token; it exists in every engine."""

MAX_K = 32
"""Most experts a token may run: the operator's limit on every target."""

# The operator's policy kinds (input `policy_kind`).
KIND_ENTROPY, KIND_TOP_P, KIND_RATIO = 0, 1, 2


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EntropyChoices(_Model):
    """Choices by entropy: `k[i]` for the first i with entropy < `thresholds[i]`, else the last k."""

    thresholds: list[float]
    k: list[Annotated[int, Field(ge=1)]]

    @model_validator(mode="after")
    def _consistent(self) -> EntropyChoices:
        if len(self.k) != len(self.thresholds) + 1:
            raise ValueError(
                f"{len(self.thresholds)} thresholds need {len(self.thresholds) + 1} values of k, not {len(self.k)}"
            )
        if any(low >= high for low, high in zip(self.thresholds, self.thresholds[1:], strict=False)):
            raise ValueError(f"thresholds must rise, and {self.thresholds} do not")
        return self


class EntropyPolicy(_Model):
    """k by the router's entropy: one rule for all layers, rules for single layers, or both."""

    kind: Literal["entropy"]
    thresholds: list[float] | None = None
    k: list[Annotated[int, Field(ge=1)]] | None = None
    layers: dict[Annotated[int, Field(ge=0)], EntropyChoices] = Field(default_factory=dict)

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


class FixedPolicy(_Model):
    """The same k for every token."""

    kind: Literal["fixed"]
    k: Annotated[int, Field(ge=1)]


class TopPPolicy(_Model):
    """The fewest experts whose router probability reaches `p`, within [k_min, k_max]."""

    kind: Literal["top_p"]
    p: Annotated[float, Field(gt=0, le=1)]
    k_min: Annotated[int, Field(ge=1)] = 1
    k_max: Annotated[int, Field(ge=1)] | None = None


class RatioPolicy(_Model):
    """The experts whose score is at least `ratio` times the best one's, within [k_min, k_max]."""

    kind: Literal["ratio"]
    ratio: Annotated[float, Field(ge=0, le=1)]
    k_min: Annotated[int, Field(ge=1)] = 1
    k_max: Annotated[int, Field(ge=1)] | None = None


Policy = Annotated[EntropyPolicy | FixedPolicy | TopPPolicy | RatioPolicy, Field(discriminator="kind")]


class PolicySet(_Model):
    """A policy file: named policies, the unit of their thresholds, and which one is the default."""

    unit: Literal["nats", "bits"] = "nats"
    default: str = FULL
    allow_above_top_k: bool = False
    policies: dict[Annotated[str, Field(min_length=1, max_length=64)], Policy] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _default_exists(self) -> PolicySet:
        if self.default != FULL and self.default not in self.policies:
            raise ValueError(f"the default {self.default!r} is not among the policies {sorted(self.policies)}")
        return self

    def for_model(self, *, num_experts: int, num_experts_per_tok: int, num_moe_layers: int) -> PolicySet:
        """This set made to fit a model: `full` present, every k within the trained top-k, layers checked.

        Raises:
            PolicyError: `full` is not the trained top-k, a layer does not exist, or a k exceeds the
                number of experts or the operator's limit.

        Warns:
            UserWarning: a k above the trained top-k was capped (without `allow_above_top_k`).
        """
        limit = min(num_experts, MAX_K)
        cap = limit if self.allow_above_top_k else min(num_experts_per_tok, limit)
        fitted: dict[str, Any] = {FULL: FixedPolicy(kind="fixed", k=num_experts_per_tok)}
        for name, policy in self.policies.items():
            if name == FULL:
                if not isinstance(policy, FixedPolicy) or policy.k != num_experts_per_tok:
                    raise PolicyError(
                        f"policy {FULL!r} is the trained top-k, for this model "
                        f'{{"kind": "fixed", "k": {num_experts_per_tok}}}: give other rules another name.'
                    )
                continue
            if isinstance(policy, EntropyPolicy) and max(policy.layers, default=0) >= num_moe_layers:
                raise PolicyError(
                    f"policy {name!r} names layer {max(policy.layers)}, but the model's {num_moe_layers} MoE "
                    f"layers are 0 to {num_moe_layers - 1}."
                )
            fitted[name] = _capped(name, policy, cap=cap, limit=limit)
        return self.model_copy(update={"policies": fitted})

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
            if not policy.get("layers", True):
                del policy["layers"]
        if not self.allow_above_top_k:
            del content["allow_above_top_k"]
        return content


@dataclass(frozen=True, eq=False)
class PolicyTables:
    """Policies as the engine's inputs. P rows (policies), L MoE layers, C choices (at least 2).

    Attributes:
        names: P policy names; a token's `policy_index` is the position in this list.
        default: index of the default policy.
        policy_kind: [P] int32.
        thresholds: [L, P, C - 1] float32, in nats; a row with fewer choices is padded with +inf.
        k_values: [L, P, C] int32; a row with fewer choices is padded with its last k.
    """

    names: list[str]
    default: int
    policy_kind: npt.NDArray[np.int32]
    thresholds: npt.NDArray[np.float32]
    k_values: npt.NDArray[np.int32]

    def index(self, name: str | None) -> int:
        """The row of a policy; None is the default.

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


def compile_policies(policies: PolicySet, *, num_experts_per_tok: int, num_moe_layers: int) -> PolicyTables:
    """The tables of a set that already fits the model (see `PolicySet.for_model`)."""
    per_nat = math.log(2) if policies.unit == "bits" else 1.0
    kinds: list[int] = []
    rows: list[list[tuple[list[float], list[int]]]] = []  # [P][L] of (thresholds, k values)
    for policy in policies.policies.values():
        match policy:
            case EntropyPolicy():
                kinds.append(KIND_ENTROPY)
                by_layer = [policy.choices(layer, num_experts_per_tok) for layer in range(num_moe_layers)]
                rows.append([([t * per_nat for t in choice.thresholds], choice.k) for choice in by_layer])
            case FixedPolicy():
                kinds.append(KIND_ENTROPY)
                rows.append([([], [policy.k])] * num_moe_layers)
            case TopPPolicy():
                kinds.append(KIND_TOP_P)
                rows.append([([policy.p], [policy.k_min, policy.k_max or num_experts_per_tok])] * num_moe_layers)
            case RatioPolicy():
                kinds.append(KIND_RATIO)
                rows.append([([policy.ratio], [policy.k_min, policy.k_max or num_experts_per_tok])] * num_moe_layers)
    num_choices = max([2, *(len(ks) for row in rows for _, ks in row)])
    thresholds = np.full((num_moe_layers, len(rows), num_choices - 1), np.inf, np.float32)
    k_values = np.empty((num_moe_layers, len(rows), num_choices), np.int32)
    for index, row in enumerate(rows):
        for layer, (limits, ks) in enumerate(row):
            thresholds[layer, index, : len(limits)] = limits
            k_values[layer, index] = ks + [ks[-1]] * (num_choices - len(ks))
    names = list(policies.policies)
    return PolicyTables(names, names.index(policies.default), np.array(kinds, np.int32), thresholds, k_values)


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
        where, message = first_error(error)
        raise PolicyError(f"{source}: {where + ': ' if where else ''}{message}.") from None


def read_policy_file(path: str | Path) -> PolicySet:
    """Read and check a policy file.

    Raises:
        PolicyError: the file is missing, is not JSON, or says something that policies do not know.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PolicyError(f"cannot read the policy file {path}: {error.strerror}.") from None
    except ValueError as error:
        raise PolicyError(f"{path} is not JSON: {error}.") from None
    return parse_policy_set(content, str(path))


def _capped(name: str, policy: Any, *, cap: int, limit: int) -> Any:
    """The policy with no k above `cap`."""

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

    match policy:
        case EntropyPolicy():
            layers = {
                layer: choices.model_copy(update={"k": [capped(k) for k in choices.k]})
                for layer, choices in policy.layers.items()
            }
            k = None if policy.k is None else [capped(k) for k in policy.k]
            return policy.model_copy(update={"k": k, "layers": layers})
        case FixedPolicy():
            return policy.model_copy(update={"k": capped(policy.k)})
        case _:
            k_max = cap if policy.k_max is None else capped(policy.k_max)
            k_min = capped(policy.k_min)
            if k_min > k_max:
                raise PolicyError(f"policy {name!r}: k_min {k_min} is above k_max {k_max}.")
            return policy.model_copy(update={"k_min": k_min, "k_max": k_max})
