# SPDX-License-Identifier: Apache-2.0
"""What a TensorRT engine takes and gives: one table, which the lowering, the profiles and a session all follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from adaptive_k_moe.engine_config import BuildConfig
from adaptive_k_moe.model_config import PretrainedConfig
from adaptive_k_moe.policy import MAX_CHOICES, MAX_POLICIES

ENGINE_NAME = "rank0.engine"
"""The engine's file in its directory."""

PROFILES = ("decode", "prefill")
"""The engine's optimization profiles, by index: one token for each sequence, and a chunk of one sequence."""

DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64"}
"""TensorRT's names of types, and ours."""

ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int64": 8}
"""Bytes of a value of each type."""

ALIGNMENT = 256
"""Bytes of which every address that TensorRT is given has to be a multiple."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """The smallest, the usual and the largest shape of a binding in one profile."""

    min: Shape
    opt: Shape
    max: Shape


@dataclass(frozen=True)
class Binding:
    """One input or output of the engine.

    Attributes:
        name: the tensor's name in the graph and in the engine.
        is_input: whether the caller fills it.
        dtype: "float32", "float16", "bfloat16", "int32" or "int64".
        shape: sizes, those known only at run time by name.
        profiles: its shapes' limits in each of `PROFILES`.
        in_place_of: for an output, the input whose memory it must be bound to.
    """

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int | str, ...]
    profiles: tuple[Limits, ...]
    in_place_of: str | None = None

    @property
    def slot_bytes(self) -> int:
        """Bytes of one sequence's part of a cache or state."""
        return ITEM_SIZES[self.dtype] * prod(self.profiles[0].min)


def cache_names(layer: int, kind: str) -> tuple[str, str]:
    """Names of a layer's cache ("key" or "value") before and after a step."""
    return f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"


def state_names(layer: int, kind: str) -> tuple[str, str]:
    """Names of a Mamba layer's states ("conv" or "ssm") before and after a step."""
    return f"{kind}_state.{layer}", f"present_{kind}_state.{layer}"


def symbol_ranges(build: BuildConfig) -> tuple[Mapping[str, tuple[int, int, int]], ...]:
    """The smallest, usual and largest value of every size that is known only at run time, for each profile."""
    batch, chunk = build.max_batch_size, min(build.max_num_tokens, build.max_seq_len)
    tables = {
        "num_policies": (1, 4, MAX_POLICIES),
        "num_choices": (2, 4, MAX_CHOICES),
        "num_limits": (1, 3, MAX_CHOICES - 1),
    }
    decode = dict.fromkeys(("batch", "num_tokens", "num_logits"), (1, batch, batch))
    tables["num_slots"] = (1, batch, batch)
    # One sequence a prefill step: its cache is bound at its slot, and the chunk needs no padding.
    prefill = {"sequence": (1, chunk, chunk), "num_tokens": (1, chunk, chunk), "num_logits": (1, 1, chunk)}
    return ({**tables, **decode, "sequence": (1, 1, 1)}, {**tables, **prefill, "batch": (1, 1, 1)})


def make_bindings(model: PretrainedConfig, build: BuildConfig) -> list[Binding]:
    """The engine's inputs and outputs, in order.

    The caches are [batch, heads, max_seq_len, head_dim]; a step writes each sequence's new keys and values at
    its `write_indices` and returns the same memory. A model with Mamba layers takes the states of all slots,
    [num_slots, conv_kernel - 1, channels] and [num_slots, heads, state_size, head_dim], and returns the same memory,
    too; `state_slots` names each sequence's place among them, or -1 for one whose states must stay as they are.
    """
    ranges = symbol_ranges(build)

    def binding(name: str, dtype: str, *shape: int | str, output: bool = False, of: str | None = None) -> Binding:
        def at(profile: Mapping[str, tuple[int, int, int]], which: int) -> Shape:
            return tuple(profile[size][which] if isinstance(size, str) else size for size in shape)

        limits = tuple(Limits(*(at(profile, which) for which in range(3))) for profile in ranges)
        return Binding(name, not output, dtype, shape, limits, of)

    moe_layers = model.num_moe_layers
    cache = ("batch", model.num_key_value_heads, build.max_seq_len, model.head_dim)
    pairs = [cache_names(layer, kind) for layer in model.attention_layers for kind in ("key", "value")]
    states: list[tuple[str, str, str, tuple[int | str, ...]]] = []
    if model.mamba is not None:
        for layer in model.mamba.layers:
            conv, ssm = model.mamba.conv_state_shape, model.mamba.ssm_state_shape
            states.append((*state_names(layer, "conv"), model.dtype, ("num_slots", *conv)))
            states.append((*state_names(layer, "ssm"), "float32", ("num_slots", *ssm)))
    return [
        binding("input_ids", "int64", "batch", "sequence"),
        binding("position_ids", "int64", "batch", "sequence"),
        binding("write_indices", "int64", "batch"),
        *([binding("state_slots", "int32", "batch")] if states else []),
        binding("logits_indices", "int64", "num_logits"),
        binding("policy_index", "int32", "num_tokens"),
        binding("policy_kind", "int32", "num_policies"),
        binding("thresholds", "float32", moe_layers, "num_policies", "num_limits"),
        binding("k_values", "int32", moe_layers, "num_policies", "num_choices"),
        binding("expert_norms", "float32", moe_layers, model.num_experts),
        *(binding(past, model.dtype, *cache) for past, _ in pairs),
        *(binding(past, dtype, *shape) for past, _, dtype, shape in states),
        binding("logits", "float32", "num_logits", model.vocab_size, output=True),
        binding("k", "int32", "num_tokens", moe_layers, output=True),
        binding("entropy", "float32", "num_tokens", moe_layers, output=True),
        binding("expert_load", "int32", moe_layers, model.num_experts, output=True),
        *(binding(present, model.dtype, *cache, output=True, of=past) for past, present in pairs),
        *(binding(present, dtype, *shape, output=True, of=past) for past, present, dtype, shape in states),
    ]


def slots_that_cannot_be_bound(table: list[Binding]) -> str | None:
    """Why TensorRT could not be given the addresses of single slots, which prefill needs; None if it can."""
    for binding in table:
        if binding.in_place_of is not None and binding.shape[0] == "batch" and binding.slot_bytes % ALIGNMENT:
            return (
                f"a sequence's part of {binding.in_place_of!r} has {binding.slot_bytes} bytes, and TensorRT takes "
                f"addresses at multiples of {ALIGNMENT} only: choose another max_seq_len"
            )
    return None
