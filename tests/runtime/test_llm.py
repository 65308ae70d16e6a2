# SPDX-License-Identifier: Apache-2.0
"""`LLM` and its handles: threads, callbacks, asyncio, shutdown, and what is refused."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_session import ToySession, toy_config, toy_policies

from adaptive_k_moe.errors import EngineError, PolicyError, RequestError
from adaptive_k_moe.policy import PolicyTables
from adaptive_k_moe.runtime import (
    LLM,
    EngineStats,
    KvCacheConfig,
    Observer,
    Refusal,
    RequestContext,
    RequestOutput,
    SamplingParams,
    StepRecord,
)
from adaptive_k_moe.runtime.llm import _watchers, watch_llms

from checkpoints import SUPPORT
from waiting import eventually

FOREVER = SamplingParams(max_tokens=50, end_id=-1)


def open_llm(session: ToySession | None = None, *, policies: PolicyTables | None = None, **options: Any) -> LLM:
    more = {name: options.pop(name) for name in ("tokenizer", "read_policies", "max_batch_size") if name in options}
    return LLM.from_session(session or ToySession(), toy_config(**options), policies or toy_policies(), **more)


@pytest.fixture
def llm() -> Iterator[LLM]:
    with open_llm() as llm:
        yield llm


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "adaptive-k-engine"]


def test_one_prompt_gives_one_output_and_a_list_gives_a_list(llm: LLM) -> None:
    one = llm.generate([1, 2, 3], SamplingParams(max_tokens=4, end_id=-1))
    assert isinstance(one, RequestOutput)
    assert one.prompt_token_ids == [1, 2, 3]
    many = llm.generate([[1, 2, 3], [4]], [SamplingParams(max_tokens=4, end_id=-1), SamplingParams(max_tokens=2)])
    assert [output.prompt_token_ids for output in many] == [[1, 2, 3], [4]]
    assert many[0].outputs[0].token_ids == one.outputs[0].token_ids
    assert not llm.generate([])


def test_streamed_pieces_make_the_whole(llm: LLM) -> None:
    params = SamplingParams(max_tokens=9, end_id=-1, n=2, temperature=1, seed=3)
    outputs = list(llm.generate_async([1, 2], params, streaming=True))
    assert [output.finished for output in outputs] == [False] * 8 + [True]
    for index in range(2):
        pieces = [token for output in outputs for token in output.outputs[index].token_ids_diff]
        assert pieces == outputs[-1].outputs[index].token_ids
        for count, output in enumerate(outputs, start=1):
            assert output.outputs[index].k.shape == (count, 3)  # an early output does not change later
    assert outputs[-1].outputs[0].token_ids != outputs[-1].outputs[1].token_ids


def test_without_streaming_only_the_end_comes(llm: LLM) -> None:
    handle = llm.generate_async([1, 2], SamplingParams(max_tokens=5, end_id=-1))
    outputs = list(handle)
    assert len(outputs) == 1
    assert outputs[0] is handle.result()
    assert handle.finished
    assert outputs[0].outputs[0].token_ids_diff == outputs[0].outputs[0].token_ids


def test_asyncio_interleaves_requests(llm: LLM) -> None:
    async def read(prompt: int) -> list[int]:
        handle = llm.generate_async([prompt], SamplingParams(max_tokens=10, end_id=-1), streaming=True)
        return [token async for output in handle for token in output.outputs[0].token_ids_diff]

    async def main() -> tuple[list[list[int]], RequestOutput]:
        return await asyncio.gather(*(read(i) for i in range(1, 8))), await llm.generate_async([1], FOREVER)

    streamed, last = asyncio.run(main())
    for index, tokens in enumerate(streamed, start=1):
        assert tokens == llm.generate([index], SamplingParams(max_tokens=10, end_id=-1)).outputs[0].token_ids
    assert len(last.outputs[0].token_ids) == 50


def test_a_callback_gets_every_output_on_the_engine_thread(llm: LLM) -> None:
    seen: list[tuple[str, int]] = []

    def see(output: RequestOutput) -> None:
        seen.append((threading.current_thread().name, len(output.outputs[0].token_ids)))

    params = SamplingParams(max_tokens=4, end_id=-1)
    handle = llm.generate_async([1], params, streaming=True, request_id="mine", on_output=see)
    assert handle.request_id == handle.result().request_id == "mine"
    assert seen == [("adaptive-k-engine", count) for count in range(1, 5)]


def test_a_callback_that_raises_aborts_its_request_alone(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    def broken(output: RequestOutput) -> None:
        raise ValueError("no")

    handle = llm.generate_async([1], FOREVER, streaming=True, on_output=broken)
    assert handle.result(60).outputs[0].finish_reason == "cancelled"
    assert "on_output" in caplog.text
    assert len(llm.generate([1], FOREVER).outputs[0].token_ids) == 50


def test_a_callback_cannot_wait_for_itself(llm: LLM) -> None:
    errors: list[Exception] = []

    def waits(output: RequestOutput) -> None:
        if not output.finished:
            try:
                llm.generate([1])
            except RequestError as error:
                errors.append(error)

    llm.generate_async([1], SamplingParams(max_tokens=2, end_id=-1), streaming=True, on_output=waits).result(60)
    assert "cannot wait" in str(errors[0])


def test_abort_ends_a_request_early_and_frees_its_blocks() -> None:
    session = ToySession()
    session.delay = 0.1
    with open_llm(session) as llm:
        handle = llm.generate_async([1, 2], FOREVER, streaming=True)
        next(handle)
        handle.abort()
        output = handle.result(60)
        assert output.outputs[0].finish_reason == "cancelled"
        assert len(output.outputs[0].token_ids) < 50
        assert eventually(lambda: llm.stats().kv_blocks_used == 0)
        handle.abort()
        assert llm.stats().cancellations_total == 1


def test_a_timeout_leaves_the_request_running() -> None:
    session = ToySession()
    session.delay = 0.1
    with open_llm(session) as llm:
        handle = llm.generate_async([1], FOREVER)
        with pytest.raises(TimeoutError):
            handle.result(0.02)
        session.delay = 0.0
        assert len(handle.result(60).outputs[0].token_ids) == 50


def test_shutdown_cancels_what_runs_and_leaves_no_thread() -> None:
    before = len(engine_threads())
    session = ToySession()
    session.delay = 0.1
    llm = open_llm(session)
    handle = llm.generate_async([1], FOREVER)
    llm.shutdown()
    llm.shutdown()
    assert handle.result(60).outputs[0].finish_reason == "cancelled"
    assert session.closed == 1
    assert len(engine_threads()) == before
    with pytest.raises(EngineError, match="shut down"):
        llm.generate([1])
    with pytest.raises(EngineError, match="shut down"):
        llm.reload_policies()


def test_a_forgotten_llm_ends_its_thread_and_not_its_requests() -> None:
    before = len(engine_threads())
    session = ToySession()
    handle = open_llm(session).generate_async([1], FOREVER)
    gc.collect()
    assert len(handle.result(60).outputs[0].token_ids) == 50
    del handle
    gc.collect()
    assert eventually(lambda: len(engine_threads()) == before and session.closed == 1)


def test_an_idle_engine_sleeps(llm: LLM) -> None:
    llm.generate([1], SamplingParams(max_tokens=2))
    steps, cpu = llm.stats().steps_total, time.process_time()
    time.sleep(0.2)
    assert llm.stats().steps_total == steps
    assert time.process_time() - cpu < 0.1


@pytest.mark.parametrize(
    ("prompt", "params", "error", "sentence"),
    [
        ([], {}, RequestError, "empty"),
        ([50], {}, RequestError, "token id 50"),
        ([-1], {}, RequestError, "token id -1"),
        ([1] * 64, {}, RequestError, "max_seq_len is 64"),
        (["x"], {}, RequestError, "list of token ids"),
        ("text", {}, RequestError, "needs the tokenizer"),
        ([1], {"stop": "x"}, RequestError, "need the tokenizer"),
        ([1], {"bad": "x"}, RequestError, "need the tokenizer"),
        ([1], {"logprobs": 51}, RequestError, "logprobs is 51"),
        ([1], {"end_id": 50}, RequestError, "50 is not"),
        ([1], {"stop_token_ids": [99]}, RequestError, "99 is not"),
        ([1], {"adaptive_k_policy": "none"}, PolicyError, "full, balanced, one"),
    ],
)
def test_an_impossible_request_is_refused_at_once(
    llm: LLM, prompt: Any, params: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        llm.generate_async(prompt, SamplingParams(**params))
    assert llm.stats().requests_total == 0
    assert llm.generate([1], SamplingParams(max_tokens=1)).finished


@pytest.mark.parametrize("inputs", [None, 3, b"text", {"prompt": "text"}, [1.5], [None]])
def test_what_is_no_prompt_is_one_sentence(llm: LLM, inputs: Any) -> None:
    for ask in (llm.generate, llm.generate_async):
        with pytest.raises(RequestError, match="a prompt is a text or a list of token ids"):
            ask(inputs)  # type: ignore[operator]


@pytest.mark.parametrize("params", [{"max_tokens": 3}, 3, "full", [None], [{"max_tokens": 3}]])
def test_what_is_no_sampling_params_is_one_sentence(llm: LLM, params: Any) -> None:
    for ask in (llm.generate, llm.generate_async):
        with pytest.raises(RequestError, match="sampling_params are a SamplingParams, or a list"):
            ask([1], params)  # type: ignore[operator]


@pytest.mark.parametrize(
    "arguments",
    [
        {"request_id": 1},
        {"streaming": 1},
        {"on_output": "print"},
        {"enrollment": "spring"},
        {"context": {"client_id": "me"}},
        {"chat_template_kwargs": "tools"},
        {"chat_template_kwargs": {1: 2}},
    ],
)
def test_an_argument_of_a_wrong_type_is_one_sentence(llm: LLM, arguments: dict[str, Any]) -> None:
    (name,) = arguments
    watcher = _Watcher()
    llm.add_observer(watcher)
    with pytest.raises(RequestError, match=f"^{name} is .*: it must be .*[^.][.]$"):
        llm.generate_async([1], **arguments)
    for refusal in watcher.refusals:
        assert isinstance(refusal.request_id, str) and refusal.enrollment is None and not refusal.context.client_id
    assert llm.generate([1]).finished


def test_prompts_may_come_from_a_generator(llm: LLM) -> None:
    outputs = llm.generate(prompt for prompt in ([1], [2, 3]))  # type: ignore[call-overload]
    assert [output.prompt_token_ids for output in outputs] == [[1], [2, 3]]


def test_a_fork_is_told_that_the_llm_is_its_parents(llm: LLM) -> None:
    code = 0
    if (child := os.fork()) == 0:
        try:
            llm.generate([1])
            code = 1
        except EngineError as error:
            code = 2 if "before the process forked" in str(error) else 3
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert llm.generate([1]).finished


def test_a_request_larger_than_the_whole_cache_is_refused() -> None:
    with open_llm(ToySession(num_blocks=4)) as llm:
        assert llm.generate([1] * 8, SamplingParams(max_tokens=9, end_id=-1)).finished  # 16 tokens, the last not kept
        with pytest.raises(RequestError, match="KV cache, which holds 16"):
            llm.generate([1] * 8, SamplingParams(max_tokens=10))


@pytest.mark.parametrize("tokens", [10**12, 10**30])
def test_a_cache_beyond_all_memory_is_one_sentence(engine_dir: Path, tokens: int) -> None:
    with pytest.raises(EngineError, match=r"no memory for a KV cache of \d+ tokens, \d+\.\d GB"):
        LLM(engine_dir, kv_cache_config=KvCacheConfig(max_tokens=tokens))


def test_a_running_request_id_is_taken() -> None:
    session = ToySession()
    session.delay = 0.1
    with open_llm(session) as llm:
        handle = llm.generate_async([1], FOREVER, request_id="a")
        with pytest.raises(RequestError, match="'a' is still running"):
            llm.generate_async([1], request_id="a")
        session.delay = 0.0
        handle.result(60)
        assert llm.generate_async([1], request_id="a").result(60).finished


def test_a_late_abort_does_not_reach_the_next_request_of_that_id() -> None:
    session = ToySession()
    session.delay = 0.005
    with open_llm(session) as llm:
        first = llm.generate_async([1], SamplingParams(max_tokens=1), request_id="a")
        late = first._abort
        first.result(60)
        second = llm.generate_async([1], FOREVER, request_id="a")
        late()
        assert len(second.result(60).outputs[0].token_ids) == 50


def test_nothing_runs_when_one_prompt_of_many_is_bad(llm: LLM) -> None:
    with pytest.raises(RequestError):
        llm.generate([[1], [99]])
    with pytest.raises(RequestError, match="2 prompts came with 1"):
        llm.generate([[1], [2]], [SamplingParams()])
    assert llm.stats().requests_total == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"engine_dir": 5},
        {"max_batch_size": "many"},
        {"max_num_tokens": 2.5},
        {"num_threads": True},
        {"kv_cache_config": {"max_tokens": 64}},
        {"tokenizer": len},
        {"skip_tokenizer_init": None},
    ],
)
def test_an_llms_argument_of_a_wrong_type_is_one_sentence(engine_dir: Path, arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(EngineError, match=f"^{name} is .*: it must be .*[^.][.]$"):
        LLM(**{"engine_dir": engine_dir, **arguments})


@pytest.mark.parametrize("value", ["a", 1.5, True, [3], 0, -1])
def test_an_unusable_size_of_the_kv_cache_is_one_sentence(value: Any) -> None:
    with pytest.raises(EngineError, match=r"max_tokens is .*: it must be "):
        KvCacheConfig(max_tokens=value)


def test_sizes_beyond_the_build_are_refused() -> None:
    with pytest.raises(EngineError, match="max_batch_size is 9"):
        open_llm(max_batch_size=9)


def test_reloaded_policies_hold_from_the_next_step() -> None:
    tables = [toy_policies(extra={"kind": "fixed", "k": 1})]
    with open_llm(read_policies=lambda: tables[0]) as llm:
        with pytest.raises(PolicyError):
            llm.generate([1], SamplingParams(adaptive_k_policy="extra"))
        llm.reload_policies()
        output = llm.generate([1], SamplingParams(adaptive_k_policy="extra"))
        assert output.policy == "extra"
        assert output.avg_k == 1
        assert llm.policies.names == ["full", "balanced", "one", "extra"]


def test_a_policy_in_use_stays() -> None:
    session = ToySession()
    session.delay = 0.1
    start = toy_policies(extra={"kind": "fixed", "k": 1})
    tables = [toy_policies()]
    with open_llm(session, policies=start, read_policies=lambda: tables[0]) as llm:
        params = SamplingParams(max_tokens=50, end_id=-1, adaptive_k_policy="extra")
        handle = llm.generate_async([1], params)
        with pytest.raises(PolicyError, match="'extra' cannot be removed"):
            llm.reload_policies()
        # The same name in another row: the running request follows it there.
        tables[0] = toy_policies(other={"kind": "fixed", "k": 2}, extra={"kind": "fixed", "k": 1})
        llm.reload_policies()
        session.delay = 0.0
        assert handle.result(60).avg_k == 1
        tables[0] = toy_policies()
        llm.reload_policies()


class _Watcher(Observer):
    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.ends: list[RequestOutput] = []
        self.refusals: list[Refusal] = []

    def on_request_refused(self, refusal: Refusal) -> None:
        self.refusals.append(refusal)

    def on_request_finished(self, output: RequestOutput) -> None:
        self.ends.append(output)

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)
        raise RuntimeError("an observer's trouble is its own")


def test_observers_and_stats_count_the_same(llm: LLM) -> None:
    watcher = _Watcher()
    llm.add_observer(watcher)
    llm.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=6, end_id=-1))
    assert eventually(lambda: len(watcher.steps) == llm.stats().steps_total)
    stats = llm.stats()
    assert isinstance(stats, EngineStats)
    assert stats.prompt_tokens_total == sum(step.num_prefill_tokens for step in watcher.steps) == 5
    assert stats.generation_tokens_total == sum(step.num_generated_tokens for step in watcher.steps) == 12
    assert sum(step.num_decode_tokens for step in watcher.steps) == 10
    assert len(watcher.ends) == stats.finished_total == 2
    llm.remove_observer(watcher)
    llm.remove_observer(watcher)
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=6, end_id=-1))
    assert len(watcher.ends) == 2
    assert sum(len(step.token_intervals) for step in watcher.steps) == 10
    # The steps hold each token's k once, in the order in which the tokens were computed.
    ks = np.concatenate([step.k for step in watcher.steps])
    assert len(ks) == 5 + 10
    assert ks.sum() == sum(output.prompt_k.sum() + output.outputs[0].k[1:].sum() for output in watcher.ends)


def test_observers_are_told_of_refusals(llm: LLM) -> None:
    watcher = _Watcher()
    llm.add_observer(watcher)
    context = RequestContext(client_id="mine")
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.generate_async([], request_id="one", context=context)
    with pytest.raises(PolicyError):
        llm.generate([[1], [2]], SamplingParams(adaptive_k_policy="none such"))
    with pytest.raises(RequestError, match="sampling_params"):
        llm.generate_async([1], {"max_tokens": 3}, request_id="two")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="2 prompts came with 1"):
        llm.generate([[1], [2]], [SamplingParams()])
    with pytest.raises(RequestError, match="a prompt is a text"):
        llm.generate(3)  # type: ignore[call-overload]
    with pytest.raises(RequestError, match="own tokenizer"):
        llm.chat([{"role": "user", "content": "Who?"}], SamplingParams(adaptive_k_policy="one"))
    with pytest.raises(RequestError, match="chat_template_kwargs"):
        llm.chat([{"role": "user", "content": "Who?"}], chat_template_kwargs="tools")  # type: ignore[call-overload]
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.generate_async([], background=True)  # nobody's request
    llm.shutdown()
    with pytest.raises(EngineError, match="shut down"):
        llm.generate([[1], [2]], SamplingParams(adaptive_k_policy="one"))
    first, second, *others, last = watcher.refusals
    assert (first.request_id, first.error_kind, first.context) == ("one", "request", context)
    assert "the prompt is empty" in first.error
    assert (second.policy, second.error_kind) == ("none such", "policy")
    assert [(refusal.policy, refusal.error_kind) for refusal in others] == [
        *[(None, "request")] * 3, ("one", "request"), (None, "request"),
    ]  # fmt: skip
    assert others[0].request_id == "two"
    assert (last.policy, last.error_kind) == ("one", "engine")
    assert len({refusal.request_id for refusal in watcher.refusals} - {""}) == len(watcher.refusals)
    assert not watcher.ends


def test_who_watches_for_llms_sees_each_and_cannot_keep_one_from_opening(
    llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[LLM] = []

    def watch(found: LLM) -> None:
        seen.append(found)
        raise RuntimeError("a watcher's trouble is its own")

    watch_llms(watch)
    try:
        assert llm in seen
        with LLM.from_session(ToySession(), toy_config(), toy_policies()) as another:
            assert seen[-1] is another
        _watchers.remove(watch)
        seen.clear()
        watch_llms(watch)
        assert llm in seen and another not in seen  # it is closed
    finally:
        _watchers.remove(watch)
    assert "an LLM watcher raised" in caplog.text


def test_metrics_are_in_order(llm: LLM) -> None:
    metrics = llm.generate([1, 2], SamplingParams(max_tokens=3, end_id=-1)).metrics
    times = [
        metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time, metrics.last_token_time,
        metrics.finished_time,
    ]  # fmt: skip
    assert times == sorted(times)  # type: ignore[type-var]


def test_many_threads_share_one_llm(llm: LLM) -> None:
    results: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        params = SamplingParams(max_tokens=8, end_id=-1, seed=index, temperature=1)
        results[index] = llm.generate([index % 40 + 1], params).outputs[0].token_ids

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(0, 40, 7):
        params = SamplingParams(max_tokens=8, end_id=-1, seed=index, temperature=1)
        assert results[index] == llm.generate([index % 40 + 1], params).outputs[0].token_ids


def test_an_interpreter_with_a_running_request_exits_at_once() -> None:
    script = (
        "from toy_session import *; from adaptive_k_moe.runtime import *\n"
        "session = ToySession(); session.delay = 0.2\n"
        "llm = LLM.from_session(session, toy_config(), toy_policies())\n"
        "handle = llm.generate_async([1], SamplingParams(max_tokens=500, end_id=-1), streaming=True)\n"
        "next(handle)\n"
    )
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", script], cwd=SUPPORT, capture_output=True, text=True, timeout=90)
    assert (result.returncode, result.stderr) == (0, "")
    assert time.monotonic() - started < 60


def test_prompts_may_be_arrays(llm: LLM) -> None:
    expected = llm.generate([1, 2, 3]).outputs[0].token_ids
    assert llm.generate(np.array([1, 2, 3])).outputs[0].token_ids == expected  # type: ignore[call-overload]
    assert llm.generate([np.array([1, 2, 3])])[0].outputs[0].token_ids == expected  # type: ignore[list-item, index]


def test_words_of_token_ids_end_an_answer_after_them(llm: LLM) -> None:
    whole = llm.generate([1, 2, 3], SamplingParams(max_tokens=12, end_id=-1)).outputs[0].token_ids
    word = whole[3:5]
    first = next(i for i in range(11) if whole[i : i + 2] == word) + 2  # the word may come earlier, too
    answer = llm.generate([1, 2, 3], SamplingParams(max_tokens=12, end_id=-1, stop=[[49, 49, 49], word])).outputs[0]
    assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == (whole[:first], "stop", tuple(word))
    late = SamplingParams(max_tokens=12, end_id=-1, stop=[word], min_tokens=first + 1)
    assert len(llm.generate([1, 2, 3], late).outputs[0].token_ids) > first
    # The prompt's own tokens are no part of the answer.
    asked = llm.generate([1, *word], SamplingParams(max_tokens=1, end_id=-1, stop=[word])).outputs[0]
    assert asked.finish_reason == "length"


def test_words_of_token_ids_can_be_forbidden(llm: LLM) -> None:
    whole = llm.generate([1, 2, 3], SamplingParams(max_tokens=6, end_id=-1)).outputs[0].token_ids
    other = llm.generate([1, 2, 3], SamplingParams(max_tokens=6, end_id=-1, bad=[whole[1:3]])).outputs[0].token_ids
    assert other[:2] == whole[:2] and other[2] != whole[2]


def test_a_biased_token_is_chosen(llm: LLM) -> None:
    params = SamplingParams(max_tokens=4, end_id=-1, logit_bias={np.int64(17): 100.0})
    assert llm.generate([1, 2, 3], params).outputs[0].token_ids == [17] * 4


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        (dict(stop=[[1, 50]]), "stop has token id 50, but the model's are 0 to 49"),
        (dict(bad=[[-1]]), "bad has token id -1, but"),
        (dict(logit_bias={50: 1.0}), "logit_bias has token id 50, but"),
        (dict(logit_bias={"word": 1.0}), "texts in logit_bias need the tokenizer"),
    ],
)
def test_token_ids_outside_the_vocabulary_are_refused(llm: LLM, params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        llm.generate([1], SamplingParams(**params))


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        (dict(stop=[1, 2]), "stop is .1, 2.: it must be text or a list of texts or of lists of token ids"),
        (dict(stop=[[]]), "stop is .*: it must be words that are not empty"),
        (dict(bad=[""]), "bad is .*: it must be words that are not empty"),
        (dict(logit_bias={1: float("inf")}), "logit_bias is .*: it must be a dictionary of token ids or texts"),
        (dict(logit_bias=[1.0]), "logit_bias is .*: it must be a dictionary of token ids or texts"),
    ],
)
def test_unusable_words_and_biases_are_one_sentence(params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        SamplingParams(**params)


def test_kv_blocks_are_counted_for_each_request() -> None:
    with open_llm(ToySession(block_size=4)) as llm:  # the last token's keys and values are never computed
        for prompt, tokens, blocks in (([1], 1, 1), ([1, 2, 3], 6, 2), ([1] * 9, 1, 3)):
            output = llm.generate(prompt, SamplingParams(max_tokens=tokens, end_id=-1))
            assert output.metrics.num_kv_blocks == blocks
        several = llm.generate([1] * 9, SamplingParams(max_tokens=1, end_id=-1, n=2, temperature=1.0))
        assert several.metrics.num_kv_blocks == 6
