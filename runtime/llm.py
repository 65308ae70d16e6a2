# SPDX-License-Identifier: Apache-2.0
"""`LLM`: an engine directory made to answer prompts; shaped as TensorRT-LLM's class of that name."""

from __future__ import annotations

import contextlib
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

from adaptive_k_moe.arguments import check_arguments, check_fields
from adaptive_k_moe.errors import AdaptiveKError, EngineError, PolicyError, RequestError
from adaptive_k_moe.model_config import Device, KvCacheDtype
from adaptive_k_moe.policy import PolicyTables
from adaptive_k_moe.runtime.chat_template import Message
from adaptive_k_moe.runtime.engine import Engine, EngineLimits, Prompt
from adaptive_k_moe.runtime.handle import GenerationHandle, OnOutput
from adaptive_k_moe.runtime.outputs import NO_CONTEXT, Enrollment, ErrorKind, RequestContext, RequestOutput
from adaptive_k_moe.runtime.sampling_params import SamplingParams
from adaptive_k_moe.runtime.sequence import RunOptions
from adaptive_k_moe.runtime.session.base import Int64Array, Session
from adaptive_k_moe.runtime.telemetry import EngineStats, Observer, Refusal, logger
from adaptive_k_moe.runtime.tokenizer import Tokenizer, TokenizerLike
from adaptive_k_moe.runtime.worker import EngineThread

if TYPE_CHECKING:
    from adaptive_k_moe.engine_config import EngineConfig


# The `LLM`s of this process and who wants to know of them, for `watch_llms`.
_llms: weakref.WeakSet[LLM] = weakref.WeakSet()
_watchers: list[Callable[[LLM], None]] = []
_watch_lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCacheConfig:
    """The KV cache.

    Attributes:
        max_tokens: tokens that it holds, over all sequences; None is enough for a full batch of longest
            sequences, within what the session allows.
        dtype: of keys and values: "float32", "bfloat16" or "int8"; "auto" is what the engine's attention computes in.
    """

    max_tokens: int | None = None
    dtype: KvCacheDtype = "auto"

    def __post_init__(self) -> None:
        check_fields(self, EngineError)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise EngineError(f"the KV cache's max_tokens is {self.max_tokens}: it must be at least 1.")


class LLM:
    """A loaded engine that answers prompts, many at a time.

    One thread of its own runs the engine; every method may be called from any thread. An `LLM` stays
    alive while a request of it runs; it is shut down by `shutdown`, by leaving a ``with`` block, when it is
    collected, or at the interpreter's end.

    Args:
        engine_dir: a directory written by `adaptive-k build`.
        max_batch_size: most sequences in a step; None is the engine's own.
        max_num_tokens: most tokens in a step; None is the engine's own.
        kv_cache_config: the KV cache's size and dtype.
        num_threads: CPU threads of the model; None lets the session choose.
        device: "cpu" or "cuda", of an engine of the target "torch"; None is a GPU where torch finds one.
        tokenizer: instead of the engine's own: a directory with a tokenizer.json, or an object.
        skip_tokenizer_init: use no tokenizer; prompts are token ids and answers have no text.

    Raises:
        EngineError: the engine or its tokenizer cannot be loaded, or a size is beyond what it was built for.
    """

    def __init__(
        self,
        engine_dir: str | Path,
        *,
        max_batch_size: int | None = None,
        max_num_tokens: int | None = None,
        kv_cache_config: KvCacheConfig | None = None,
        num_threads: int | None = None,
        device: Device | None = None,
        tokenizer: TokenizerLike | str | Path | None = None,
        skip_tokenizer_init: bool = False,
    ) -> None:
        from adaptive_k_moe.engine_config import read_engine_config, read_policy_tables
        from adaptive_k_moe.runtime.session import create_session

        check_arguments(EngineError, str | PathLike, engine_dir=engine_dir)
        check_arguments(EngineError, int | None, num_threads=num_threads)
        check_arguments(EngineError, Device | None, device=device)
        check_arguments(EngineError, KvCacheConfig | None, kv_cache_config=kv_cache_config)
        check_arguments(EngineError, TokenizerLike | str | PathLike | None, tokenizer=tokenizer)
        check_arguments(EngineError, bool, skip_tokenizer_init=skip_tokenizer_init)
        config = read_engine_config(engine_dir)
        limits = _limits(config, max_batch_size, max_num_tokens)
        loaded: TokenizerLike | None = None
        if isinstance(tokenizer, str | PathLike):
            loaded = Tokenizer.from_dir(tokenizer)
        elif tokenizer is not None:
            loaded = tokenizer
        elif not skip_tokenizer_init:
            loaded = Tokenizer.from_dir(engine_dir)
        kv_cache = kv_cache_config or KvCacheConfig()
        session = create_session(
            engine_dir,
            config,
            num_threads=num_threads,
            kv_cache_max_tokens=kv_cache.max_tokens,
            kv_cache_dtype=kv_cache.dtype,
            device=device,
        )
        self._open(session, config, limits, loaded, config.policy_tables(), lambda: read_policy_tables(engine_dir))

    @classmethod
    def from_session(
        cls,
        session: Session,
        config: EngineConfig,
        policies: PolicyTables,
        *,
        max_batch_size: int | None = None,
        max_num_tokens: int | None = None,
        tokenizer: TokenizerLike | None = None,
        read_policies: Callable[[], PolicyTables] | None = None,
    ) -> LLM:
        """An `LLM` over a session that is open already; the session is closed with it.

        Args:
            session: the loaded model.
            config: what it was built with.
            policies: its policy tables.
            max_batch_size: as for `LLM`.
            max_num_tokens: as for `LLM`.
            tokenizer: None takes token ids alone and gives no text.
            read_policies: what `reload_policies` reads; None keeps `policies`.
        """
        self = cls.__new__(cls)
        limits = _limits(config, max_batch_size, max_num_tokens)
        self._open(session, config, limits, tokenizer, policies, read_policies or (lambda: policies))
        return self

    def _open(
        self,
        session: Session,
        config: EngineConfig,
        limits: EngineLimits,
        tokenizer: TokenizerLike | None,
        policies: PolicyTables,
        read_policies: Callable[[], PolicyTables],
    ) -> None:
        model = config.pretrained_config
        eos_token_ids = set(model.eos_token_ids)
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            eos_token_ids.add(tokenizer.eos_token_id)
        self._config = config
        self._read_policies = read_policies
        try:
            self._engine = Engine(
                session,
                policies,
                limits,
                tokenizer=tokenizer,
                eos_token_ids=sorted(eos_token_ids),
                full_k=model.num_experts_per_tok,
            )
        except BaseException:
            session.close()
            raise
        self._worker = EngineThread(self._engine)
        self._finalizer = weakref.finalize(self, self._worker.stop)
        with _watch_lock:
            _llms.add(self)
            watchers = list(_watchers)
        for watcher in watchers:
            _show(self, watcher)

    @property
    def config(self) -> EngineConfig:
        """The engine directory's configuration."""
        return self._config

    @property
    def tokenizer(self) -> TokenizerLike | None:
        """The tokenizer; None without one."""
        return self._engine.tokenizer

    @property
    def policies(self) -> PolicyTables:
        """The policies that requests may name."""
        return self._engine.policies

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence of str, too
        self, inputs: Prompt, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        inputs: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        inputs: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Answer one prompt or many, and wait for all.

        Args:
            inputs: a text, a list of token ids, a conversation as for `chat`, or a list of such.
            sampling_params: for all prompts, or one for each; None is the defaults.

        Returns:
            The output of a single prompt, or a list in the order of the prompts.

        Raises:
            RequestError, PolicyError: a prompt or its parameters are unusable; none is run.
        """
        with self._telling_of_a_refusal(RunOptions(_new_id())):
            single, prompts = _prompts_in(inputs)
            params = _params_for(len(prompts), sampling_params)
        outputs = self._generate(prompts, params)
        return outputs[0] if single else outputs

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> RequestOutput: ...

    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]: ...

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Answer one conversation or many by the model's chat template, and wait for all.

        Args:
            messages: a conversation, ``[{"role": "user", "content": "…"}, …]``, or a list of them.
            sampling_params: as for `generate`; special tokens are the template's to add.
            add_generation_prompt: let the template end with what begins an answer of the assistant.
            chat_template_kwargs: what else the model's template knows, such as `tools` or `enable_thinking`.

        Returns:
            The output of a single conversation, or a list in their order.

        Raises:
            RequestError, PolicyError: a conversation or its parameters are unusable; none is run.
        """
        # What is no list at all is refused as a conversation.
        single = not isinstance(messages, Sequence) or (len(messages) > 0 and isinstance(messages[0], Mapping))
        conversations: list[Any] = [messages] if single else list(messages)
        with self._telling_of_a_refusal(RunOptions(_new_id())):
            params = _params_for(len(conversations), sampling_params)
            variables = {"add_generation_prompt": add_generation_prompt, **_template_variables(chat_template_kwargs)}
        outputs = self._generate(conversations, params, variables)
        return outputs[0] if single else outputs

    def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text that `chat` lets the model go on from; it has its special tokens.

        Args, and what is raised, are those of `chat`.
        """
        return self._engine.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, **variables)

    def generate_async(
        self,
        inputs: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        streaming: bool = False,
        request_id: str | None = None,
        on_output: OnOutput | None = None,
        enrollment: Enrollment | None = None,
        context: RequestContext = NO_CONTEXT,
        background: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> GenerationHandle:
        """Start to answer a prompt.

        Args:
            inputs: a text, a list of token ids, or a conversation as for `chat`.
            sampling_params: None is the defaults.
            streaming: give an output after each new token, not only at the end.
            request_id: unique among the running; None makes one.
            on_output: called with each output on the engine's own thread, so it must be quick and must
                not wait for another request; if it raises, that is logged and the request is aborted.
            enrollment: the request's place in an A/B test; its outputs carry it.
            context: what the request's records shall say of it.
            background: compute it in steps in which no other request is there, or in one of 200 where there
                always is one; a small part in each, and no other request waits for more than one such step.
                No total counts it and no observer is called.
            chat_template_kwargs: as for `chat`, if the prompt is a conversation.

        Returns:
            A handle to iterate over, await, or abort.

        Raises:
            RequestError, PolicyError: the prompt or its parameters are unusable.
        """
        # These are what observers learn of a refusal.
        check_arguments(RequestError, str | None, request_id=request_id)
        check_arguments(RequestError, Enrollment | None, enrollment=enrollment)
        check_arguments(RequestError, RequestContext, context=context)
        options = RunOptions(request_id or _new_id(), streaming, enrollment, context, background)
        with self._telling_of_a_refusal(options):
            check_arguments(RequestError, bool, streaming=streaming, background=background)
            check_arguments(RequestError, Callable | None, on_output=on_output)
            params = _params_for(1, sampling_params)[0]
        with self._telling_of_a_refusal(options, params):
            options = replace(options, chat_template_kwargs=_template_variables(chat_template_kwargs))
            return self._worker.submit(self._engine.prepare(inputs, params, options), on_output, self)

    def stats(self) -> EngineStats:
        """Counts and totals at this moment."""
        return self._engine.stats()

    def expert_load(self) -> Int64Array | None:
        """Tokens that each expert has run for since the engine was opened, if the target counts them.

        Every pass of a token through a layer counts, those of background requests, too. The target
        "openvino" counts.

        Returns:
            [MoE layers, experts], or None.
        """
        return self._engine.expert_load()

    def add_observer(self, observer: Observer) -> None:
        """Tell an observer about steps and ended requests, on the engine's own thread."""
        self._engine.observers.add(observer)

    def remove_observer(self, observer: Observer) -> None:
        """Stop calling an observer; a call that is under way goes on."""
        self._engine.observers.remove(observer)

    @contextlib.contextmanager
    def _telling_of_a_refusal(self, options: RunOptions, params: SamplingParams | None = None) -> Iterator[None]:
        try:
            yield
        except AdaptiveKError as error:
            if not options.background:
                policy = None if params is None else params.adaptive_k_policy
                told = options.request_id, policy, str(error), error_kind_of(error), options.enrollment, options.context
                self._engine.observers.request_refused(Refusal(*told))
            raise

    def _generate(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], variables: Mapping[str, Any] | None = None
    ) -> list[RequestOutput]:
        """Answer prompts, each with its parameters; with variables of the chat template they are conversations."""
        requests = []
        for prompt, param in zip(prompts, params, strict=True):
            options = RunOptions(_new_id(), chat_template_kwargs=variables or {})
            with self._telling_of_a_refusal(options, param):
                requests.append(self._engine.prepare(prompt, param, options))
        handles: list[GenerationHandle] = []
        try:
            for request in requests:
                with self._telling_of_a_refusal(request.options, request.params):
                    handles.append(self._worker.submit(request, None, self))
            return [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.abort()
            raise

    def reload_policies(self) -> None:
        """Read the engine directory's policies again; running requests keep following theirs by name.

        Raises:
            PolicyError: they are unusable, or lack a policy that a running request follows; the present
                ones stay.
        """
        tables = self._read_policies()
        self._worker.call(lambda: self._engine.set_policies(tables))

    def shutdown(self) -> None:
        """End running requests as cancelled, free the engine and its thread; calling it twice is harmless."""
        self._finalizer.detach()
        self._worker.stop()
        with _watch_lock:
            _llms.discard(self)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()


def watch_llms(watcher: Callable[[LLM], None]) -> None:
    """Call `watcher` with each `LLM` of this process: with those that are open, and with each to come.

    It is called on the thread that opens the `LLM`, perhaps twice for one that is opened in this moment. What it
    raises is logged: whoever opens an `LLM` has nothing to do with it.
    """
    with _watch_lock:
        _watchers.append(watcher)
        llms = list(_llms)
    for llm in llms:
        _show(llm, watcher)


def _show(llm: LLM, watcher: Callable[[LLM], None]) -> None:
    try:
        watcher(llm)
    except Exception:
        logger.exception("an LLM watcher raised")


def error_kind_of(error: AdaptiveKError) -> ErrorKind:
    """What a refused request was refused for."""
    if isinstance(error, PolicyError):
        return "policy"
    return "request" if isinstance(error, RequestError) else "engine"


def _limits(config: EngineConfig, max_batch_size: int | None, max_num_tokens: int | None) -> EngineLimits:
    build = config.build_config
    for name, value, built in (
        ("max_batch_size", max_batch_size, build.max_batch_size),
        ("max_num_tokens", max_num_tokens, build.max_num_tokens),
    ):
        check_arguments(EngineError, int | None, **{name: value})
        if value is not None and not 1 <= value <= built:
            raise EngineError(f"{name} is {value}, but this engine was built for 1 to {built}.")
    return EngineLimits(
        max_batch_size=max_batch_size or build.max_batch_size,
        max_num_tokens=max_num_tokens or build.max_num_tokens,
        max_seq_len=build.max_seq_len,
        max_input_len=build.max_input_len,
    )


def _prompts_in(inputs: Any) -> tuple[bool, list[Any]]:
    """Whether what `generate` was given is a single prompt, and the prompts."""
    if isinstance(inputs, bytes | Mapping) or not isinstance(inputs, Iterable):
        raise RequestError("a prompt is a text or a list of token ids.")
    prompts = [inputs] if isinstance(inputs, str) else list(inputs)
    single = isinstance(inputs, str) or (len(prompts) > 0 and isinstance(prompts[0], Integral | Mapping))
    return single, [inputs] if single else prompts


def _template_variables(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a chat template is given besides the conversation."""
    check_arguments(RequestError, Mapping[str, Any] | None, chat_template_kwargs=given)
    variables = dict(given or {})
    for name in ("messages", "self"):  # "self" is Jinja's own
        if name in variables:
            raise RequestError(f"chat_template_kwargs cannot hold {name!r}: leave it out.")
    return variables


def _params_for(count: int, given: SamplingParams | Sequence[SamplingParams] | None) -> list[SamplingParams]:
    """The parameters of each of so many prompts."""
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * count
    if not isinstance(given, Sequence) or not all(isinstance(params, SamplingParams) for params in given):
        raise RequestError("sampling_params are a SamplingParams, or a list with one for each prompt.")
    if len(given) != count:
        raise RequestError(f"{count} prompts came with {len(given)} sampling_params: give as many.")
    return list(given)


def _new_id() -> str:
    return uuid.uuid4().hex
