# SPDX-License-Identifier: Apache-2.0
"""The session on a CPU: OpenVINO with paged attention and the extension's `AdaptiveKMoe`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.engine_config import EngineConfig
from adaptive_k_moe.engine_format.openvino import ENGINE_XML, use_paged_attention
from adaptive_k_moe.errors import DependencyError, EngineError, PolicyError
from adaptive_k_moe.model_config import KvCacheDtype, PretrainedConfig
from adaptive_k_moe.policy import KIND_CONTRIBUTION, PolicyTables
from adaptive_k_moe.runtime.session.base import EngineSession, StepInput, StepOutput
from adaptive_k_moe.runtime.session.expert_load import ExpertLoad

# Memory that the KV cache takes at most unless the caller says how many tokens it must hold.
_DEFAULT_CACHE_BYTES = 4 << 30

# Tokens of a block in a model that caches no keys and values.
_EMPTY_BLOCK_SIZE = 32


class OpenVinoSession(EngineSession):
    """One compiled engine with its KV cache; see `Session` for the methods' contracts.

    Args:
        engine_dir: an engine directory of the target "openvino".
        config: its configuration.
        num_threads: threads of the engine; None is one for each core that the process may use.
        kv_cache_max_tokens: tokens that the KV cache holds over all sequences; None is enough for
            `max_batch_size` sequences of `max_seq_len`, within 4 GiB.
        kv_cache_dtype: of keys and values; "auto" is what attention computes in.
        prepare: changes the graph before it is compiled; `output` reads what it lets the graph put out.
        profile: takes the time of each operator, for `profile`.

    Raises:
        DependencyError: OpenVINO is not installed.
        EngineError: the engine cannot be loaded or compiled, or has no cache of the dtype asked for.
    """

    def __init__(
        self,
        engine_dir: str | Path,
        config: EngineConfig,
        *,
        num_threads: int | None = None,
        kv_cache_max_tokens: int | None = None,
        kv_cache_dtype: KvCacheDtype = "auto",
        prepare: Callable[[Any], None] | None = None,
        profile: bool = False,
    ) -> None:
        self._config = config
        self._ov = _import_openvino()
        self._request: Any = None
        self._num_steps = 0
        self._compile(Path(engine_dir), num_threads, kv_cache_dtype, prepare, profile)
        self._allocate_cache(kv_cache_max_tokens)
        self._allocate_states()

    @property
    def block_size(self) -> int:
        """Tokens that one KV block holds."""
        return self._block_size

    @property
    def num_blocks(self) -> int:
        """KV blocks that exist."""
        return self._num_blocks

    def step(self, step: StepInput) -> StepOutput:
        """See `Session.step`."""
        begins = np.zeros(len(step.block_tables) + 1, np.int32)
        np.cumsum([len(table) for table in step.block_tables], out=begins[1:])
        blocks = np.fromiter((block for table in step.block_tables for block in table), np.int32, begins[-1])
        new = np.diff(step.subsequence_begins)
        arrays: dict[str, npt.NDArray[Any]] = {
            "input_ids": step.input_ids,
            "position_ids": step.position_ids,
            "logits_indices": step.logits_indices,
            "policy_index": step.policy_index,
            "past_lens": step.past_lens,
            "subsequence_begins": step.subsequence_begins,
            "block_indices": blocks,
            "block_indices_begins": begins,
            "max_context_len": np.array((step.past_lens + new).max(), np.int32),
        }
        if step.state_slots is not None:
            arrays["state_slots"] = step.state_slots
        for name in self._inputs & arrays.keys():
            array = arrays[name]
            # Shared, not copied: `arrays` keeps them alive until the step is over.
            self._request.set_tensor(name, self._ov.Tensor(array, shared_memory=array.ndim > 0))
        self._request.infer()
        self._num_steps += 1
        logits, k, entropy = (self._request.get_tensor(name).data.copy() for name in ("logits", "k", "entropy"))
        return StepOutput(logits.reshape(-1, self.vocab_size), k, entropy, self._expert_load.reads_of_step())

    def set_policies(self, tables: PolicyTables) -> None:
        """See `Session.set_policies`."""
        if "expert_norms" not in self._inputs and (tables.policy_kind == KIND_CONTRIBUTION).any():
            raise PolicyError(
                "this engine was built by a release without the policy kind 'contribution': build it again, or remove "
                "the policies of that kind."
            )
        for name in {"policy_kind", "thresholds", "k_values", "expert_norms"} & self._inputs:
            self._request.set_tensor(name, self._ov.Tensor(getattr(tables, name)))

    def expert_load(self) -> npt.NDArray[np.int64]:
        """See `CountsExperts.expert_load`."""
        return self._expert_load.read()

    def output(self, name: str) -> npt.NDArray[Any]:
        """An output of the last step by its name in the graph; overwritten by the next step."""
        data: npt.NDArray[Any] = self._request.get_tensor(name).data
        return data

    def profile(self) -> dict[str, float]:
        """Seconds in each type of operator over all steps so far, of a session that was opened with `profile`."""
        found: dict[str, float] = {}
        for info in self._request.profiling_info:
            # The plugin calls an extension's operators by the way in which it runs them, and its times are means.
            kind = self._types.get(info.node_name, info.node_type) if info.node_type == "Reference" else info.node_type
            found[kind] = found.get(kind, 0.0) + info.real_time.total_seconds() * self._num_steps
        return found

    def close(self) -> None:
        """See `Session.close`."""
        self._request = None

    def _compile(
        self,
        engine_dir: Path,
        num_threads: int | None,
        kv_cache_dtype: KvCacheDtype,
        prepare: Callable[[Any], None] | None,
        profile: bool,
    ) -> None:
        from adaptive_k_moe.plugin import openvino_extension_path

        core = self._ov.Core()
        options = {
            **precision_options(self._config.pretrained_config, kv_cache_dtype, core),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": str(num_threads or 0),
            "PERF_COUNT": "YES" if profile else "NO",
        }
        try:
            core.add_extension(str(openvino_extension_path()))
            graph = core.read_model(engine_dir / ENGINE_XML)
            use_paged_attention(graph, self._config.pretrained_config)
            self._expert_load = ExpertLoad(graph, self._config.pretrained_config.moe.num_experts)
            if prepare is not None:
                prepare(graph)
            self._types = {node.get_friendly_name(): node.get_type_name() for node in graph.get_ordered_ops()}
            self._request = core.compile_model(graph, "CPU", options).create_infer_request()
            # A model without rotary embedding takes no positions, one without attention no blocks.
            self._inputs = {port.get_any_name() for port in self._request.get_compiled_model().inputs}
            for name, tensor in self._expert_load.tensors.items():
                self._request.set_tensor(name, tensor)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise EngineError(f"OpenVINO cannot load the engine in {engine_dir}: {reason}") from error

    def _allocate_cache(self, max_tokens: int | None) -> None:
        build, ov = self._config.build_config, self._ov
        ports = [port for port in self._request.get_compiled_model().inputs if "_cache." in port.get_any_name()]
        shapes = {port: [dim.get_length() for dim in list(port.get_partial_shape())[1:]] for port in ports}
        # [blocks, KV heads, tokens of a block, head_dim]. With int8, values have their scales at the end of each
        # token's row, and keys have more rows, for scales by channel: only values tell how many tokens there are.
        # A model without attention has blocks of no bytes: they still say how many tokens its sequences may have.
        sizes = [shape[1] for port, shape in shapes.items() if port.get_any_name().startswith("value_cache.")]
        self._block_size = int(sizes[0]) if sizes else _EMPTY_BLOCK_SIZE
        block_bytes = sum(int(np.prod(shape)) * port.get_element_type().size for port, shape in shapes.items())
        per_sequence = -(-build.max_seq_len // self._block_size)
        if max_tokens is None:
            wanted = build.max_batch_size * per_sequence
            if block_bytes:
                wanted = max(per_sequence, min(wanted, _DEFAULT_CACHE_BYTES // block_bytes))
            self._num_blocks: int = wanted
        else:
            self._num_blocks = max(1, max_tokens // self._block_size)
        try:
            self._cache = {
                port.get_any_name(): ov.Tensor(port.get_element_type(), ov.Shape([self._num_blocks, *shape]))
                for port, shape in shapes.items()
            }
        except (RuntimeError, TypeError, MemoryError):  # OpenVINO says bad_alloc, or that the number is no size
            raise EngineError(
                f"this machine has no memory for a KV cache of {self._num_blocks * self._block_size} tokens, "
                f"{self._num_blocks * block_bytes / 1e9:.1f} GB: give it fewer max_tokens."
            ) from None
        for name, tensor in self._cache.items():
            self._request.set_tensor(name, tensor)

    def _allocate_states(self) -> None:
        """The recurrent states of all slots. The operator updates them in place and reads only what it wrote."""
        mamba, ov = self._config.pretrained_config.mamba, self._ov
        self._states: dict[str, npt.NDArray[np.float32]] = {}
        if mamba is None:
            return
        for name, shape in (("conv_state", mamba.conv_state_shape), ("ssm_state", mamba.ssm_state_shape)):
            for layer in mamba.layers:
                self._states[f"{name}.{layer}"] = _empty_floats(self.num_state_slots, *shape)
        for name, array in self._states.items():
            self._request.set_tensor(name, ov.Tensor(array, shared_memory=True))


def precision_options(model: PretrainedConfig, kv_cache_dtype: KvCacheDtype, core: Any) -> dict[str, str]:
    """What OpenVINO is told about the precision of products, attention and KV cache.

    An engine of dtype float32 computes in float32 on every machine, and so does one whose integers are to meet exact
    activations (A16). Attention, norms and the cache of others take bfloat16 where the processor has it; products
    with stored weights are the extension's own.

    Args:
        model: the engine's.
        kv_cache_dtype: as asked for.
        core: OpenVINO's, which knows the processor.

    Raises:
        EngineError: attention has no cache of this dtype.
    """
    quantization = model.quantization
    rounds = quantization is not None and quantization.rounds_activations
    half = model.dtype == "bfloat16" and (quantization is None or rounds)
    half = half and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    computed: KvCacheDtype = "bfloat16" if half else "float32"
    if kv_cache_dtype not in ("auto", "int8", computed):
        raise EngineError(
            f"attention of this engine computes in {computed} on this machine and has no KV cache in {kv_cache_dtype}: "
            f"kv_cache_dtype is auto, {computed} or int8."
        )
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
        "KV_CACHE_PRECISION": "u8" if kv_cache_dtype == "int8" else "bf16" if half else "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",  # where activations may be rounded, the extension's products do it
    }


def _import_openvino() -> Any:
    try:
        import openvino
    except ModuleNotFoundError:
        raise DependencyError(
            "running an engine on a CPU needs OpenVINO: install it with pip install 'adaptive-k-moe[engine]'."
        ) from None
    return openvino


def _empty_floats(*shape: int) -> npt.NDArray[np.float32]:
    """An array that begins at a cache line, by NumPy, since it asks for large pages: the scan is a quarter faster."""
    count, line = int(np.prod(shape)), 16
    storage = np.empty(count + line, np.float32)
    start = -storage.ctypes.data // storage.itemsize % line
    return storage[start : start + count].reshape(shape)
