# SPDX-License-Identifier: Apache-2.0
"""Policies by load: which step a load calls for, that requests follow it between steps, and what they read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from toy_session import ToySession, toy_policies

from adaptive_k_moe.errors import PolicyError
from adaptive_k_moe.policy import ByLoadPolicy
from adaptive_k_moe.runtime import engine as engine_module
from adaptive_k_moe.runtime.engine import Engine, EngineLimits
from adaptive_k_moe.runtime.load import Load, LoadFollower, TokenTimes
from adaptive_k_moe.runtime.outputs import RequestOutput
from adaptive_k_moe.runtime.sampling_params import SamplingParams
from adaptive_k_moe.runtime.sequence import RunOptions
from adaptive_k_moe.runtime.telemetry import Observer, StepRecord

AUTO: dict[str, Any] = {
    "kind": "by_load",
    "steps": [{"policy": "full"}, {"policy": "one", "queue": 3}],
    "leave_seconds": 1.0,
}


class Clock:
    """The engine's `time`, which moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(engine_module, "time", clock)
    return clock


def make_engine(session: ToySession | None = None, *, batch: int = 2, **policies: Any) -> Engine:
    limits = EngineLimits(max_batch_size=batch, max_num_tokens=32, max_seq_len=64)
    tables = toy_policies(**(policies or {"auto": AUTO}))
    return Engine(session or ToySession(num_blocks=64), tables, limits, tokenizer=None, eos_token_ids=[], full_k=2)


def add(engine: Engine, name: str, policy: str = "auto", *, max_tokens: int = 8, **options: Any) -> None:
    params = SamplingParams(max_tokens=max_tokens, end_id=-1, adaptive_k_policy=policy)
    engine.add(engine.prepare([5, 6, 7], params, RunOptions(name, **options)))


def run(engine: Engine, after_each: Callable[[], None] = lambda: None) -> dict[str, RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    while engine.has_work:
        outputs |= {output.request_id: output for output in engine.step() if output.finished}
        after_each()
    return outputs


class Steps(Observer):
    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def on_step(self, record: StepRecord) -> None:
        self.records.append(record)


def follower(**changes: Any) -> LoadFollower:
    steps = [{"policy": "a"}, {"policy": "b", "queue": 4}, {"policy": "c", "queue": 16, "time_between_tokens": 0.2}]
    return LoadFollower(ByLoadPolicy.model_validate({"kind": "by_load", "steps": steps, **changes}))


def test_a_step_begins_at_its_limit_and_is_left_below_a_share_of_it_for_some_time() -> None:
    found = follower(leave_share=0.5, leave_seconds=2.0)
    seen = []
    for now, queue in [(0, 3), (1, 4), (2, 16), (3, 8), (4, 7), (5, 9), (6, 7), (7.9, 7), (8, 7), (9, 2), (20, 1)]:
        found.update(Load(queue), now)
        seen.append(found.policy_at(now))
    # c is left after two seconds below 8 (from 6 to 8; 9 in between began them anew), and a queue of 7 keeps b.
    assert seen == ["a", "b", "c", "c", "c", "c", "c", "c", "b", "b", "b"]
    assert found.policy_at(21.9) == "b" and found.policy_at(22) == "a"  # from 20 on, and nobody needs to ask


def test_any_limit_of_a_step_begins_it_and_all_have_to_be_left() -> None:
    found = follower(leave_seconds=0.0)
    found.update(Load(0, 0.2), 0.0)
    assert found.policy_at(0.0) == "c"
    found.update(Load(0, 0.11), 1.0)
    assert found.policy_at(1.0) == "c"
    found.update(Load(8, 0.0), 2.0)
    assert found.policy_at(2.0) == "c"
    found.update(Load(7, 0.09), 3.0)
    assert found.policy_at(3.0) == "b"


def test_the_floor_is_never_passed() -> None:
    found = follower(floor="b")
    found.update(Load(10_000, 100.0), 0.0)
    assert found.policy_at(0.0) == "b"


def test_the_time_between_tokens_is_that_of_the_last_second() -> None:
    times = TokenTimes()
    assert times.mean(0.0) == 0.0
    times.add(10.0, [0.5, 0.1])
    times.add(10.5, [])
    times.add(10.6, [0.3])
    assert times.mean(10.6) == pytest.approx(0.3)
    times.add(11.5, [0.7])
    assert times.mean(11.5) == pytest.approx(0.5)
    assert times.mean(12.6) == 0.0


def test_running_requests_move_with_the_queue_and_say_which_policies_they_followed(clock: Clock) -> None:
    session = ToySession(num_blocks=64)
    engine = make_engine(session)
    watcher = Steps()
    engine.observers.add(watcher)
    for number in range(5):
        add(engine, f"auto-{number}")
    add(engine, "mine", "full")

    def later() -> None:
        clock.now += 0.2

    outputs = run(engine, later)
    full, one = engine.policies.index("full"), engine.policies.index("one")
    # 2 of 6 run: 4 wait, then 2, then none. 2 are no less than half of 3, so the step is left a second after that.
    taken = [set(step.policy_index.tolist()) for step in session.steps]
    assert taken[:16] == [{one}] * 16
    assert taken[16:21] == [{one, full}] * 5 and taken[21:] == [{full}] * 3
    assert outputs["auto-0"].followed == {"one": 10}
    assert outputs["auto-4"].followed == {"one": 7, "full": 3}
    assert outputs["mine"].followed == {"full": 10}
    assert outputs["auto-4"].policy == "auto"
    assert (outputs["auto-4"].outputs[0].k == [[1] * 3] * 5 + [[2] * 3] * 3).all()
    for record, step in zip(watcher.records, session.steps, strict=True):  # the policies that tokens followed
        np.testing.assert_array_equal(record.policy_index, step.policy_index)


def test_an_idle_engine_has_left_its_step(clock: Clock) -> None:
    engine = make_engine()
    for number in range(5):
        add(engine, str(number))
    engine.step()
    assert engine.stats().load_steps == {"auto": 1}
    for number in range(5):
        engine.abort(str(number))
    assert engine.stats().load_steps == {"auto": 1}
    clock.now += 1.0
    assert engine.stats().load_steps == {"auto": 0}


def test_slow_tokens_begin_a_step_that_states_a_time(clock: Clock) -> None:
    steps = [{"policy": "full"}, {"policy": "one", "time_between_tokens": 0.5}]
    engine = make_engine(auto={**AUTO, "steps": steps})
    add(engine, "r", max_tokens=6)

    def later() -> None:
        clock.now += 0.6

    [output] = run(engine, later).values()
    # The prompt's step brings no time; that of the next is known when the third begins.
    assert output.followed == {"full": 3 + 1, "one": 4}


def test_the_background_runs_the_first_step(clock: Clock) -> None:
    engine = make_engine()
    for number in range(5):
        add(engine, str(number))
    engine.step()
    assert engine.stats().load_steps == {"auto": 1}
    for number in range(5):
        engine.abort(str(number))
    add(engine, "background", background=True)
    [output] = run(engine).values()
    assert engine.stats().load_steps == {"auto": 1}
    assert (output.outputs[0].k == 2).all()


def test_new_policies_leave_a_policy_by_load_where_it_was_unless_it_changed(clock: Clock) -> None:
    engine = make_engine()
    for number in range(5):
        add(engine, str(number))
    engine.step()
    engine.set_policies(toy_policies(another={"kind": "fixed", "k": 1}, auto=AUTO))
    assert engine.stats().load_steps == {"auto": 1}
    with pytest.raises(PolicyError, match="'auto' cannot be removed"):
        engine.set_policies(toy_policies())
    engine.set_policies(toy_policies(auto={**AUTO, "leave_seconds": 3.0}))
    assert engine.stats().load_steps == {"auto": 0}
    engine.step()  # 3 wait
    assert engine.stats().load_steps == {"auto": 1}


@pytest.mark.parametrize("policy", ["full", "one", "balanced"])
def test_alone_in_its_steps_a_request_reads_what_it_runs(policy: str) -> None:
    engine = make_engine(ToySession(num_blocks=64))
    add(engine, "r", policy)
    [output] = run(engine).values()
    decode = output.outputs[0].k[1:]
    reads = [output.prompt_k.max(axis=0).mean(), *decode.mean(axis=1)]
    assert output.expert_reads is not None and output.expert_reads.steps == 8
    assert output.avg_reads == pytest.approx(np.mean(reads))
    assert output.reads_per_token == pytest.approx((reads[0] + decode.mean(axis=1).sum()) / 10)
    assert output.reads_per_token <= output.avg_k


def test_a_steps_reads_are_shared_out_among_its_tokens() -> None:
    engine = make_engine(batch=8)
    for number in range(4):
        add(engine, str(number), "full")
    outputs = run(engine)
    params = SamplingParams(max_tokens=8, end_id=-1, adaptive_k_policy="full", n=4)
    engine.add(engine.prepare([5, 6, 7], params, RunOptions("four")))
    [four] = run(engine).values()
    # Every step reads 2 experts: the first for 12 tokens, of which each request has 3, the others for 4.
    for output in outputs.values():
        assert output.avg_reads == 2.0
        assert output.reads_per_token == pytest.approx((2 * 3 / 12 + 7 * 2 / 4) / 10)
    # The same steps are all of one request with four sequences.
    assert four.expert_reads is not None and (four.expert_reads.steps, four.expert_reads.tokens) == (8, 40)
    assert four.avg_reads == 2.0
    assert four.reads_per_token == pytest.approx(8 * 2 / 40)


def test_a_session_that_does_not_know_tells_no_reads() -> None:
    session = ToySession(num_blocks=64)
    session.knows_reads = False
    engine = make_engine(session)
    add(engine, "r")
    [output] = run(engine).values()
    assert output.expert_reads is None and output.avg_reads is None and output.reads_per_token is None
