# SPDX-License-Identifier: Apache-2.0
"""In-flight batching: who else is in the batch, and in which order, changes nobody's answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_session import ToySession, toy_policies

from adaptive_k_moe.runtime.engine import Engine, EngineLimits
from adaptive_k_moe.runtime.expert_runs import ExpertRuns
from adaptive_k_moe.runtime.outputs import RequestOutput, rows_of_passes
from adaptive_k_moe.runtime.sampling_params import SamplingParams
from adaptive_k_moe.runtime.sequence import RunOptions

Ask = tuple[list[int], SamplingParams]


def make_engine(session: ToySession, *, batch: int = 8, tokens: int = 32, seq_len: int = 64) -> Engine:
    limits = EngineLimits(max_batch_size=batch, max_num_tokens=tokens, max_seq_len=seq_len)
    return Engine(session, toy_policies(), limits, tokenizer=None, eos_token_ids=[0], full_k=2)


def run_alone(ask: Ask) -> RequestOutput:
    """The answer of an engine that has plenty of everything and nobody else to serve."""
    engine = make_engine(ToySession(num_blocks=64), tokens=64)
    engine.add(engine.prepare(*ask, RunOptions("alone")))
    outputs: list[RequestOutput] = []
    while engine.has_work:
        outputs += engine.step()
    return outputs[-1]


def assert_same(got: RequestOutput, expected: RequestOutput) -> None:
    assert got.error is None
    assert got.policy == expected.policy
    np.testing.assert_array_equal(got.prompt_k, expected.prompt_k)
    np.testing.assert_array_equal(got.prompt_entropy, expected.prompt_entropy)
    # However often a step was cut or repeated, each pass counts once.
    passes = rows_of_passes(got.prompt_k, *(each.k for each in got.outputs))
    assert got.expert_runs == expected.expert_runs == ExpertRuns.of(2, passes)
    assert len(passes) == len(got.prompt_token_ids) + sum(len(each.token_ids) - 1 for each in got.outputs)
    if expected.context_logits is not None:
        assert got.context_logits is not None
        np.testing.assert_array_equal(got.context_logits, expected.context_logits)
    for one, other in zip(got.outputs, expected.outputs, strict=True):
        assert one.token_ids == other.token_ids
        assert one.finish_reason == other.finish_reason
        assert one.logprobs == other.logprobs
        np.testing.assert_array_equal(one.k, other.k)
        np.testing.assert_array_equal(one.entropy, other.entropy)
        if other.generation_logits is not None:
            assert one.generation_logits is not None
            np.testing.assert_array_equal(one.generation_logits, other.generation_logits)


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    prompt = draw(st.lists(st.integers(1, 49), min_size=1, max_size=20))
    params: dict[str, Any] = {
        "max_tokens": draw(st.integers(1, 16)),
        "adaptive_k_policy": draw(st.sampled_from(["full", "balanced", "one", None])),
        "seed": draw(st.integers(0, 1000)),
        "n": draw(st.sampled_from([1, 1, 1, 2])),
    }
    if draw(st.booleans()):
        params |= {
            "temperature": 0.8,
            "top_k": 20,
            "top_p": 0.9,
            "repetition_penalty": 1.1,
            "presence_penalty": 0.3,
        }
    if draw(st.booleans()):
        params |= {"logprobs": 2, "return_context_logits": True, "return_generation_logits": True}
    return prompt, SamplingParams(**params)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_every_request_gets_what_it_gets_alone(data: st.DataObject) -> None:
    requests = data.draw(st.lists(asks(), min_size=1, max_size=7))
    num_blocks = data.draw(st.integers(9, 24))  # 9 blocks of 4 hold the longest request, and little more
    session = ToySession(num_blocks=num_blocks)
    engine = make_engine(session, batch=data.draw(st.integers(1, 8)), tokens=data.draw(st.sampled_from([1, 3, 8, 32])))
    arrivals = data.draw(st.lists(st.integers(0, 12), min_size=len(requests), max_size=len(requests)))
    cancelled = data.draw(st.dictionaries(st.integers(0, len(requests) - 1), st.integers(0, 30), max_size=2))
    ends: dict[int, RequestOutput] = {}
    for now in range(3000):
        for index, arrival in enumerate(arrivals):
            if arrival == now:
                engine.add(engine.prepare(*requests[index], RunOptions(str(index))))
        for index, when in cancelled.items():
            if when == now and (output := engine.abort(str(index))) is not None:
                ends[index] = output
        for output in engine.step():
            ends[int(output.request_id)] = output
        if now > 30 and not engine.has_work:
            break
    assert sorted(ends) == list(range(len(requests)))
    for index, output in ends.items():
        expected = run_alone(requests[index])
        if any(sequence.finish_reason == "cancelled" for sequence in output.outputs):
            assert index in cancelled
            for one, other in zip(output.outputs, expected.outputs, strict=True):
                assert one.token_ids == other.token_ids[: len(one.token_ids)]
        else:
            assert_same(output, expected)
    stats = engine.stats()
    assert stats.kv_blocks_used == stats.num_running == stats.num_waiting == 0


def run_all(engine: Engine) -> dict[str, RequestOutput]:
    ends: dict[str, RequestOutput] = {}
    for _ in range(2000):
        if not engine.has_work:
            return ends
        ends |= {output.request_id: output for output in engine.step()}
    raise AssertionError("the engine does not come to an end")


def test_preemption_happens_and_changes_nothing() -> None:
    engine = make_engine(ToySession(num_blocks=9))
    requests = [([i + 1] * 8, SamplingParams(max_tokens=16, end_id=-1, seed=i, temperature=1)) for i in range(4)]
    for index, ask in enumerate(requests):
        engine.add(engine.prepare(*ask, RunOptions(str(index))))
    ends = run_all(engine)
    assert engine.stats().preemptions_total > 0
    assert any(output.metrics.num_preemptions for output in ends.values())
    for index, ask in enumerate(requests):
        assert_same(ends[str(index)], run_alone(ask))


def test_a_long_prefill_runs_beside_decode() -> None:
    session = ToySession()
    engine = make_engine(session, tokens=8)
    engine.add(engine.prepare([1, 2], SamplingParams(max_tokens=12, end_id=-1), RunOptions("short")))
    engine.step()
    engine.add(engine.prepare(list(range(1, 31)), SamplingParams(max_tokens=1), RunOptions("long")))
    generated = 1
    while "long" in engine.request_ids:
        engine.step()
        generated += 1
    step = session.steps[1]
    assert step.subsequence_begins.tolist() == [0, 1, 8]  # one decode token and a chunk of seven
    assert generated == 1 + 5  # 30 tokens in chunks of 7, and the short answer grew in each step


def test_a_step_never_exceeds_its_limits() -> None:
    session = ToySession()
    engine = make_engine(session, batch=3, tokens=10)
    for index in range(8):
        engine.add(engine.prepare([5] * (index + 1), SamplingParams(max_tokens=5, end_id=-1), RunOptions(str(index))))
    run_all(engine)
    assert max(len(step.input_ids) for step in session.steps) <= 10
    assert max(len(step.past_lens) for step in session.steps) == 3


def test_first_come_first_served_under_pressure() -> None:
    engine = make_engine(ToySession(num_blocks=6), batch=4)
    for index in range(6):
        engine.add(engine.prepare([3] * 8, SamplingParams(max_tokens=10, end_id=-1), RunOptions(str(index))))
    order: list[str] = []
    while engine.has_work:
        order += [output.request_id for output in engine.step() if output.finished]
    assert order == sorted(order)


def test_an_abort_frees_blocks_before_the_next_step() -> None:
    engine = make_engine(ToySession())
    engine.add(engine.prepare([1] * 9, SamplingParams(max_tokens=20, end_id=-1), RunOptions("a")))
    engine.step()
    assert engine.stats().kv_blocks_used == 3
    output = engine.abort("a")
    assert output is not None
    assert output.finished
    assert output.outputs[0].finish_reason == "cancelled"
    assert len(output.outputs[0].token_ids) == 1
    assert engine.stats().kv_blocks_used == 0
    assert engine.abort("a") is None


def test_a_failing_step_ends_its_requests_and_no_others() -> None:
    session = ToySession()
    engine = make_engine(session, batch=2)
    session.fail_on = 49
    for name, prompt in (("a", [1, 49]), ("b", [2, 3]), ("c", [4, 5])):
        engine.add(engine.prepare(prompt, SamplingParams(max_tokens=3, end_id=-1), RunOptions(name)))
    ends = {output.request_id: output for output in engine.step()}
    assert {name: output.outputs[0].finish_reason for name, output in ends.items()} == {
        "a": "error",
        "b": "error",
    }
    assert ends["a"].error == "the engine failed: toy failure"
    session.fail_on = None
    assert run_all(engine)["c"].outputs[0].finish_reason == "length"
    stats = engine.stats()
    assert (stats.errors_total, stats.finished_total, stats.kv_blocks_used) == (2, 3, 0)


def test_logits_that_are_not_finite_end_only_their_request() -> None:
    session = ToySession()
    session.nan_on = 49
    engine = make_engine(session)
    engine.add(engine.prepare([1, 49], SamplingParams(max_tokens=3), RunOptions("a")))
    engine.add(engine.prepare([1, 2], SamplingParams(max_tokens=3, end_id=-1), RunOptions("b")))
    ends = run_all(engine)
    assert ends["a"].outputs[0].finish_reason == "error"
    assert "not finite" in str(ends["a"].error)
    assert ends["b"].outputs[0].finish_reason == "length"


def test_generated_k_is_that_of_the_pass_that_produced_the_token() -> None:
    session = ToySession()
    engine = make_engine(session, tokens=4)
    prompt = [7, 8, 9, 10, 11]
    engine.add(
        engine.prepare(prompt, SamplingParams(max_tokens=4, end_id=-1, adaptive_k_policy="balanced"), RunOptions("a"))
    )
    output = run_all(engine)["a"]
    answer = output.outputs[0]
    everything = np.concatenate([prompt, answer.token_ids])
    k = np.empty((len(everything) - 1, 3), np.int32)
    for step in session.steps:
        _, rows = session._route(step)
        k[step.position_ids] = rows
    np.testing.assert_array_equal(output.prompt_k, k[:5])
    np.testing.assert_array_equal(answer.k, k[4:])
    assert output.avg_k == pytest.approx(k.mean())
    assert output.compute_saved_ratio == pytest.approx(1 - k.mean() / 2)


def test_the_answer_ends_at_max_seq_len() -> None:
    engine = make_engine(ToySession(), seq_len=10)
    engine.add(engine.prepare([1] * 7, SamplingParams(max_tokens=30, end_id=-1), RunOptions("a")))
    answer = run_all(engine)["a"].outputs[0]
    assert len(answer.token_ids) == 3
    assert answer.finish_reason == "length"


def test_context_logits_survive_chunks_and_are_those_of_each_prompt_token() -> None:
    prompt = list(range(1, 20))
    for tokens in (3, 32):
        engine = make_engine(ToySession(), tokens=tokens)
        engine.add(engine.prepare(prompt, SamplingParams(max_tokens=2, return_context_logits=True), RunOptions("a")))
        context = run_all(engine)["a"].context_logits
        assert context is not None
        assert context.shape == (19, 50)
        for length in (1, 7, 19):
            alone = run_alone((prompt[:length], SamplingParams(max_tokens=1, return_generation_logits=True)))
            assert alone.outputs[0].generation_logits is not None
            np.testing.assert_array_equal(context[length - 1], alone.outputs[0].generation_logits[0])
