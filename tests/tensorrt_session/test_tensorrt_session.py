# SPDX-License-Identifier: Apache-2.0
"""The session on a GPU: every schedule of steps, its policies, and the order of what it asks of the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fake_gpu import Gpu
from gpu_engines import POLICIES, make_engine, poison
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.engine_config import EngineConfig
from adaptive_k_moe.errors import PolicyError
from adaptive_k_moe.policy import PolicySet, PolicyTables, compile_policies
from adaptive_k_moe.runtime.engine import Engine, EngineLimits
from adaptive_k_moe.runtime.outputs import RequestOutput
from adaptive_k_moe.runtime.sampling_params import SamplingParams
from adaptive_k_moe.runtime.sequence import RunOptions
from adaptive_k_moe.runtime.session import Session, StepInput, StepOutput, create_session
from adaptive_k_moe.runtime.session.tensorrt import session as session_module

from checkpoints import Shape, make_checkpoint
from nemotron_models import Nemotron, make_nemotron

SIZES: dict[str, Any] = {"max_batch_size": 4, "max_seq_len": 48, "max_num_tokens": 20}
SHAPES: dict[str, Shape | Nemotron] = {
    "mixtral": Shape("plain"),
    "nemotron": Nemotron("every kind of layer, states of no round size", "ME*-ME"),
}
LENGTHS = (47, 1, 2, 17, 33, 40, 21, 5)


@dataclass
class Model:
    """One checkpoint's engines for both targets, open."""

    gpu: Gpu
    config: EngineConfig
    session: Session
    reference: Session
    tables: PolicyTables
    texts: list[np.ndarray]
    expected: list[StepOutput]
    """What the reference says of each text, alone and at once, every token under the policy of its own."""

    def policy_of(self, text: int) -> int:
        return text % len(self.tables.names)


def whole(text: np.ndarray, policy: int, session: Session) -> StepInput:
    """A step that computes a whole sequence and gives all its logits."""
    length = len(text)
    return StepInput(
        input_ids=text,
        position_ids=np.arange(length),
        policy_index=np.full(length, policy, np.int32),
        past_lens=np.zeros(1, np.int32),
        subsequence_begins=np.array([0, length], np.int32),
        block_tables=[list(range(-(-length // session.block_size)))],
        state_slots=np.zeros(1, np.int32) if session.num_state_slots else None,
        logits_indices=np.arange(length),
    )


@pytest.fixture(scope="module", params=list(SHAPES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    directory = tmp_path_factory.mktemp(request.param)
    shape = SHAPES[request.param]
    make = make_nemotron if isinstance(shape, Nemotron) else make_checkpoint
    checkpoint = make(directory / "checkpoint", shape)
    config = make_engine(checkpoint, directory / "gpu", **SIZES)
    policy = PolicySet.model_validate(POLICIES)
    reference_config = build(checkpoint, directory / "cpu", policy=policy, max_batch_size=4, max_seq_len=48)
    reference = create_session(directory / "cpu", reference_config)
    rng = np.random.default_rng(5)
    texts = [rng.integers(0, config.pretrained_config.vocab_size, length) for length in LENGTHS]
    with Gpu(seed=3).installed() as gpu:
        session = create_session(directory / "gpu", config)
        found = Model(gpu, config, session, reference, config.policy_tables(), texts, [])
        session.set_policies(found.tables)
        reference.set_policies(reference_config.policy_tables())
        for index, text in enumerate(texts):
            found.expected.append(reference.step(whole(text, found.policy_of(index), reference)))
        yield found
        session.close()
    reference.close()


class Schedule:
    """Sequences that come, wait, go on by any number of tokens, and go, each held against what it is alone."""

    def __init__(self, model: Model, data: st.DataObject) -> None:
        self.model, self.data = model, data
        self.free = list(range(model.session.num_blocks))
        self.running: dict[int, tuple[int, int]] = {}  # block: text, computed tokens

    def step(self) -> None:
        model, draw = self.model, self.data.draw
        while self.free and draw(st.booleans(), label="admit"):
            block = self.free.pop(draw(st.integers(0, len(self.free) - 1)))
            self.running[block] = (draw(st.integers(0, len(model.texts) - 1), label="text"), 0)
        chosen = [block for block in self.running if draw(st.sampled_from([True, True, False]), label="due")]
        chosen = draw(st.permutations(chosen))
        budget, chunks = SIZES["max_num_tokens"], []
        for block in chosen:
            text, past = self.running[block]
            longest = min(budget, len(model.texts[text]) - past)
            if longest:
                length = draw(st.sampled_from([1, longest, -(-longest // 2)]), label="length")
                asked = draw(st.sampled_from(["last", "last", "none", "all"]), label="asked")
                chunks.append((block, text, past, length, asked))
                budget -= length
        if chunks:
            self._compare(chunks, model.session.step(self._input(chunks)))
        for block, text, past, length, _ in chunks:
            self.running[block] = (text, past + length)
        for block, (text, computed) in list(self.running.items()):
            if computed == len(model.texts[text]) or draw(st.sampled_from([False] * 9 + [True]), label="cancel"):
                del self.running[block]
                self.free.append(block)
                poison(self.model.gpu, self.model.session, block)

    @staticmethod
    def _rows(length: int, asked: str) -> list[int]:
        return {"last": [length - 1], "none": [], "all": list(range(length))}[asked]

    def _input(self, chunks: list[tuple[int, int, int, int, str]]) -> StepInput:
        model = self.model
        begins = np.cumsum([0, *(length for _, _, _, length, _ in chunks)])
        pieces = [model.texts[text][past : past + length] for _, text, past, length, _ in chunks]
        return StepInput(
            input_ids=np.concatenate(pieces),
            position_ids=np.concatenate([np.arange(past, past + length) for _, _, past, length, _ in chunks]),
            policy_index=np.repeat(
                np.array([model.policy_of(text) for _, text, *_ in chunks], np.int32),
                [length for *_, length, _ in chunks],
            ),
            past_lens=np.array([past for _, _, past, *_ in chunks], np.int32),
            subsequence_begins=begins.astype(np.int32),
            block_tables=[[block] for block, *_ in chunks],
            state_slots=None,
            logits_indices=np.array(
                [
                    begin + row
                    for begin, (*_, length, asked) in zip(begins, chunks, strict=False)
                    for row in self._rows(length, asked)
                ],
                np.int64,
            ),
        )

    def _compare(self, chunks: list[tuple[int, int, int, int, str]], found: StepOutput) -> None:
        model, row, token = self.model, 0, 0
        for _, text, past, length, asked in chunks:
            expected = model.expected[text]
            rows = [past + at for at in self._rows(length, asked)]
            scale = np.abs(expected.logits).max()
            np.testing.assert_allclose(
                found.logits[row : row + len(rows)], expected.logits[rows], rtol=0, atol=1e-4 * scale
            )
            np.testing.assert_array_equal(found.k[token : token + length], expected.k[past : past + length])
            np.testing.assert_allclose(
                found.entropy[token : token + length], expected.entropy[past : past + length], atol=1e-4
            )
            row, token = row + len(rows), token + length
        assert (row, token) == (len(found.logits), len(found.k))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_schedule_gives_each_sequence_what_it_gets_alone_on_a_cpu(model: Model, data: st.DataObject) -> None:
    """Chunks and single tokens mixed, some sequences pausing, slots taken over from others that left anything there."""
    schedule = Schedule(model, data)
    for _ in range(data.draw(st.integers(1, 25), label="steps")):
        schedule.step()
    assert not model.gpu.misuses


def test_reads_are_the_experts_that_some_token_runs(model: Model) -> None:
    """As the CPU counts them; a step of two executions reads for each."""
    sessions = (model.session, model.reference)
    texts = [text for text in model.texts if len(text) >= 17][:3]
    before = [session.expert_load() for session in sessions]

    def step(session: Session, parts: list[tuple[int, int, int]]) -> npt.NDArray[np.int32]:
        """Reads of a step over pieces: text, from where, to where."""
        pieces = [texts[text][begin:end] for text, begin, end in parts]
        own = -(-SIZES["max_seq_len"] // session.block_size)
        found = session.step(
            StepInput(
                input_ids=np.concatenate(pieces),
                position_ids=np.concatenate([np.arange(begin, end) for _, begin, end in parts]),
                policy_index=np.repeat(
                    np.array([model.policy_of(text) for text, *_ in parts], np.int32), [len(p) for p in pieces]
                ),
                past_lens=np.array([begin for _, begin, _ in parts], np.int32),
                subsequence_begins=np.cumsum([0, *map(len, pieces)]).astype(np.int32),
                block_tables=[list(range(text * own, text * own + own)) for text, *_ in parts],
                state_slots=np.array([text for text, *_ in parts], np.int32) if session.num_state_slots else None,
                logits_indices=np.arange(1),
            )
        )
        assert found.reads is not None and found.reads.dtype == np.int32
        return found.reads

    most = model.config.pretrained_config.num_experts
    for parts in ([(0, 0, 10)], [(1, 0, 1)], [(1, 1, 2), (0, 10, 11)]):
        here, there = (step(session, parts) for session in sessions)
        assert here.tolist() == there.tolist() and here.min() > 0 and here.max() <= most
    decode, prompt = [(1, 2, 3), (0, 11, 12)], [(2, 0, 12)]
    both = step(model.session, [*decode, *prompt])
    assert both.tolist() == (step(model.reference, decode) + step(model.reference, prompt)).tolist()
    here, there = (session.expert_load() - old for session, old in zip(sessions, before, strict=True))
    np.testing.assert_array_equal(here, there)


# Requests. --------------------------------------------------------------------------------------------


def run_engine(engine: Engine, asks: list[tuple[int, list[int], SamplingParams]], cancels: dict[int, int]) -> Any:
    """The last output of each request: those of `asks` come at a step of their own, some are cancelled at one."""
    ends: dict[int, RequestOutput] = {}
    for now in range(2000):
        for index, (arrival, prompt, params) in enumerate(asks):
            if arrival == now:
                engine.add(engine.prepare(prompt, params, RunOptions(str(index))))
            if cancels.get(index) == now and (output := engine.abort(str(index))) is not None:
                ends[index] = output
        ends |= {int(output.request_id): output for output in engine.step()}
        if not engine.has_work and now > 30:
            return ends
    raise AssertionError("the engine does not come to an end")


def make_scheduler(model: Model, session: Session, **limits: int) -> Engine:
    sizes = {"max_batch_size": 4, "max_num_tokens": 20, "max_seq_len": 48} | limits
    return Engine(session, model.tables, EngineLimits(**sizes), tokenizer=None, eos_token_ids=[2], full_k=3)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_requests_get_the_answers_of_the_cpu_session(model: Model, data: st.DataObject) -> None:
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    asks = [
        (
            draw(st.integers(0, 12)),
            rng.integers(3, 101, draw(st.integers(1, 40))).tolist(),
            SamplingParams(
                max_tokens=draw(st.integers(1, 12)),
                adaptive_k_policy=draw(st.sampled_from([*model.tables.names, None])),
                return_context_logits=draw(st.booleans()),
                n=draw(st.sampled_from([1, 1, 2])),
                seed=index,
                temperature=draw(st.sampled_from([0.0, 0.8])),
            ),
        )
        for index in range(draw(st.integers(1, 7)))
    ]
    cancels = draw(st.dictionaries(st.integers(0, len(asks) - 1), st.integers(1, 20), max_size=2))
    tokens = draw(st.sampled_from([1, 3, 20]))
    engine = make_scheduler(model, model.session, max_num_tokens=tokens, max_batch_size=draw(st.integers(1, 4)))
    ends = run_engine(engine, asks, cancels)
    expected = run_engine(make_scheduler(model, model.reference), [(0, *ask[1:]) for ask in asks], {})
    assert sorted(ends) == sorted(expected)
    assert engine.stats().preemptions_total == 0  # a slot holds a whole sequence
    assert engine.stats().kv_blocks_used == 0
    for index, output in ends.items():
        assert output.error is None
        for one, other in zip(output.outputs, expected[index].outputs, strict=True):
            if one.finish_reason == "cancelled":
                assert index in cancels
                assert one.token_ids == other.token_ids[: len(one.token_ids)]
                continue
            assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
            np.testing.assert_array_equal(one.k, other.k)
            np.testing.assert_allclose(one.entropy, other.entropy, atol=1e-4)
        if output.context_logits is not None and output.outputs[0].finish_reason != "cancelled":
            np.testing.assert_allclose(output.context_logits, expected[index].context_logits, rtol=0, atol=2e-3)
    assert not model.gpu.misuses


def decode_once(model: Model, blocks: list[int], past: int = 3) -> StepOutput:
    """One token for each of these blocks."""
    count = len(blocks)
    return model.session.step(
        StepInput(
            input_ids=np.arange(count) + 5,
            position_ids=np.full(count, past),
            policy_index=np.zeros(count, np.int32),
            past_lens=np.full(count, past, np.int32),
            subsequence_begins=np.arange(count + 1, dtype=np.int32),
            block_tables=[[block] for block in blocks],
            state_slots=None,
            logits_indices=np.arange(count),
        )
    )


def test_the_third_decode_of_a_size_is_captured_and_replayed_from_then_on(model: Model) -> None:
    counts = model.gpu.counts
    for blocks in ([0, 1, 2], [0, 1, 2]):  # at most those before have run
        decode_once(model, blocks)
        assert not model.gpu.misuses
    decode_once(model, [2, 1, 0])
    before = dict(counts)
    for blocks in ([0, 1, 2], [3, 1, 0], [2, 1, 3]):
        decode_once(model, blocks)
    used = {name: counts.get(name, 0) - before.get(name, 0) for name in counts}
    assert used["cudaGraphLaunch"] == 3
    assert used.get("cudaStreamBeginCapture", 0) == used.get("cudaMalloc", 0) == used.get("cudaHostAlloc", 0) == 0
    assert used["cudaMemcpyAsync"] == 3 * (1 + 4)  # all inputs at once; logits, k, entropy and load
    assert used["cudaStreamSynchronize"] == 3 * 2


def test_new_policies_take_the_place_of_the_old(model: Model) -> None:
    """More rows and more choices than before, without memory, without another capture."""
    for _ in range(3):
        decode_once(model, [0, 1])
    before = dict(model.gpu.counts)
    pretrained = model.config.pretrained_config
    policies = {f"p{k}": {"kind": "fixed", "k": k} for k in (1, 2)} | {
        f"many{i}": {"kind": "entropy", "thresholds": [0.1, 0.2, 0.3, 0.4, 0.5 + i], "k": [1, 2, 1, 2, 1, 3]}
        for i in range(40)
    }
    fitted = PolicySet.model_validate({"policies": policies}).for_model(
        num_experts=pretrained.num_experts,
        num_experts_per_tok=pretrained.num_experts_per_tok,
        num_moe_layers=pretrained.num_moe_layers,
    )
    tables = compile_policies(
        fitted,
        num_experts_per_tok=pretrained.num_experts_per_tok,
        num_moe_layers=pretrained.num_moe_layers,
        num_experts=pretrained.num_experts,
    )
    try:
        for session in (model.session, model.reference):
            session.set_policies(tables)
        text = model.texts[4]
        for policy in (0, 1, 2, 3, 30, 42):
            step = whole(text[:20], policy, model.session)
            expected = model.reference.step(whole(text[:20], policy, model.reference))
            np.testing.assert_array_equal(model.session.step(step).k, expected.k)
        decode_once(model, [0, 1])
        used = {name: count - before.get(name, 0) for name, count in model.gpu.counts.items()}
        assert used.get("cudaMalloc", 0) == used.get("cudaStreamBeginCapture", 0) == 0
    finally:
        for session in (model.session, model.reference):
            session.set_policies(model.tables)


def test_tokens_that_share_are_the_cpu_engines(model: Model) -> None:
    """In one execution, which is what they see: a prompt's tokens here, among them some of another row."""
    pretrained = model.config.pretrained_config
    sizes = {"num_experts_per_tok": pretrained.num_experts_per_tok, "num_moe_layers": pretrained.num_moe_layers}
    policies = {
        "low": {"kind": "shared", "price": 4, "k_min": 0},
        "high": {"kind": "shared", "price": 25, "k_min": 0},
        "experts": {"kind": "shared", "experts": 1, "k_min": 0},
        "one": {"kind": "fixed", "k": 1},
    }
    fitted = PolicySet.model_validate({"policies": policies}).for_model(num_experts=pretrained.num_experts, **sizes)
    tables = compile_policies(fitted, num_experts=pretrained.num_experts, **sizes)
    rows = [tables.names.index(name) for name in policies]
    text = model.texts[4][:20]
    try:
        for session in (model.session, model.reference):
            session.set_policies(tables)
        fewer = []
        for mix in ([rows[0]], [rows[1]], [rows[2]], rows):
            index = np.resize(np.array(mix, np.int32), len(text))
            steps = [replace(whole(text, 0, s), policy_index=index) for s in (model.session, model.reference)]
            found, expected = model.session.step(steps[0]), model.reference.step(steps[1])
            np.testing.assert_array_equal(found.k, expected.k)
            np.testing.assert_allclose(found.logits, expected.logits, atol=2e-3 * np.abs(expected.logits).max())
            fewer.append((found.k < pretrained.num_experts_per_tok).any())
        assert any(fewer[:2]) and fewer[2], "nobody shared"
    finally:
        for session in (model.session, model.reference):
            session.set_policies(model.tables)


def test_policies_that_do_not_fit_are_refused_and_the_old_stay(model: Model) -> None:
    tables = model.tables
    wide = np.zeros((tables.thresholds.shape[0], 3, 40), np.float32)
    with pytest.raises(PolicyError, match=r"policies' thresholds is \[\d, 3, 40\], and this engine takes at most"):
        model.session.set_policies(replace(tables, thresholds=wide))
    found = model.session.step(whole(model.texts[3], model.policy_of(3), model.session))
    np.testing.assert_array_equal(found.k, model.expected[3].k)


def test_a_chunk_that_asks_for_many_logits_takes_several_executions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Shape("plain"))
    sizes = {"max_batch_size": 3, "max_seq_len": 64, "max_num_tokens": 50}
    config = make_engine(checkpoint, tmp_path / "gpu", **sizes)
    texts = [np.random.default_rng(1).integers(0, 101, length) for length in (23, 9, 18)]
    begins = np.array([0, 23, 32, 50], np.int32)
    step = StepInput(
        input_ids=np.concatenate(texts),
        position_ids=np.concatenate([np.arange(len(text)) for text in texts]),
        policy_index=np.zeros(50, np.int32),
        past_lens=np.zeros(3, np.int32),
        subsequence_begins=begins,
        block_tables=[[0], [2], [1]],
        state_slots=None,
        logits_indices=np.arange(50)[np.arange(50) % 7 != 0],
    )
    results = []
    for rows in (1000, 5, 1):
        monkeypatch.setattr(session_module, "_LOGITS_BYTES", rows * 101 * 4)
        with Gpu().installed():
            session = create_session(tmp_path / "gpu", config)
            session.set_policies(config.policy_tables())
            results.append(session.step(step))
            session.close()
    for other in results[1:]:
        np.testing.assert_allclose(other.logits, results[0].logits, atol=1e-4)
        np.testing.assert_array_equal(other.k, results[0].k)
        np.testing.assert_allclose(other.entropy, results[0].entropy, atol=1e-5)
