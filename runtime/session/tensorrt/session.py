# SPDX-License-Identifier: Apache-2.0
"""The session on a GPU: caches by slot in device memory, a step as executions of the engine on one stream."""

from __future__ import annotations

from dataclasses import fields
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.engine_config import EngineConfig
from adaptive_k_moe.engine_format.tensorrt import (
    ALIGNMENT,
    ENGINE_NAME,
    ITEM_SIZES,
    Binding,
    make_bindings,
    slots_that_cannot_be_bound,
)
from adaptive_k_moe.errors import DeviceError, DeviceMemoryError, EngineError, PolicyError
from adaptive_k_moe.policy import PolicyTables
from adaptive_k_moe.runtime.session.base import EngineSession, StepInput, StepOutput
from adaptive_k_moe.runtime.session.tensorrt.buffers import Cache, Mirror, PolicyBuffers, Readback
from adaptive_k_moe.runtime.session.tensorrt.cuda import Cuda, aligned, import_cudart
from adaptive_k_moe.runtime.session.tensorrt.decode import DecodeRunner
from adaptive_k_moe.runtime.session.tensorrt.engine import TrtEngine, import_tensorrt
from adaptive_k_moe.runtime.session.tensorrt.plan import (
    DECODE,
    PREFILL,
    STEP_INPUTS,
    Execution,
    decoding,
    plan_step,
)
from adaptive_k_moe.runtime.session.tensorrt.slots import SlotMap

# Bytes for the logits of prompts; a chunk that asks for more takes several executions.
_LOGITS_BYTES = 64 << 20


class TensorRtSession(EngineSession):
    """One engine on the present GPU with its caches; see `Session` for the methods' contracts.

    A block is a slot: it holds a whole sequence, so what the scheduler calls a block table has one entry, and a
    sequence that was admitted never lacks another block. Recurrent states lie in the slots, too, so there are no
    state slots besides.

    Args:
        engine_dir: an engine directory of the target "tensorrt".
        config: its configuration.
        kv_cache_max_tokens: tokens that the caches hold over all sequences, in whole slots of `max_seq_len`; None is
            `max_batch_size` slots.

    Raises:
        DependencyError: TensorRT or cuda-python is not installed.
        DeviceError: there is no GPU.
        DeviceMemoryError: there is no room on it.
        EngineError: the engine cannot be loaded, or is not what its configuration says.
    """

    def __init__(self, engine_dir: str | Path, config: EngineConfig, *, kv_cache_max_tokens: int | None = None) -> None:
        self._config = config
        self._lost: str | None = None
        self._engine: TrtEngine | None = None
        build = config.build_config
        self._num_slots = build.max_batch_size
        if kv_cache_max_tokens is not None:
            self._num_slots = max(1, min(self._num_slots, kv_cache_max_tokens // build.max_seq_len))
        self._slots = SlotMap(self._num_slots)
        moe = config.pretrained_config.moe
        self._load_shape = (config.pretrained_config.num_moe_layers, moe.num_experts)
        self._expert_load = np.zeros(self._load_shape, np.int64)
        table = make_bindings(config.pretrained_config, build)
        if problem := slots_that_cannot_be_bound(table):
            raise EngineError(f"{engine_dir} cannot be run: {problem} and build it again.")
        trt = import_tensorrt()
        self._cuda = Cuda(import_cudart())
        try:
            self._stream = self._cuda.make_stream()
            self._copy_stream = self._cuda.make_stream()
            self._computed = self._cuda.make_event()
            self._engine = TrtEngine(trt, Path(engine_dir) / ENGINE_NAME, self._cuda)
            self._engine.require(table)
            self._prefill = self._engine.create_context(PREFILL, self._stream)
            self._decode = DecodeRunner(self._engine, self._cuda, self._stream)
            self._allocate(table)
        except DeviceMemoryError as error:
            self.close()
            slot = sum(binding.slot_bytes for binding in table if binding.in_place_of is not None)
            raise DeviceMemoryError(
                f"{engine_dir} does not fit on this GPU: {error} A sequence of {build.max_seq_len} tokens takes "
                f"{slot / 1e6:.1f} MB; give a --kv_cache_max_tokens of fewer than "
                f"{self._num_slots * build.max_seq_len}, or build it with a smaller max_batch_size or max_seq_len."
            ) from None
        except BaseException:
            self.close()
            raise

    @property
    def block_size(self) -> int:
        """Tokens that one slot holds: a whole sequence's."""
        return self._config.build_config.max_seq_len

    @property
    def num_blocks(self) -> int:
        """Slots that exist."""
        return self._num_slots

    @property
    def num_state_slots(self) -> int:
        """None of their own: recurrent states lie in their sequence's slot."""
        return 0

    def step(self, step: StepInput) -> StepOutput:
        """See `Session.step`.

        Raises:
            DeviceError: the GPU failed. If it can go on, so can the session: the next step finds it as it was, but
                for the caches of the sequences of this step.
        """
        if self._lost is not None:
            raise DeviceError(self._lost)
        try:
            return self._run(step)
        except BaseException as error:
            self._settle(error)
            raise

    def set_policies(self, tables: PolicyTables) -> None:
        """See `Session.set_policies`.

        Raises:
            PolicyError: the tables have more rows or columns than the engine takes; nothing is changed.
        """
        for name, most in self._policies.shapes.items():
            shape = getattr(tables, name).shape
            if len(shape) != len(most) or any(size > limit for size, limit in zip(shape, most, strict=True)):
                raise PolicyError(f"the policies' {name} is {list(shape)}, and this engine takes at most {list(most)}.")
        self._policies.write(tables, self._stream)
        self._cuda.synchronize(self._stream)

    def expert_load(self) -> npt.NDArray[np.int64]:
        """See `CountsExperts.expert_load`."""
        return self._expert_load  # a step makes another, so that threads see one whole

    def close(self) -> None:
        """See `Session.close`."""
        if self._engine is not None:
            self._engine.close()
        self._cuda.close()

    # Memory

    def _allocate(self, table: list[Binding]) -> None:
        """Caches, policy tables, and room for a step's inputs and outputs, all for as long as the session lives."""
        model, build = self._config.pretrained_config, self._config.build_config
        self._present = {binding.in_place_of: binding.name for binding in table if binding.in_place_of is not None}
        tables = {field.name for field in fields(PolicyTables)}
        inputs = [binding for binding in table if binding.is_input]
        self._dynamic = {b.name for b in inputs if any(isinstance(size, str) for size in b.shape)}
        self._step_inputs = [b for b in inputs if b.name not in tables and b.name not in self._present]
        if unknown := [b.name for b in self._step_inputs if b.name not in STEP_INPUTS]:
            raise EngineError(f"the engine has an input {unknown[0]!r}, which this release does not know.")

        caches = [binding for binding in inputs if binding.name in self._present]
        self._caches = [Cache(self._cuda, binding, self._num_slots) for binding in caches]
        for cache in self._caches:
            cache.clear_all(self._stream)
        self._scratch = self._cuda.allocate(max((cache.slot_bytes for cache in self._caches), default=0))
        self._policies = PolicyBuffers(self._cuda, [binding for binding in inputs if binding.name in tables])

        tokens = build.max_num_tokens
        self._max_chunk = next(b for b in inputs if b.name == "input_ids").profiles[PREFILL].max[1]
        row = model.vocab_size * ITEM_SIZES["float32"]
        self._max_logits = max(1, min(_LOGITS_BYTES // row, self._max_chunk))
        self._logits = Readback(self._cuda, aligned(self._num_slots * row) + aligned(self._max_logits * row))
        # One for each sequence, and one more for each cut of a chunk that is too long or asks for too many logits.
        executions = 1 + self._num_slots + tokens // self._max_chunk + tokens // self._max_logits
        padding = executions * ALIGNMENT
        load = aligned(prod(self._load_shape) * ITEM_SIZES["int32"])
        records = 2 * (tokens * model.num_moe_layers * ITEM_SIZES["int32"] + padding) + executions * load
        self._records = Readback(self._cuda, records)
        # No input of an execution has more elements than the execution has tokens.
        widths = [ITEM_SIZES[binding.dtype] for binding in self._step_inputs]
        self._staging = Mirror(self._cuda, sum(tokens * width + padding for width in widths))
        self._cuda.synchronize(self._stream)

    # A step

    def _run(self, step: StepInput) -> StepOutput:
        self._gather(step)
        # Before they are written: a step that fails may have written them or not.
        for table, past, new in zip(step.block_tables, step.past_lens, np.diff(step.subsequence_begins), strict=True):
            self._slots.fill(table[0], int(past + new))
        executions = plan_step(step, self._slots, max_chunk=self._max_chunk, max_logits=self._max_logits)
        output = StepOutput(
            logits=np.empty((len(step.logits_indices), self.vocab_size), np.float32),
            k=np.empty((len(step.input_ids), self.num_moe_layers), np.int32),
            entropy=np.empty((len(step.input_ids), self.num_moe_layers), np.float32),
            reads=(reads := np.empty(self.num_moe_layers, np.int32)),
        )
        loads = np.empty((len(executions), *self._load_shape), np.int32)
        # All inputs of the step in one copy. Decode is the first, so its addresses are those of every such step.
        self._staging.reset()
        staged = [self._stage(execution) for execution in executions]
        self._staging.upload(self._stream)
        for index, (execution, addresses) in enumerate(zip(executions, staged, strict=True)):
            self._execute(execution, addresses, output, loads[index : index + 1])
        self._cuda.synchronize(self._stream)
        self._logits.deliver()
        self._cuda.synchronize(self._copy_stream)
        self._records.deliver()
        reads[:] = np.count_nonzero(loads, axis=2).sum(axis=0)
        self._expert_load = self._expert_load + loads.sum(axis=0)
        return output

    def _gather(self, step: StepInput) -> None:
        """Clear the slots of new sequences, and bring those that decode to the first places."""
        try:
            for table, past in zip(step.block_tables, step.past_lens, strict=True):
                if past == 0 and (extent := self._slots.extent(table[0])):
                    for cache in self._caches:
                        cache.clear(self._slots.place(table[0]), extent, self._stream)
                    self._slots.clear(table[0])
            for exchange in self._slots.gather([step.block_tables[sequence][0] for sequence in decoding(step)]):
                for cache in self._caches:
                    cache.exchange(exchange, self._scratch, self._stream)
        except DeviceError as error:
            # Caches of sequences that are not in this step may be torn now.
            self._lose(error)
            raise

    def _stage(self, execution: Execution) -> dict[str, int]:
        """Write an execution's inputs where the copy to the GPU takes them from; their addresses there."""
        addresses = {}
        for binding in self._step_inputs:
            array = execution.inputs[binding.name]
            offset = self._staging.take(array.size * ITEM_SIZES[binding.dtype])
            self._staging.view(offset, binding.dtype, *array.shape)[...] = array
            addresses[binding.name] = self._staging.address(offset)
        return addresses

    def _execute(
        self, execution: Execution, staged: dict[str, int], output: StepOutput, load: npt.NDArray[np.int32]
    ) -> None:
        """Run the engine once, and let its outputs be copied back beside what comes next; `load` is [1, L, E]."""
        logits_size = len(execution.inputs["logits_indices"]) * self.vocab_size * output.logits.itemsize
        if not self._logits.has_room(logits_size):
            self._cuda.synchronize(self._stream)
            self._logits.deliver()
        logits = self._logits.take(logits_size)
        record_size = len(execution.rows) * self.num_moe_layers * output.k.itemsize
        k, entropy = self._records.take(record_size), self._records.take(record_size)
        expert_load = self._records.take(load.nbytes)

        addresses = staged | self._policies.addresses
        addresses |= {"logits": self._logits.address(logits)}
        addresses |= {"k": self._records.address(k), "entropy": self._records.address(entropy)}
        addresses |= {"expert_load": self._records.address(expert_load)}
        for cache in self._caches:
            addresses[cache.name] = addresses[self._present[cache.name]] = cache.bound_address(execution.place)
        shapes = {name: array.shape for name, array in execution.inputs.items()} | self._policies.shapes
        shapes |= {cache.name: cache.bound_shape(execution.batch) for cache in self._caches}
        shapes = {name: shape for name, shape in shapes.items() if name in self._dynamic}
        if execution.profile == DECODE:
            self._decode.run(execution.batch, shapes, addresses)
        else:
            self._prefill.bind(shapes, addresses)
            self._prefill.enqueue(self._stream)

        self._logits.fetch(logits, execution.logits_from, output.logits, execution.logits_to, self._stream)
        # What was routed on a stream of their own, so that the next execution need not wait for them.
        self._cuda.record(self._computed, self._stream)
        self._cuda.wait(self._copy_stream, self._computed)
        every = np.arange(len(execution.rows))
        self._records.fetch(k, every, output.k, execution.rows, self._copy_stream)
        self._records.fetch(entropy, every, output.entropy, execution.rows, self._copy_stream)
        self._records.fetch(expert_load, every[:1], load, every[:1], self._copy_stream)

    def _settle(self, error: BaseException) -> None:
        """After a failure: wait for what is under way, so that the next step can begin; note if that fails, too."""
        self._logits.reset()
        self._records.reset()
        try:
            self._cuda.synchronize(self._stream)
            self._cuda.synchronize(self._copy_stream)
        except DeviceError:
            self._lose(error)

    def _lose(self, error: BaseException) -> None:
        self._lost = f"the GPU takes no more work since an earlier failure ({error}): start the server again."
