# SPDX-License-Identifier: Apache-2.0
"""The session on torch: the engine's graph over paged keys and values and states in slots, on a GPU or a CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch

from adaptive_k_moe.engine_config import EngineConfig
from adaptive_k_moe.engine_format.torch import ENGINE_ONNX, PAGED_ATTENTION
from adaptive_k_moe.errors import DeviceError, DeviceMemoryError, EngineError
from adaptive_k_moe.model_config import Device, KvCacheDtype
from adaptive_k_moe.plugin.description import MAMBA, MOE
from adaptive_k_moe.policy import PolicyTables
from adaptive_k_moe.runtime.session.base import EngineSession, StepInput, StepOutput
from adaptive_k_moe.runtime.session.torch.attention import Group, PagedCache
from adaptive_k_moe.runtime.session.torch.decode import (
    POLICY,
    POSITION,
    SLOT,
    TABLE,
    TOKEN,
    DecodeRunner,
    with_idle_row,
)
from adaptive_k_moe.runtime.session.torch.graph import Graph
from adaptive_k_moe.runtime.telemetry import logger

_BLOCK_SIZE = 16

# Memory that the KV cache takes at most unless the caller says how many tokens it must hold: bytes on a CPU, a share of
# what the weights leave free on a GPU.
_CPU_CACHE_BYTES = 4 << 30
_GPU_CACHE_SHARE = 0.8

Tensors = Mapping[str, Any]


class _Outputs(NamedTuple):
    """On the device: logits [N, V], k and entropy [T, L], tokens of each expert [L, E]."""

    logits: Any
    k: Any
    entropy: Any
    load: Any


_F = TypeVar("_F", bound=Callable[..., Any])
_for_inference = cast(Callable[[_F], _F], torch.inference_mode())


class TorchSession(EngineSession):
    """One engine on a device of torch; see `Session` for the methods' contracts.

    Args:
        engine_dir: an engine directory of the target "torch".
        config: its configuration.
        num_threads: threads of torch in this process, on a CPU; None leaves them as they are.
        kv_cache_max_tokens: tokens that the KV cache holds over all sequences; None is enough for `max_batch_size`
            sequences of `max_seq_len`, within 4 GiB on a CPU and 80 % of the free memory on a GPU.
        kv_cache_dtype: "auto" or the engine's dtype.
        device: "cpu" or "cuda", the first GPU that CUDA_VISIBLE_DEVICES leaves; None is a GPU where torch finds one.
        pad_decode: run steps of decode in padded shapes, as CUDA graphs; None does on a GPU.

    Raises:
        DeviceError: there is no GPU.
        DeviceMemoryError: there is no room for weights and caches.
        EngineError: the device does not compute in the engine's dtype, or there is no cache of the dtype asked for.
    """

    def __init__(
        self,
        engine_dir: str | Path,
        config: EngineConfig,
        *,
        num_threads: int | None = None,
        kv_cache_max_tokens: int | None = None,
        kv_cache_dtype: KvCacheDtype = "auto",
        device: Device | None = None,
        pad_decode: bool | None = None,
    ) -> None:
        self._config = config
        model, build = config.pretrained_config, config.build_config
        self._device = _find_device(device)
        if kv_cache_dtype not in ("auto", model.dtype):
            raise EngineError(
                f"attention of this engine computes in {model.dtype} and has no KV cache in {kv_cache_dtype}: "
                f"kv_cache_dtype is auto or {model.dtype}."
            )
        if model.dtype == "float16" and self._device.type == "cpu":
            raise EngineError(
                f"{engine_dir} computes in float16, which CPUs do not: open it on a GPU, or build it with --dtype "
                "bfloat16 or float32."
            )
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._dtype = getattr(torch, model.dtype)
        operators = {PAGED_ATTENTION: self._attend, MOE.name: self._moe, MAMBA.name: self._mamba}
        try:
            self._graph: Graph | None = Graph(Path(engine_dir) / ENGINE_ONNX, self._device, operators)
            self._allocate(kv_cache_max_tokens)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):  # as on a CPU
                raise
            reason = str(error).strip().splitlines()[0]
            raise DeviceMemoryError(
                f"{engine_dir} does not fit on {self._device.type}: {reason} Give a smaller --kv_cache_max_tokens, or "
                "build it with a smaller max_batch_size or max_seq_len."
            ) from None
        self._groups: Sequence[Group] = ()
        self._loads: list[Any] = []
        self._policies: dict[str, Any] = {}
        self._decode: DecodeRunner | None = None
        if pad_decode or (pad_decode is None and self._device.type == "cuda"):
            self._decode = DecodeRunner(
                self._run_padded,
                self._device,
                build.max_batch_size,
                -(-build.max_seq_len // _BLOCK_SIZE),
                self._cache.idle_block,
            )

    @property
    def block_size(self) -> int:
        """Tokens that one KV block holds."""
        return _BLOCK_SIZE

    @property
    def num_blocks(self) -> int:
        """KV blocks that exist."""
        return self._num_blocks

    @_for_inference
    def step(self, step: StepInput) -> StepOutput:
        """See `Session.step`."""
        tokens = len(step.input_ids)
        if self._decode is not None and tokens == len(step.block_tables):
            found = self._decode.run(step)
            wanted = self._on_device(step.logits_indices)  # in a padded step every row has logits
            found = found._replace(logits=found.logits[wanted])
        else:
            found = self._run_packed(step)
        return StepOutput(
            logits=found.logits.cpu().numpy(),
            k=found.k[:tokens].cpu().numpy(),
            entropy=found.entropy[:tokens].cpu().numpy(),
            reads=(found.load > 0).sum(dim=1, dtype=torch.int32).cpu().numpy(),
        )

    @_for_inference
    def set_policies(self, tables: PolicyTables) -> None:
        """See `Session.set_policies`."""
        kind, thresholds, k_values = with_idle_row(tables)
        arrays = {"policy_kind": kind, "thresholds": thresholds, "k_values": k_values}
        arrays["expert_norms"] = tables.expert_norms
        self._policies = {name: torch.tensor(array).to(self._device) for name, array in arrays.items()}
        if self._decode is not None:
            self._decode.forget(len(kind) - 1)

    def expert_load(self) -> npt.NDArray[np.int64]:
        """See `CountsExperts.expert_load`; where decode is padded, idle rows count for experts that others read."""
        load: npt.NDArray[np.int64] = self._expert_load.cpu().numpy().copy()
        return load

    def close(self) -> None:
        """See `Session.close`."""
        self._graph = self._decode = None
        self._cache.layers.clear()
        self._states.clear()

    # Memory

    @_for_inference
    def _allocate(self, max_tokens: int | None) -> None:
        """Caches, states and counters, for as long as the session lives."""
        model, build = self._config.pretrained_config, self._config.build_config
        heads = model.num_attention_heads, model.num_key_value_heads
        block_bytes = 2 * len(model.attention_layers) * _BLOCK_SIZE * heads[1] * model.head_dim * self._dtype.itemsize
        # The operator's own rule: on a CPU all states are float32.
        conv_dtype = torch.float32 if self._device.type == "cpu" else self._dtype
        self._states: dict[str, Any] = {}
        if model.mamba is not None:
            slots = build.max_batch_size
            for layer in model.mamba.layers:
                for name, shape, dtype in (
                    ("conv_state", model.mamba.conv_state_shape, conv_dtype),
                    ("ssm_state", model.mamba.ssm_state_shape, torch.float32),
                ):
                    self._states[f"{name}.{layer}"] = torch.zeros(slots, *shape, dtype=dtype, device=self._device)
        self._expert_load = torch.zeros(model.num_moe_layers, model.num_experts, dtype=torch.int64, device=self._device)
        per_sequence = -(-build.max_seq_len // _BLOCK_SIZE)
        if max_tokens is None:
            room = _CPU_CACHE_BYTES
            if self._device.type == "cuda":
                room = int(_GPU_CACHE_SHARE * torch.cuda.mem_get_info(self._device)[0])
            self._num_blocks = build.max_batch_size * per_sequence
            if block_bytes:
                self._num_blocks = max(per_sequence, min(self._num_blocks, room // block_bytes))
        else:
            self._num_blocks = max(1, max_tokens // _BLOCK_SIZE)
        self._cache = PagedCache(
            model.attention_layers,
            self._num_blocks,
            _BLOCK_SIZE,
            heads,
            model.head_dim,
            self._dtype,
            self._device,
            model.sliding_window,
        )

    # A step

    def _run_packed(self, step: StepInput) -> _Outputs:
        """A step of any shape: sequences with one new token are attended to together, others one by one."""
        begins, new = step.subsequence_begins, np.diff(step.subsequence_begins)
        members = [[int(index)] for index in np.flatnonzero(new > 1)]
        if (new == 1).any():
            members.append(np.flatnonzero(new == 1).tolist())
        groups = []
        for sequences in members:
            rows = np.concatenate([np.arange(begins[index], begins[index + 1]) for index in sequences])
            tables = [step.block_tables[index] for index in sequences]
            table = np.zeros((len(tables), max(map(len, tables))), np.int64)
            for row, blocks in zip(table, tables, strict=True):
                row[: len(blocks)] = blocks
            positions = step.position_ids[rows].reshape(len(tables), -1)
            where = None if len(members) == 1 else self._on_device(rows)
            groups.append(self._cache.group(where, self._on_device(table), self._on_device(positions)))
        feeds: dict[str, np.ndarray[Any, Any]] = {
            "input_ids": step.input_ids[None],
            "position_ids": step.position_ids[None],
            "policy_index": step.policy_index,
            "logits_indices": step.logits_indices,
            "past_lens": step.past_lens,
            "subsequence_begins": step.subsequence_begins,
        }
        if step.state_slots is not None:
            feeds["state_slots"] = step.state_slots
        return self._run({name: self._on_device(array) for name, array in feeds.items()}, groups)

    @_for_inference
    def _run_padded(self, rows: Any) -> _Outputs:
        """A padded step of decode; see `DecodeRunner`."""
        position = rows[:, POSITION].contiguous()
        every = torch.arange(len(rows) + 1, device=self._device)
        feeds = {
            "input_ids": rows[None, :, TOKEN].long(),
            "position_ids": position[None].long(),
            "policy_index": rows[:, POLICY],
            "logits_indices": every[:-1],
            "past_lens": position,
            "subsequence_begins": every.int(),
            "state_slots": rows[:, SLOT],
        }
        return self._run(feeds, [self._cache.group(None, rows[:, TABLE:].long(), position[:, None].long())])

    def _run(self, feeds: Tensors, groups: Sequence[Group]) -> _Outputs:
        assert self._graph is not None
        self._groups, self._loads = groups, []
        logits, k, entropy = self._graph.run({**feeds, **self._policies, **self._states})
        load = torch.stack(self._loads)
        self._expert_load += load
        return _Outputs(logits, k, entropy, load)

    def _on_device(self, array: npt.NDArray[Any]) -> Any:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    # The graph's operators

    def _attend(self, attributes: Mapping[str, Any], *states: Any) -> Any:
        return self._cache.attend(self._groups, attributes, *states)

    def _moe(self, attributes: Mapping[str, Any], *inputs: Any) -> Sequence[Any]:
        """The experts' weighted sum, k and entropy. Where experts are spread over devices, partial sums meet here."""
        model = self._config.pretrained_config
        given = {"correction_bias": model.moe.correction_bias, "quantised": model.quantization is not None}
        given["has_expert_norms"] = bool(attributes["has_expert_norms"])
        names = MOE.input_names(*(name for name, there in given.items() if there))
        words = {name: value for name, value in attributes.items() if name != "has_expert_norms"}
        words["norm_topk_prob"] = bool(words["norm_topk_prob"])
        tensors = {name.lower(): value for name, value in zip(names, inputs, strict=True)}
        output, k, entropy, load = torch.ops.adaptive_k.moe(**tensors, **words)
        self._loads.append(load)
        return output, k, entropy

    def _mamba(self, attributes: Mapping[str, Any], *inputs: Any) -> Any:
        tensors = {name.lower(): value for name, value in zip(MAMBA.input_names(), inputs, strict=True)}
        dtype = tensors["conv_input"].dtype
        for name in ("conv_input", "dt"):
            tensors[name] = tensors[name].to(tensors["conv_state"].dtype)
        return torch.ops.adaptive_k.mamba2(**tensors, **attributes).to(dtype)


def _find_device(asked: Device | None) -> Any:
    """Torch's device.

    Raises:
        DeviceError: it is not there.
    """
    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise DeviceError("torch finds no GPU for --device cuda: install a torch with CUDA, or give --device cpu.")
    if asked is None and not there:
        logger.warning("torch finds no GPU, so the engine runs on the CPU.")
    return torch.device("cuda", 0) if there and asked != "cpu" else torch.device("cpu")
