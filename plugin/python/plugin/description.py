# SPDX-License-Identifier: Apache-2.0
"""The operators' one description, as the compiled plugin has it (``plugin/operator``): attributes, tensors, limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptive_k_moe.plugin import _plugin

__all__ = [
    "GATED_ACTIVATIONS",
    "MAMBA",
    "MAX_EXPERTS_ON_GPU",
    "MAX_K",
    "MAX_STATE_SIZE_ON_GPU",
    "MOE",
    "POLICY_KINDS",
    "WEIGHT_FORMATS",
    "Attribute",
    "Operator",
    "Tensor",
    "WeightFormat",
]


@dataclass(frozen=True)
class Attribute:
    """An attribute.

    Attributes:
        name: of the ONNX attribute and the TensorRT field.
        type: "integer", "flag" (an integer 0 or 1), "real" (float32) or "word".
        default: what it is where it is absent.
        words: the values of a word.
    """

    name: str
    type: str
    default: int | float | str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Tensor:
    """An input or output.

    Attributes:
        name: as most activations have it.
        type: "element" (as the first input's), "float32", "int32" or "weights" (by `weight_format`).
        presence: "always", "given" (the number of inputs tells), "quantised" (with weights that are), or the name of
            the attribute that says so.
        shape: its dimensions in symbols, "E, I, H".
        gated_name: as the gated activations have it.
        gated_shape: likewise.
    """

    name: str
    type: str
    presence: str
    shape: str
    gated_name: str
    gated_shape: str


@dataclass(frozen=True)
class WeightFormat:
    """How experts' weights are stored.

    Attributes:
        name: the word of the attribute `weight_format`.
        bits: of a value.
        quantised: whether a value counts by its scale.
        row_multiple: what the length of rows is a multiple of.
    """

    name: str
    bits: int
    quantised: bool
    row_multiple: int


@dataclass(frozen=True)
class Operator:
    """An operator's table."""

    name: str
    attributes: tuple[Attribute, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def defaults(self) -> dict[str, int | float | str]:
        """The attributes' defaults by their names, in order."""
        return {attribute.name: attribute.default for attribute in self.attributes}

    def input_names(self, *present: str) -> list[str]:
        """The inputs of a call, in order, by their names of a plain activation.

        Args:
            present: names or reasons (`Tensor.presence`) of those that are not always there.

        Raises:
            ValueError: there is no such input or reason.
        """
        if unknown := set(present) - {word for tensor in self.inputs for word in (tensor.name, tensor.presence)}:
            raise ValueError(f"{self.name}: has no input that {' or '.join(sorted(unknown))} names")
        wanted = {"always", *present}
        return [tensor.name for tensor in self.inputs if wanted & {tensor.name, tensor.presence}]

    def input_index(self, name: str, *present: str) -> int:
        """The index of an input among those of a call; `present` as for `input_names`."""
        return self.input_names(*present).index(name)

    def output_names(self) -> list[str]:
        """The outputs' names, in order."""
        return [tensor.name for tensor in self.outputs]


def _operator(table: Mapping[str, Any]) -> Operator:
    return Operator(
        name=table["name"],
        attributes=tuple(
            Attribute(name, kind, value, tuple(words)) for name, kind, value, words in table["attributes"]
        ),
        inputs=tuple(Tensor(*fields) for fields in table["inputs"]),
        outputs=tuple(Tensor(*fields) for fields in table["outputs"]),
    )


_TABLE: Mapping[str, Any] = _plugin.description()

MOE = _operator(_TABLE["moe"])
"""`AdaptiveKMoe`."""

MAMBA = _operator(_TABLE["mamba"])
"""`Mamba2`."""

POLICY_KINDS: dict[str, int] = dict(_TABLE["policy_kinds"])
"""What a policy row may decide k by, and its number in the input `policy_kind`."""

WEIGHT_FORMATS = {fields[0]: WeightFormat(*fields) for fields in _TABLE["weight_formats"]}
"""The formats of weights by their names. A target refuses one that it does not compute."""

GATED_ACTIVATIONS: tuple[str, ...] = tuple(_TABLE["gated_activations"])
"""Activations whose up-projection is two, the gate's first."""

MAX_K: int = _TABLE["max_k"]
"""Most experts that a policy may name, and that a GPU runs for a token."""

MAX_EXPERTS_ON_GPU: int = _TABLE["max_experts_on_gpu"]
"""Most experts of a layer on a GPU."""

MAX_STATE_SIZE_ON_GPU: int = _TABLE["max_state_size_on_gpu"]
"""Largest state of a Mamba-2 head on a GPU."""
