# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's graph as the TensorRT target lowers it, run by ONNX Runtime step by step against `transformers`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
import transformers

from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_builder.targets.tensorrt_lowering import lower_graph
from adaptive_k_moe.engine_config import BuildConfig, EngineConfig
from adaptive_k_moe.engine_format.tensorrt import Binding, make_bindings
from adaptive_k_moe.model_config import Dtype, PretrainedConfig
from adaptive_k_moe.policy import PolicySet

from checkpoints import Shape, make_checkpoint
from nemotron_models import Nemotron, make_nemotron

SIZES: dict[str, Any] = {"max_batch_size": 3, "max_seq_len": 40, "max_num_tokens": 16}
POLICIES = {"policies": {"mixed": {"kind": "entropy", "thresholds": [1.0, 1.4], "k": [1, 2, 3]}}}

NUMPY = {"float32": np.float32, "float16": np.float16, "int32": np.int32, "int64": np.int64}


class Lowered:
    """A checkpoint's lowered graph, and ONNX Runtime in the place of the engine.

    It binds what the table says and nothing else, and checks every shape and type against the table.

    Args:
        directory: where checkpoint and graph go.
        shape: of the random model.
        dtype: of the graph.
        prepare: what is done to the model of `transformers` before it is asked.
        options: for `build`.
    """

    def __init__(
        self,
        directory: Path,
        shape: Shape | Nemotron,
        dtype: Dtype,
        *,
        prepare: Callable[[Any], None] | None = None,
        **options: Any,
    ) -> None:
        make = make_nemotron if isinstance(shape, Nemotron) else make_checkpoint
        self.checkpoint = make(directory / "checkpoint", shape)
        config = build(
            self.checkpoint,
            directory / "engine",
            target="onnx",
            dtype=dtype,
            policy=PolicySet.model_validate(POLICIES),
            **SIZES,
            **options,
        )
        self.config: EngineConfig = config
        self.model: PretrainedConfig = config.pretrained_config
        self.build: BuildConfig = config.build_config
        self.table = make_bindings(self.model, self.build)
        self.path = directory / "engine" / "model.onnx"
        self.proto = lower_graph(self.path, self.model, self.build)
        onnx.save(self.proto, self.path)
        self._session: Any = None
        self._reference: Any = None
        self._prepare = prepare
        self.tables = config.policy_tables()
        kept = {b.in_place_of for b in self.table if dtype != "bfloat16"}
        self.slots = {
            b.name: np.zeros((self.build.max_batch_size, *b.shape[1:]), NUMPY[b.dtype])
            for b in self.table
            if b.name in kept
        }

    def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._session is None:
            options = ort.SessionOptions()
            if self.model.quantization is not None:
                # Further ones multiply int8 weights with activations that are rounded to int8, too.
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
            self._session = ort.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        sizes: dict[str, int] = {}

        def check(binding: Binding, array: np.ndarray) -> None:
            assert array.dtype == NUMPY[binding.dtype], binding
            assert array.ndim == len(binding.shape), binding
            for size, found in zip(binding.shape, array.shape, strict=True):
                expected = sizes.setdefault(size, found) if isinstance(size, str) else size
                assert found == expected, (binding, array.shape, sizes)

        inputs = [b for b in self.table if b.is_input]
        outputs = [b for b in self.table if not b.is_input]
        assert [b.name for b in inputs] == list(feed)
        for binding in inputs:
            check(binding, feed[binding.name])
        given = dict(zip((b.name for b in outputs), self._session.run([b.name for b in outputs], feed), strict=True))
        for binding in outputs:
            check(binding, given[binding.name])
        return given

    def step(
        self,
        slots: list[int],
        tokens: np.ndarray,
        begins: list[int],
        asked: list[int],
        policy: str = "full",
        idle: tuple[int, ...] = (),
    ) -> dict[str, np.ndarray]:
        """One step: `tokens` [B, S] of the sequences in `slots`, written into their caches at `begins`.

        As on a GPU, the cache keeps what lies beyond a sequence's tokens, so padding may leave garbage there.
        `idle` slots run along with a token that is not theirs: Mamba's states must not see it.
        """
        batch, length = tokens.shape
        places = [-1 if slot in idle else slot for slot in slots]
        whole = {b.name for b in self.table if b.shape[0] == "num_slots"}
        given = self.run(
            {
                "input_ids": tokens.astype(np.int64),
                "position_ids": np.array(begins)[:, None] + np.arange(length),
                "write_indices": np.array(begins),
                **({} if self.model.mamba is None else {"state_slots": np.array(places, np.int32)}),
                "logits_indices": np.array(asked),
                "policy_index": np.full(batch * length, self.tables.index(policy), np.int32),
                "policy_kind": self.tables.policy_kind,
                "thresholds": self.tables.thresholds,
                "k_values": self.tables.k_values,
                "expert_norms": self.tables.expert_norms,
                **{
                    name: slot if name in whole else np.ascontiguousarray(slot[slots])
                    for name, slot in self.slots.items()
                },
            }
        )
        for binding in self.table:
            if binding.in_place_of is not None:
                own = slice(None) if binding.in_place_of in whole else slots
                self.slots[binding.in_place_of][own] = given[binding.name]
        return given

    def reference(self, ids: np.ndarray) -> np.ndarray:
        """[S, V]: what `transformers` says of one sequence, in float32."""
        if self._reference is None:
            self._reference = transformers.AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32)
            if self._prepare is not None:
                self._prepare(self._reference)
        model = self._reference.eval()
        with torch.no_grad():
            return model(torch.tensor(ids[None]), use_cache=False).logits[0].numpy()


def sequences(lowered: Lowered) -> list[np.ndarray]:
    """Three sequences: a long one that ends with the cache, a short one, and one as long as a chunk."""
    rng = np.random.default_rng(7)
    vocabulary = lowered.model.vocab_size
    return [rng.integers(0, vocabulary, length) for length in (lowered.build.max_seq_len, 4 + 3, 16 + 5)]


def assert_steps_equal_transformers(lowered: Lowered, tolerance: float) -> None:
    """Prefill alone, in chunks and padded together; then decode ragged batches, through one cache of three slots."""
    texts = sequences(lowered)
    expected = [lowered.reference(text) for text in texts]
    largest = max(np.abs(rows).max() for rows in expected)
    last = lowered.build.max_seq_len
    filled = [0, 0, 0]

    def close(found: np.ndarray, rows: list[np.ndarray]) -> None:
        assert np.abs(found - np.array(rows)).max() <= tolerance * largest

    # The garbage that an earlier user of the slot left must not show.
    for slot in lowered.slots.values():
        slot[:] = 3.0
    # A first chunk of three sequences, the short one padded; logits of every real row.
    padded = np.stack([np.resize(text, 16) for text in texts])
    rows = [(slot, column) for slot, text in enumerate(texts) for column in range(min(16, (16, 4, 16)[slot]))]
    given = lowered.step([0, 1, 2], padded, filled, [16 * slot + column for slot, column in rows])
    close(given["logits"], [expected[slot][column] for slot, column in rows])
    filled = [16, 4, 16]
    # The long one goes on alone, in a chunk and in one of a single token, in its slot.
    for length in (16, 1):
        chunk = texts[0][None, filled[0] : filled[0] + length]
        given = lowered.step([0], chunk, [filled[0]], [length - 1])
        filled[0] += length
        close(given["logits"], [expected[0][filled[0] - 1]])
    # Decode to the last place of the cache. The second pauses at first and the short ones end early; in every other
    # step the idle slots run along and write a token at their end, which must not show later.
    step = 0
    while filled[0] < last:
        due = [slot for slot in range(3) if filled[slot] < len(texts[slot]) and step >= (0, 2, 0)[slot]]
        slots = due if step % 2 else [0, 1, 2]
        token = np.array([[texts[slot][filled[slot]] if slot in due else 0] for slot in slots])
        given = lowered.step(slots, token, [filled[slot] for slot in slots], [slots.index(slot) for slot in due])
        close(given["logits"], [expected[slot][filled[slot]] for slot in due])
        for slot in due:
            filled[slot] += 1
        step += 1
    assert filled == [last, 7, 21]


def assert_mamba_steps_equal_transformers(lowered: Lowered, tolerance: float) -> None:
    """Each prompt alone in chunks, its states carried on; then ragged decode beside slots that have nothing to do."""
    texts = sequences(lowered)
    expected = [lowered.reference(text) for text in texts]
    largest = max(np.abs(rows).max() for rows in expected)
    filled = [0, 0, 0]
    for name, slot in lowered.slots.items():  # what an earlier user left must not show, nor that it was NaN
        slot[:] = np.nan if "state" in name else 3.0

    def close(found: np.ndarray, rows: list[np.ndarray]) -> None:
        assert np.abs(found - np.array(rows)).max() <= tolerance * largest

    # Chunks of 1 (shorter than the convolution), 16 (the largest), 2 and so on; the last tokens are left for decode.
    for slot, lengths in enumerate(((1, 16, 2, 15), (3,), (16, 1))):
        for length in lengths:
            begin = filled[slot]
            given = lowered.step([slot], texts[slot][None, begin : begin + length], [begin], list(range(length)))
            close(given["logits"], list(expected[slot][begin : begin + length]))
            filled[slot] += length
    step = 0
    while filled[0] < lowered.build.max_seq_len:
        due = [slot for slot in range(3) if filled[slot] < len(texts[slot]) and step >= (0, 2, 0)[slot]]
        token = np.array([[texts[slot][filled[slot]] if slot in due else 0] for slot in range(3)])
        before = {name: state.copy() for name, state in lowered.slots.items() if "state" in name}
        idle = tuple({0, 1, 2} - set(due))
        given = lowered.step([0, 1, 2], token, filled, due, idle=idle)
        close(given["logits"], [expected[slot][filled[slot]] for slot in due])
        for name, state in before.items():
            np.testing.assert_array_equal(lowered.slots[name][list(idle)], state[list(idle)])
        for slot in due:
            filled[slot] += 1
        step += 1
    assert filled == [40, 7, 21]
