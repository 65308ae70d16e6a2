# SPDX-License-Identifier: Apache-2.0
"""Background requests: the same answers as others, when nobody else has to wait, counted nowhere."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_session import ToySession, toy_policies

from adaptive_k_moe.errors import PolicyError, RequestError
from adaptive_k_moe.policy import PolicyTables
from adaptive_k_moe.runtime import LLM, SamplingParams
from adaptive_k_moe.runtime.engine import Engine, EngineLimits
from adaptive_k_moe.runtime.outputs import RequestOutput
from adaptive_k_moe.runtime.sequence import RunOptions
from adaptive_k_moe.runtime.telemetry import Observer

PROMPT = [7, 3, 44, 12, 9, 30, 21, 8]
SCORE = SamplingParams(max_tokens=1, end_id=-1, prompt_logprobs=1)


class _Told(Observer):
    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.finished: list[RequestOutput] = []

    def on_step(self, record: Any) -> None:
        self.steps.append(record)

    def on_request_finished(self, output: RequestOutput) -> None:
        self.finished.append(output)


def make_engine(session: ToySession, *, batch: int = 8, seq_len: int = 200) -> Engine:
    limits = EngineLimits(max_batch_size=batch, max_num_tokens=128, max_seq_len=seq_len)
    return Engine(session, toy_policies(), limits, tokenizer=None, eos_token_ids=[0], full_k=2)


def add(engine: Engine, prompt: list[int], params: SamplingParams, request_id: str, **more: Any) -> None:
    engine.add(engine.prepare(prompt, params, RunOptions(request_id, **more)))


def run(engine: Engine) -> dict[str, RequestOutput]:
    ended: dict[str, RequestOutput] = {}
    while engine.has_work:
        ended |= {output.request_id: output for output in engine.step() if output.finished}
    return ended


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("policy", ["full", "balanced", "one"])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("with_logits", [False, True])
def test_prompt_logprobs_are_the_log_softmax_of_the_prompts_logits(
    policy: str, background: bool, with_logits: bool
) -> None:
    params = SamplingParams(
        max_tokens=2, prompt_logprobs=2, adaptive_k_policy=policy, return_context_logits=with_logits
    )
    plain = SamplingParams(max_tokens=2, return_context_logits=True, adaptive_k_policy=policy)
    reference = make_engine(ToySession(num_blocks=64))
    add(reference, PROMPT * 12, plain, "a")
    logits = run(reference)["a"].context_logits
    assert logits is not None
    expected = log_softmax(np.asarray(logits))[:-1]

    engine = make_engine(ToySession(num_blocks=64))
    add(engine, PROMPT * 12, params, "a", background=background)
    output = run(engine)["a"]
    entries = output.prompt_logprobs
    assert entries is not None and len(entries) == len(PROMPT * 12) - 1
    for entry, row, token_id in zip(entries, expected, (PROMPT * 12)[1:], strict=True):
        assert entry[token_id] == pytest.approx(row[token_id], abs=1e-5)
        assert set(entry) == {token_id, *np.argsort(-row)[:2].tolist()}
    if with_logits:
        np.testing.assert_array_equal(output.context_logits, logits)


def test_prompt_logprobs_are_checked() -> None:
    with pytest.raises(RequestError, match="prompt_logprobs is -1"):
        SamplingParams(prompt_logprobs=-1)
    with pytest.raises(RequestError, match="prompt_logprobs is 51, but the vocabulary has 50 tokens"):
        make_engine(ToySession()).prepare([1], SamplingParams(prompt_logprobs=51), RunOptions("a"))


def test_a_request_waits_for_at_most_one_small_step_of_the_background() -> None:
    session = ToySession(num_blocks=128)
    engine = make_engine(session)
    add(engine, PROMPT * 20, SCORE, "score", background=True)  # 160 tokens: three steps
    engine.step()
    assert len(session.steps[-1].input_ids) == 64
    add(engine, PROMPT, SamplingParams(max_tokens=5, end_id=-1), "request")
    order = [output.request_id for _ in range(5) for output in engine.step()]
    assert order == ["request"]  # five tokens in the five steps that follow
    assert [len(step.input_ids) for step in session.steps[1:]] == [8, 1, 1, 1, 1]
    assert list(run(engine)) == ["score"]
    assert [len(step.input_ids) for step in session.steps[6:]] == [64, 32]  # it kept what it had


@pytest.mark.parametrize("num_state_slots", [0, 4])
def test_where_requests_never_pause_the_background_goes_on_and_none_waits_for_it_twice(num_state_slots: int) -> None:
    session = ToySession(num_blocks=128, num_state_slots=num_state_slots)
    engine = make_engine(session, batch=4)
    add(engine, PROMPT * 5, SCORE, "score", background=True)
    lengths = [40, 90, 25, 60]
    ended: dict[str, RequestOutput] = {}
    lifetimes: dict[str, list[int]] = {}  # the steps of the session between which a request was there
    for index in range(10_000):
        while len([i for i in engine.request_ids if i != "score"]) < 3:
            name = f"request{len(lifetimes)}"
            params = SamplingParams(max_tokens=lengths[len(lifetimes) % 4], end_id=-1)
            add(engine, PROMPT, params, name)
            lifetimes[name] = [index, index]
        outputs = [output for output in engine.step() if output.finished]
        ended |= {output.request_id: output for output in outputs}
        for output in outputs:
            lifetimes.get(output.request_id, [0, 0])[1] = index
        if "score" in ended:
            break
    background = [
        index for index, step in enumerate(session.steps) if len(step.block_tables) == 1 and len(step.input_ids) > 1
    ]
    background = [index for index in background if len(session.steps[index].input_ids) in (16, 8)]
    assert len(background) == 3  # 16 + 16 + 8 tokens
    assert min(later - earlier for earlier, later in itertools.pairwise(background)) > 200
    for first, last in lifetimes.values():
        assert sum(first <= index <= last for index in background) <= 1
    alone = make_engine(ToySession(num_blocks=64))
    add(alone, PROMPT * 5, SCORE, "score")
    assert ended["score"].prompt_logprobs == run(alone)["score"].prompt_logprobs


@pytest.mark.parametrize(("num_blocks", "num_state_slots"), [(24, 0), (64, 1), (24, 2)])
def test_the_background_gives_up_what_a_request_needs_and_is_right_in_the_end(
    num_blocks: int, num_state_slots: int
) -> None:
    alone = make_engine(ToySession(num_blocks=64))
    add(alone, PROMPT * 10, SCORE, "score")
    expected = run(alone)["score"].prompt_logprobs

    session = ToySession(num_blocks=num_blocks, block_size=4, num_state_slots=num_state_slots)
    engine = make_engine(session, batch=max(num_state_slots, 1), seq_len=96)
    add(engine, PROMPT * 10, SCORE, "score", background=True)
    engine.step()
    add(engine, PROMPT, SamplingParams(max_tokens=30, end_id=-1), "request")
    ended = run(engine)
    assert list(ended) == ["request", "score"]
    assert ended["request"].metrics.num_preemptions == 0
    assert ended["score"].prompt_logprobs == expected
    assert engine.stats().kv_blocks_used == 0


def test_nothing_counts_the_background_and_no_observer_hears_of_it() -> None:
    engine, told = make_engine(ToySession(num_blocks=64)), _Told()
    engine.observers.add(told)
    before = engine.stats()
    add(engine, PROMPT, SCORE, "score", background=True)
    add(engine, PROMPT, SCORE, "cancelled", background=True)
    engine.abort("cancelled")
    run(engine)
    assert engine.stats() == before
    assert not told.steps and not told.finished


def test_a_policy_can_be_removed_while_the_background_follows_it() -> None:
    engine = make_engine(ToySession(num_blocks=64))
    add(engine, PROMPT, SamplingParams(max_tokens=1, adaptive_k_policy="one"), "score", background=True)
    add(engine, PROMPT, SamplingParams(max_tokens=1, adaptive_k_policy="balanced"), "request")
    engine.set_policies(_without(engine.policies, "one"))
    ended = run(engine)
    assert ended["score"].error == "the policy 'one' was removed."
    assert ended["request"].error is None
    add(engine, PROMPT, SamplingParams(max_tokens=1, adaptive_k_policy="balanced"), "request")
    with pytest.raises(PolicyError, match="cannot be removed"):
        engine.set_policies(_without(engine.policies, "balanced"))


def _without(tables: PolicyTables, name: str) -> PolicyTables:
    kept = toy_policies()
    drop = kept.names.index(name)
    rows = [i for i in range(len(kept.names)) if i != drop]
    from dataclasses import replace

    return replace(
        kept,
        names=[kept.names[i] for i in rows],
        decode_row=list(range(len(rows))),
        policy_kind=kept.policy_kind[rows],
        thresholds=kept.thresholds[:, rows],
        k_values=kept.k_values[:, rows],
    )


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_requests_get_the_same_answers_with_and_without_a_background(data: st.DataObject) -> None:
    prompts = data.draw(st.lists(st.lists(st.integers(1, 49), min_size=1, max_size=20), min_size=1, max_size=5))
    scored = data.draw(st.lists(st.lists(st.integers(1, 49), min_size=2, max_size=40), min_size=1, max_size=4))
    pauses = data.draw(st.lists(st.integers(0, 4), min_size=len(prompts), max_size=len(prompts)))
    params = SamplingParams(max_tokens=8, temperature=0.8, seed=1)

    def answers(background: bool) -> dict[str, list[int]]:
        engine = make_engine(ToySession(num_blocks=16, block_size=4), batch=3, seq_len=60)
        for index, tokens in enumerate(scored if background else []):
            add(engine, tokens, SCORE, f"score{index}", background=True)
        ended: dict[str, RequestOutput] = {}
        for index, (prompt, pause) in enumerate(zip(prompts, pauses, strict=True)):
            for _ in range(pause):
                ended |= {o.request_id: o for o in engine.step() if o.finished}
            add(engine, prompt, params, f"request{index}")
        ended |= run(engine)
        assert engine.stats().kv_blocks_used == 0
        assert len(ended) == len(prompts) + (len(scored) if background else 0)
        return {i: o.outputs[0].token_ids for i, o in ended.items() if i.startswith("request")}

    assert answers(True) == answers(False)


def test_scoring_on_a_real_engine_is_what_context_logits_say(engine_dir: Path) -> None:
    with LLM(engine_dir, num_threads=1) as llm:
        assert llm.tokenizer is not None
        tokens = llm.tokenizer.encode("And it came to pass, that the router chose two experts of eight.")
        for policy in ("full", "top1"):
            plain = SamplingParams(max_tokens=1, end_id=-1, return_context_logits=True, adaptive_k_policy=policy)
            logits = np.asarray(llm.generate(tokens, plain).context_logits)
            params = SamplingParams(max_tokens=1, end_id=-1, prompt_logprobs=1, adaptive_k_policy=policy)
            output = llm.generate_async(tokens, params, background=True).result(60)
            expected = log_softmax(logits)[:-1]
            assert output.prompt_logprobs is not None
            for entry, row, token_id in zip(output.prompt_logprobs, expected, tokens[1:], strict=True):
                assert entry[token_id] == pytest.approx(row[token_id], abs=1e-4)
                assert max(entry.values()) == pytest.approx(row.max(), abs=1e-4)
