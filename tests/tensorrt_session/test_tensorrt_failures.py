# SPDX-License-Identifier: Apache-2.0
"""What goes wrong: a table that is not the engine's, a GPU without room, calls that fail, packages that are missing."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_gpu import Error, Gpu
from gpu_engines import make_engine, poison

from adaptive_k_moe.engine_config import read_engine_config
from adaptive_k_moe.engine_format.tensorrt import Binding, Limits, make_bindings
from adaptive_k_moe.errors import DependencyError, DeviceError, DeviceMemoryError, EngineError
from adaptive_k_moe.runtime import LLM, KvCacheConfig, SamplingParams
from adaptive_k_moe.runtime.engine import Engine, EngineLimits
from adaptive_k_moe.runtime.outputs import RequestOutput
from adaptive_k_moe.runtime.sequence import RunOptions
from adaptive_k_moe.runtime.session import create_session
from adaptive_k_moe.runtime.session.tensorrt import session as session_module
from adaptive_k_moe.runtime.session.tensorrt.engine import Context

from checkpoints import Shape, make_checkpoint

SIZES: dict[str, Any] = {"max_batch_size": 4, "max_seq_len": 48, "max_num_tokens": 20}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("failures")
    make_engine(make_checkpoint(directory / "checkpoint", Shape("plain")), directory / "engine", **SIZES)
    return directory / "engine"


def open_llm(engine: Path, **options: Any) -> LLM:
    return LLM(engine, skip_tokenizer_init=True, **options)


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]


def answers(llm: LLM, count: int = 4) -> list[Any]:
    return llm.generate(PROMPTS[:count], SamplingParams(max_tokens=8, end_id=-1))


@pytest.fixture(scope="module")
def expected(engine: Path) -> list[list[int]]:
    with Gpu().installed(), open_llm(engine) as llm:
        return [output.outputs[0].token_ids for output in answers(llm)]


# The table. -------------------------------------------------------------------------------------------


def _index(table: list[Binding], name: str) -> int:
    return next(index for index, binding in enumerate(table) if binding.name == name)


def _changed(name: str, /, **changes: Any) -> Callable[[list[Binding]], list[Binding]]:
    def change(table: list[Binding]) -> list[Binding]:
        return [dataclasses.replace(b, **changes) if b.name == name else b for b in table]

    return change


def _limits(name: str, profile: int, **changes: tuple[int, ...]) -> Callable[[list[Binding]], list[Binding]]:
    def change(table: list[Binding]) -> list[Binding]:
        profiles: list[Limits] = list(table[_index(table, name)].profiles)
        profiles[profile] = dataclasses.replace(profiles[profile], **changes)
        return _changed(name, profiles=tuple(profiles))(table)

    return change


FAULTS: dict[str, tuple[Callable[[list[Binding]], list[Binding]], str]] = {
    "an input's name": (_changed("write_indices", name="write_index"), "'write_indices' is an input INT64"),
    "a cache's name": (_changed("present.1.key", name="present.1.k"), "'present.1.key' is an output FLOAT"),
    "an input's type": (_changed("policy_index", dtype="int64"), "'policy_index' is an input INT32"),
    "an output's type": (_changed("entropy", dtype="float16"), "'entropy' is an output FLOAT"),
    "a cache's length": (_changed("past_key_values.0.value", shape=("batch", 2, 47, 12)), r"\[-1, 2, 48, 12\], and"),
    "a fixed size": (_changed("logits", shape=("num_logits", 100)), r"\[-1, 101\], and this release binds"),
    "a size that should be open": (_changed("input_ids", shape=(4, "sequence")), r"'input_ids' is an input INT64"),
    "an input as an output": (_changed("k_values", is_input=False), "'k_values' is an input INT32"),
    "one too few": (lambda table: table[:-1], "binds nothing of that name"),
    "one too many": (
        lambda table: [*table, dataclasses.replace(table[-1], name="present.2.value")],
        "engine has no 'present.2.value'",
    ),
    "decode's smallest shape": (_limits("input_ids", 0, min=(2, 1)), "'input_ids' takes the shapes .* 'decode'"),
    "decode's largest shape": (_limits("write_indices", 0, max=(5,)), "'write_indices' takes the shapes .* 'decode'"),
    "prefill's usual shape": (_limits("logits_indices", 1, opt=(2,)), "'logits_indices' takes .* 'prefill'"),
    "prefill's largest shape": (_limits("position_ids", 1, max=(1, 21)), "'position_ids' takes .* 'prefill'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_that_is_not_what_the_table_says_is_not_opened(
    engine: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, sentence = FAULTS[fault]
    monkeypatch.setattr(session_module, "make_bindings", lambda *sizes: change(make_bindings(*sizes)))
    with Gpu().installed(), pytest.raises(EngineError, match=sentence):
        open_llm(engine)


# Memory. ----------------------------------------------------------------------------------------------


def test_a_gpu_without_room_says_what_would_fit_and_keeps_nothing(engine: Path) -> None:
    with Gpu().installed() as gpu:
        with open_llm(engine):
            needed = gpu.memory.used
    for share in (0.0, 0.1, 0.5, 0.9, 0.999):
        with Gpu(capacity=int(needed * share)).installed():
            with pytest.raises(DeviceMemoryError) as raised:
                open_llm(engine)
        sentence = str(raised.value)
        assert "does not fit on this GPU: the GPU has no room for another" in sentence
        assert "give a --kv_cache_max_tokens of fewer than 192" in sentence
        # [2 heads, 48 tokens, 12], keys and values, 2 layers, float32
        assert f"takes {2 * 48 * 12 * 4 * 4 / 1e6:.1f} MB" in sentence
    with Gpu(capacity=needed).installed():
        open_llm(engine).shutdown()


def test_a_smaller_cache_has_fewer_slots(engine: Path, expected: list[list[int]]) -> None:
    used = {}
    for tokens, slots in ((None, 4), (10_000, 4), (2 * 48 + 47, 2), (10, 1)):
        with Gpu().installed() as gpu, open_llm(engine, kv_cache_config=KvCacheConfig(max_tokens=tokens)) as llm:
            assert (llm.stats().kv_blocks_total, llm.stats().kv_block_size) == (slots, 48)
            used[slots] = gpu.memory.used
            assert [output.outputs[0].token_ids for output in answers(llm)] == expected
    assert used[1] < used[2] < used[4]


# Failing calls. ---------------------------------------------------------------------------------------


class Steps:
    """An engine without a thread, so that who is in which step is certain."""

    def __init__(self, directory: Path) -> None:
        config = read_engine_config(directory)
        build = config.build_config
        limits = EngineLimits(build.max_batch_size, build.max_num_tokens, build.max_seq_len)
        self.engine = Engine(
            create_session(directory, config),
            config.policy_tables(),
            limits,
            tokenizer=None,
            eos_token_ids=[],
            full_k=config.pretrained_config.num_experts_per_tok,
        )
        self.ends: dict[str, RequestOutput] = {}

    def add(self, name: str, prompt: list[int], max_tokens: int = 8) -> None:
        self.engine.add(self.engine.prepare(prompt, SamplingParams(max_tokens=max_tokens, end_id=-1), RunOptions(name)))

    def step(self) -> None:
        self.ends |= {output.request_id: output for output in self.engine.step() if output.finished}

    def answers(self, prompts: list[list[int]] = PROMPTS) -> list[RequestOutput]:
        for index, prompt in enumerate(prompts):
            self.add(str(index), prompt)
        while self.engine.has_work:
            self.step()
        return [self.ends.pop(str(index)) for index in range(len(prompts))]


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with Gpu().installed() as found:
        yield found


@pytest.fixture
def steps(engine: Path, gpu: Gpu) -> Iterator[Steps]:
    found = Steps(engine)
    yield found
    found.engine.close()


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    assert not [output.error for output in outputs if output.error]
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(("profile", "sizes"), [(0, {"max_batch_size": 2}), (1, {"max_num_tokens": 3})])
def test_a_step_beyond_the_engines_profiles_is_an_error_and_not_a_wrong_number(
    engine: Path, profile: int, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the comparison with the table did not exist."""
    config = read_engine_config(engine)
    small = config.build_config.model_copy(update=sizes)
    narrow = {b.name: b.profiles[profile] for b in make_bindings(config.pretrained_config, small)}
    monkeypatch.setattr(session_module.TrtEngine, "require", lambda *_: None)
    with Gpu().installed():
        steps = Steps(engine)
        for name, shapes in steps.engine._session._engine._engine.profiles.items():  # type: ignore[attr-defined]
            shapes[profile] = [list(narrow[name].min), list(narrow[name].opt), list(narrow[name].max)]
        errors = [output.error for output in steps.answers()]
        steps.engine.close()
    assert any(errors)
    assert all(error is None or "TensorRT refuses the shape" in error for error in errors)


STEP_CALLS = [
    "cudaMemcpyAsync",
    "cudaEventRecord",
    "cudaStreamWaitEvent",
    "cudaStreamSynchronize",
    "cudaGraphLaunch",
    "execute_async_v3",
]


@pytest.mark.parametrize("call", STEP_CALLS)
def test_a_failing_call_ends_the_requests_of_its_step_and_no_others(
    steps: Steps, gpu: Gpu, expected: list[list[int]], call: str
) -> None:
    for _ in range(3):
        steps.answers()  # decode of each size is captured now
    steps.add("waiting", PROMPTS[0])
    for index in range(4):
        steps.add(str(index), PROMPTS[index])
    gpu.failures[call] = Error.cudaErrorInvalidValue
    steps.step()
    assert call not in gpu.failures
    assert sorted(steps.ends) == ["0", "1", "2", "waiting"]  # four slots
    for output in steps.ends.values():
        reason = "TensorRT cannot" if "_" in call else f"the GPU failed in {call}: error 1."
        assert str(output.error).startswith(f"the engine failed: {reason}")
        assert output.outputs[0].finish_reason == "error"
    for block in range(4):  # what a torn step leaves may be anything
        poison(gpu, steps.engine._session, block)
    while steps.engine.has_work:
        steps.step()
    assert tokens([steps.ends["3"]]) == [expected[3]]
    # The next ones find a session that is as good as new.
    assert tokens(steps.answers()) == expected


@pytest.mark.parametrize(
    "call", ["create_execution_context", "bind", "cudaStreamBeginCapture", "cudaGraphInstantiate", "captured work"]
)
def test_where_decode_cannot_be_captured_it_runs_without_graphs(
    steps: Steps,
    gpu: Gpu,
    expected: list[list[int]],
    call: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if call == "captured work":
        gpu.tensorrt_refuses_capture = True
    elif call == "bind":
        session: Any = steps.engine._session
        bind = Context.bind

        def refuse(context: Context, *values: Any) -> None:
            if context not in (session._prefill, session._decode._shared):
                raise DeviceError("TensorRT refuses an address.")
            bind(context, *values)

        monkeypatch.setattr(Context, "bind", refuse)
    else:
        gpu.failures[call] = Error.cudaErrorInvalidValue
    with caplog.at_level(logging.WARNING):
        assert tokens(steps.answers()) == expected
        assert tokens(steps.answers()) == expected
    assert gpu.counts.get("cudaGraphLaunch", 0) == 0
    assert sum("runs without CUDA graphs" in record.message for record in caplog.records) == 1


def test_a_gpu_that_is_lost_is_said_in_every_later_answer(steps: Steps, gpu: Gpu) -> None:
    steps.answers()
    gpu.sticky = Error.cudaErrorIllegalAddress
    assert "error 700" in str(steps.answers(PROMPTS[:1])[0].error)
    gpu.sticky = None  # CUDA does not forgive, and the session must not ask it again
    for output in steps.answers():
        assert "start the server again" in str(output.error)
        assert "error 700" in str(output.error)
    assert steps.engine.stats().kv_blocks_used == 0


def test_caches_that_were_torn_while_they_moved_are_not_used_again(steps: Steps, gpu: Gpu) -> None:
    for index in range(3):
        steps.add(str(index), PROMPTS[index], max_tokens=30)
    for _ in range(3):
        steps.step()
    steps.engine.abort("0")
    gpu.failures["cudaMemcpy2DAsync"] = Error.cudaErrorInvalidValue
    steps.step()  # the last takes the place of the first
    assert "cudaMemcpy2DAsync" not in gpu.failures
    assert {name: "cudaMemcpy2DAsync" in str(output.error) for name, output in steps.ends.items()} == {
        "1": True,
        "2": True,
    }
    assert "start the server again" in str(steps.answers(PROMPTS[:1])[0].error)


# Opening. ---------------------------------------------------------------------------------------------


def test_without_tensorrt_the_sentence_says_what_to_install(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(DependencyError, match=r"pip install 'adaptive-k-moe\[tensorrt\]' there; .* openvino runs"):
        open_llm(engine)


def test_without_cuda_python_the_sentence_says_what_to_install(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise RuntimeError("Failed to dlopen libcudart.so.13\nand a long story")

    with Gpu().installed(), monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cuda.bindings.runtime", None)
        with pytest.raises(DependencyError, match=r"needs cuda-python .* pip install 'adaptive-k-moe\[tensorrt\]'"):
            open_llm(engine)
        patch.setitem(sys.modules, "cuda.bindings.runtime", SimpleNamespace(cudaGetDeviceCount=missing))
        with pytest.raises(DependencyError, match=r"cuda-python \(Failed to dlopen libcudart.so.13\): install"):
            open_llm(engine)


def test_without_a_gpu_the_sentence_says_so(engine: Path) -> None:
    with Gpu().installed() as gpu:
        gpu.failures["cudaGetDeviceCount"] = Error.cudaErrorInvalidValue
        with pytest.raises(DeviceError, match=r"no NVIDIA GPU can be used here \(error 1\)"):
            open_llm(engine)


def test_the_plugin_must_be_there(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Gpu().installed():
        registry = SimpleNamespace(get_creator=lambda *_: None)
        monkeypatch.setattr(sys.modules["tensorrt"], "get_plugin_registry", lambda: registry)
        monkeypatch.setenv("ADAPTIVE_K_TENSORRT_LIBRARY", str(tmp_path / "plugin.so"))
        with pytest.raises(DependencyError, match=r"plugin\.so is not there: build it"):
            open_llm(engine)


def test_a_context_that_cannot_be_created_keeps_the_engine_from_being_opened(engine: Path) -> None:
    with Gpu().installed() as gpu:
        gpu.failures["create_execution_context"] = Error.cudaErrorMemoryAllocation
        with pytest.raises(DeviceError, match="TensorRT cannot create an execution context: no room for a context"):
            open_llm(engine)


def test_an_engine_of_another_tensorrt_is_refused(engine: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(engine, tmp_path / "engine")
    (copy / "rank0.engine").write_bytes(b"another")
    config = read_engine_config(engine)
    with Gpu().installed(), pytest.raises(EngineError, match=r"cannot load .*rank0\.engine: Serialized .* match; an"):
        create_session(copy, config)


def test_sizes_whose_slots_tensorrt_cannot_address_are_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Shape("plain"))
    config = make_engine(checkpoint, tmp_path / "engine", **SIZES | {"max_seq_len": 47})
    with Gpu().installed(), pytest.raises(EngineError, match=r"has 4512 bytes, .* multiples of 256 only: choose"):
        create_session(tmp_path / "engine", config)
