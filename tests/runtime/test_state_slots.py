# SPDX-License-Identifier: Apache-2.0
"""State slots: a sequence that runs has one of its own, and whoever ends, waits or is preempted has none."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from test_batching import asks, assert_same, make_engine, run_alone
from toy_session import ToySession

from adaptive_k_moe.runtime.outputs import RequestOutput
from adaptive_k_moe.runtime.sampling_params import SamplingParams
from adaptive_k_moe.runtime.sequence import RunOptions
from adaptive_k_moe.runtime.state_slots import StateSlots


def test_slots_are_handed_out_once_and_come_back() -> None:
    slots = StateSlots(3)
    taken = [slots.acquire() for _ in range(3)]
    assert sorted(taken) == [0, 1, 2]  # type: ignore[type-var]
    assert not slots.available
    slots.release(taken[1])
    assert slots.num_free == 1
    assert slots.acquire() == taken[1]


def test_a_model_without_states_has_no_slots_and_always_enough() -> None:
    slots = StateSlots(0)
    for _ in range(2):
        assert slots.available
        assert slots.acquire() is None
    slots.release(None)
    assert slots.num_free == 0


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_every_request_gets_what_it_gets_alone(data: st.DataObject) -> None:
    """The session itself refuses a slot that two share and one whose state is another sequence's."""
    requests = data.draw(st.lists(asks(), min_size=1, max_size=7))
    batch, num_slots = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    session = ToySession(num_blocks=data.draw(st.integers(9, 24)), num_state_slots=num_slots)
    engine = make_engine(session, batch=batch, tokens=data.draw(st.sampled_from([1, 3, 8, 32])))
    cancelled = data.draw(st.dictionaries(st.integers(0, len(requests) - 1), st.integers(0, 30), max_size=2))
    for index, ask in enumerate(requests):
        engine.add(engine.prepare(*ask, RunOptions(str(index))))
    ends: dict[int, RequestOutput] = {}
    for now in range(3000):
        for index, when in cancelled.items():
            if when == now and (output := engine.abort(str(index))) is not None:
                ends[index] = output
        for output in engine.step():
            ends[int(output.request_id)] = output
        if not engine.has_work:
            break
    assert max((len(step.block_tables) for step in session.steps), default=0) <= min(batch, num_slots)
    for index, output in ends.items():
        if index not in cancelled:
            assert_same(output, run_alone(requests[index]))
    assert sorted(ends) == list(range(len(requests)))
    assert engine._scheduler.state_slots.num_free == num_slots


def test_a_preempted_sequence_gives_its_slot_to_the_next_and_takes_another_later() -> None:
    session = ToySession(num_blocks=9, num_state_slots=4)
    engine = make_engine(session)
    requests = [([i + 1] * 8, SamplingParams(max_tokens=16, end_id=-1, seed=i, temperature=1)) for i in range(5)]
    for index, ask in enumerate(requests):
        engine.add(engine.prepare(*ask, RunOptions(str(index))))
    ends: dict[str, RequestOutput] = {}
    while engine.has_work:
        ends |= {output.request_id: output for output in engine.step()}
    assert engine.stats().preemptions_total > 0
    for index, ask in enumerate(requests):
        assert_same(ends[str(index)], run_alone(ask))


def test_a_failing_step_frees_the_slots_of_its_requests() -> None:
    session = ToySession(num_state_slots=2)
    session.fail_on = 7
    engine = make_engine(session)
    for index, token in enumerate((7, 8, 9)):
        engine.add(engine.prepare([token], SamplingParams(max_tokens=3, end_id=-1), RunOptions(str(index))))
    ends: dict[str, RequestOutput] = {}
    while engine.has_work:
        ends |= {output.request_id: output for output in engine.step()}
    assert [ends[name].error is None for name in ("0", "1", "2")] == [False, False, True]
    assert engine._scheduler.state_slots.num_free == 2


def test_more_sequences_than_slots_wait_for_one() -> None:
    session = ToySession(num_blocks=64, num_state_slots=2)
    engine = make_engine(session, batch=8)
    for index in range(5):
        engine.add(engine.prepare([index + 1], SamplingParams(max_tokens=2, end_id=-1), RunOptions(str(index))))
    while engine.has_work:
        engine.step()
    assert max(len(step.block_tables) for step in session.steps) == 2
