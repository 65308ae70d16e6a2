# SPDX-License-Identifier: Apache-2.0
"""The engine: requests in, one step at a time, outputs out. It has no threads; `LLM` gives it one."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np

from adaptive_k_moe.errors import PolicyError, RequestError
from adaptive_k_moe.policy import PolicyTables
from adaptive_k_moe.runtime.block_manager import BlockManager
from adaptive_k_moe.runtime.chat_template import Message
from adaptive_k_moe.runtime.detokenizer import AnswerText
from adaptive_k_moe.runtime.expert_runs import ExpertReads
from adaptive_k_moe.runtime.load import Load, LoadFollower, TokenTimes
from adaptive_k_moe.runtime.outputs import ErrorKind, FinishReason, RequestMetrics, RequestOutput
from adaptive_k_moe.runtime.sampler import FloatArray, SamplingState, sample
from adaptive_k_moe.runtime.sampling_params import SamplingParams
from adaptive_k_moe.runtime.scheduler import ScheduledChunk, Scheduler
from adaptive_k_moe.runtime.sequence import Request, RunOptions, Sequence
from adaptive_k_moe.runtime.session.base import Int32Array, Int64Array, Session, StepInput, StepOutput
from adaptive_k_moe.runtime.session.expert_load import CountsExperts
from adaptive_k_moe.runtime.state_slots import StateSlots
from adaptive_k_moe.runtime.telemetry import Counters, EngineStats, Observers, StepRecord, logger
from adaptive_k_moe.runtime.tokenizer import Tokenizer, TokenizerLike

Prompt = str | SequenceOf[int] | SequenceOf[Message]
"""A text, token ids, or a conversation for the model's chat template."""


class _Wanted(NamedTuple):
    """Which rows of a step's logits are a chunk's."""

    context: slice
    last: int | None


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Sizes that an engine keeps to.

    Attributes:
        max_batch_size: most sequences in a step.
        max_num_tokens: most tokens in a step.
        max_seq_len: most tokens of a sequence, prompt and answer.
        max_input_len: most tokens of a prompt; None is as many as `max_seq_len` leaves room for.
    """

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    max_input_len: int | None = None


class Engine:
    """Runs requests over a session by in-flight batching.

    `prepare` may be called from any thread; everything else belongs to one thread.

    Args:
        session: the loaded model.
        policies: its policy tables; the session gets them.
        limits: sizes to keep to.
        tokenizer: None takes token ids alone and gives no text.
        eos_token_ids: tokens that end an answer unless a request says otherwise.
        full_k: the trained top-k.
    """

    def __init__(
        self,
        session: Session,
        policies: PolicyTables,
        limits: EngineLimits,
        *,
        tokenizer: TokenizerLike | None,
        eos_token_ids: SequenceOf[int],
        full_k: int,
    ) -> None:
        self.policies = policies
        self.limits = limits
        self.tokenizer = tokenizer
        self.observers = Observers()
        self._session = session
        self._eos_token_ids = frozenset(i for i in eos_token_ids if 0 <= i < session.vocab_size)
        self._full_k = full_k
        self._blocks = BlockManager(session.num_blocks, session.block_size)
        self._scheduler = Scheduler(
            self._blocks,
            StateSlots(session.num_state_slots),
            max_batch_size=limits.max_batch_size,
            max_num_tokens=limits.max_num_tokens,
        )
        self._requests: dict[str, Request] = {}
        self._ended: list[RequestOutput] = []  # between steps, for the next one to tell
        self._counters = Counters()
        self._token_times = TokenTimes()
        self._followers = {name: LoadFollower(policy) for name, policy in policies.by_load.items()}
        session.set_policies(policies)

    # Requests come

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        options: RunOptions,
    ) -> Request:
        """Check a request and make it ready for `add`; changes nothing.

        Raises:
            RequestError: the prompt or a parameter asks for something impossible here.
            PolicyError: there is no policy of that name.
        """
        text, token_ids = self._encode(prompt, params, options.chat_template_kwargs)
        session, max_seq_len = self._session, self.limits.max_seq_len
        if not token_ids:
            raise RequestError("the prompt is empty: give at least one token.")
        if len(token_ids) >= max_seq_len:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens, but max_seq_len is {max_seq_len} here, "
                "answer included: shorten the prompt or build the engine with a larger --max_seq_len."
            )
        # What the server scores in idle time is a prompt with its answer, which max_input_len is not about.
        max_input_len = self.limits.max_input_len
        if max_input_len is not None and len(token_ids) > max_input_len and not options.background:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens, but max_input_len is {max_input_len} here: shorten the "
                "prompt or build the engine with a larger --max_input_len."
            )
        self._check_token_ids("the prompt", (min(token_ids), max(token_ids)))
        # The last token is never computed: nothing follows it.
        longest = min(len(token_ids) + params.max_tokens, max_seq_len) - 1
        if self._blocks.blocks_for(longest) > self._blocks.num_blocks:
            raise RequestError(
                f"prompt and answer may take {longest} tokens in the KV cache, which holds "
                f"{self._blocks.num_blocks * self._blocks.block_size}: ask for fewer max_tokens or open the "
                "engine with a larger KV cache."
            )
        for name, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
            if count is not None and count > session.vocab_size:
                raise RequestError(f"{name} is {count}, but the vocabulary has {session.vocab_size} tokens.")
        if params.stop_strings and self.tokenizer is None:
            raise RequestError("stop strings need the tokenizer, and this engine was opened without one.")
        end_ids = self._end_ids(params)
        bad_words = self._bad_words(params)
        for word in params.stop_words:
            self._check_token_ids("stop", word)
        logit_bias = self._logit_bias(params)
        policy_index = self.policies.index(params.adaptive_k_policy)
        request = Request(
            options=options,
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            policy=self.policies.names[policy_index],
            policy_index=policy_index,
            end_ids=end_ids,
            metrics=RequestMetrics(arrival_time=time.monotonic()),
            full_k=self._full_k,
        )
        if not params.exclude_input_from_output:
            request.prompt_text = text if text is not None else self._decode(token_ids, params)
        for index in range(params.n):
            sampling = SamplingState(
                params,
                session.vocab_size,
                list(token_ids),
                index=index,
                end_ids=end_ids,
                bad_words=bad_words,
                stop_words=params.stop_words,
                logit_bias=logit_bias,
            )
            answer = AnswerText(
                self.tokenizer,
                token_ids,
                stops=params.stop_strings,
                include_stop=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
                skip_special_tokens=params.skip_special_tokens,
            )
            request.sequences.append(
                Sequence(
                    request,
                    index,
                    sampling,
                    answer,
                    num_layers=session.num_moe_layers,
                    vocab_size=session.vocab_size,
                )
            )
        return request

    def add(self, request: Request) -> None:
        """Queue a prepared request.

        Raises:
            RequestError: one of this id is running.
            PolicyError: its policy vanished since it was prepared.
        """
        if request.request_id in self._requests:
            raise RequestError(f"a request with the id {request.request_id!r} is still running: give another id.")
        request.policy_index = self.policies.index(request.policy)
        self._requests[request.request_id] = request
        if not request.background:
            self._counters.requests_total += 1
            self._counters.prompt_tokens_total += len(request.prompt_token_ids)
        for sequence in request.sequences:
            self._scheduler.add(sequence)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now and free what it holds; its last output, or None if it is not running."""
        request = self._requests.get(request_id)
        return None if request is None else self._end(request, "cancelled")

    def fail(self, request_id: str, error: str) -> RequestOutput | None:
        """End a request now with finish reason "error"; its last output, or None if it is not running."""
        request = self._requests.get(request_id)
        return None if request is None else self._end(request, "error", error, "engine")

    def refuse(self, request: Request, error: str) -> RequestOutput:
        """The last output of a prepared request that `add` did not take."""
        request.error, request.error_kind = error, "policy"
        for sequence in request.sequences:
            sequence.finish("error")
        return self._last_output(request)

    @property
    def request_ids(self) -> list[str]:
        """Ids of the requests that have not ended."""
        return list(self._requests)

    # Steps

    def step(self) -> list[RequestOutput]:
        """Run one step; what it brought: streaming requests' progress, and the ends of all kinds."""
        outputs = self._step()
        ended, self._ended = self._ended, []
        return ended + outputs

    def _step(self) -> list[RequestOutput]:
        started = time.monotonic()
        preemptions = self._scheduler.preemptions_total
        chunks = self._scheduler.schedule()
        if not chunks:
            return []
        if self._followers:
            self._take_load(Load(len(self._scheduler.waiting), self._token_times.mean(started)), started)
        step, wanted = self._step_input(chunks)
        for sequence, _ in chunks:
            if sequence.request.metrics.first_scheduled_time is None:
                sequence.request.metrics.first_scheduled_time = started
        session_started = time.monotonic()
        try:
            result = self._session.step(step)
        except Exception as error:
            logger.exception("the session failed on a step of %d sequences", len(chunks))
            requests = {chunk.sequence.request.request_id: chunk.sequence.request for chunk in chunks}
            sentence = f"the engine failed: {error}"
            return [self._end(request, "error", sentence, "engine") for request in requests.values()]
        session_seconds = time.monotonic() - session_started

        num_decode = sum(1 for sequence, n in chunks if n == 1 and sequence.num_computed >= sequence.num_prompt_tokens)
        ready, rows = self._record(chunks, step, wanted, result)
        outputs, token_intervals = self._choose(ready, rows)
        if chunks[0].sequence.request.background:
            return outputs
        self._token_times.add(time.monotonic(), token_intervals)

        num_tokens = len(step.input_ids)
        counters = self._counters
        counters.steps_total += 1
        counters.last_batch_size, counters.last_num_tokens = len(chunks), num_tokens
        if self.observers:
            self.observers.step(
                StepRecord(
                    num_sequences=len(chunks),
                    num_prefill_tokens=num_tokens - num_decode,
                    num_decode_tokens=num_decode,
                    num_generated_tokens=len(ready),
                    num_preempted=self._scheduler.preemptions_total - preemptions,
                    session_seconds=session_seconds,
                    total_seconds=time.monotonic() - started,
                    token_intervals=token_intervals,
                    k=result.k,
                    entropy=result.entropy,
                    policy_index=self.policies.policy_of_row[step.policy_index],
                    policies=self.policies.names,
                    reads=result.reads,
                )
            )
        return outputs

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._requests or self._ended)

    def set_policies(self, tables: PolicyTables) -> None:
        """Follow these policies from the next step on; running requests keep theirs by name.

        A background request whose policy is gone ends with an error.

        Raises:
            PolicyError: a running request follows a policy that is not among them; nothing is changed.
        """
        requests = list(self._requests.values())
        in_use = {request.policy for request in requests if not request.background}
        if missing := sorted(in_use - set(tables.names)):
            raise PolicyError(
                f"the policy {missing[0]!r} cannot be removed while a running request follows it: "
                "wait for the request, or keep the policy."
            )
        self._session.set_policies(tables)
        self.policies = tables
        present = self._followers
        self._followers = {
            name: present[name] if name in present and present[name].policy == policy else LoadFollower(policy)
            for name, policy in tables.by_load.items()
        }
        for request in requests:
            if request.policy in tables.names:
                request.policy_index = tables.index(request.policy)
            else:
                error = f"the policy {request.policy!r} was removed."
                self._ended.append(self._end(request, "error", error, "policy"))

    def stats(self) -> EngineStats:
        """Counts and totals; safe from any thread, if a step old in parts."""
        counters = self._counters
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            max_batch_size=self.limits.max_batch_size,
            kv_block_size=self._blocks.block_size,
            kv_blocks_total=self._blocks.num_blocks,
            kv_blocks_used=self._blocks.num_used,
            requests_total=counters.requests_total,
            finished_total=counters.finished_total,
            cancellations_total=counters.cancellations_total,
            errors_total=counters.errors_total,
            preemptions_total=self._scheduler.preemptions_total,
            prompt_tokens_total=counters.prompt_tokens_total,
            generation_tokens_total=counters.generation_tokens_total,
            steps_total=counters.steps_total,
            last_batch_size=counters.last_batch_size,
            last_num_tokens=counters.last_num_tokens,
            load_steps={name: follower.step(time.monotonic()) for name, follower in self._followers.items()},
        )

    def expert_load(self) -> Int64Array | None:
        """[L, E] tokens that each expert has run for; None where the session does not count them."""
        return self._session.expert_load() if isinstance(self._session, CountsExperts) else None

    def close(self) -> None:
        """Close the session."""
        self._session.close()

    # How a step is made and read

    def _step_input(self, chunks: list[ScheduledChunk]) -> tuple[StepInput, list[_Wanted]]:
        """Pack the chunks' tokens, sequence after sequence, and say which logits are wanted."""
        input_ids: list[int] = []
        position_ids: list[int] = []
        policy_index: list[int] = []
        past_lens: list[int] = []
        begins = [0]
        block_tables: list[list[int]] = []
        logits_indices: list[int] = []
        wanted: list[_Wanted] = []
        by_load = self._policies_by_load()
        for sequence, num_tokens in chunks:
            start, begin = sequence.num_computed, begins[-1]
            end = start + num_tokens
            input_ids += sequence.token_ids[start:end]
            position_ids += range(start, end)
            in_prompt = min(max(sequence.num_prompt_tokens - start, 0), num_tokens)
            policy = sequence.request.policy_index
            if not sequence.request.background:
                policy = by_load.get(policy, policy)
            policy_index += [policy] * in_prompt + [self.policies.decode_row[policy]] * (num_tokens - in_prompt)
            past_lens.append(start)
            begins.append(begin + num_tokens)
            block_tables.append(sequence.block_table[: self._blocks.blocks_for(end)])
            first_row = len(logits_indices)
            logits_indices += [begin + position - start for position in sequence.prompt_rows(start, end)]
            context = slice(first_row, len(logits_indices))
            last_row = None
            if end == len(sequence.token_ids):
                last = begin + num_tokens - 1
                if not logits_indices or logits_indices[-1] != last:
                    logits_indices.append(last)
                last_row = len(logits_indices) - 1
            wanted.append(_Wanted(context, last_row))
        step = StepInput(
            input_ids=np.array(input_ids, np.int64),
            position_ids=np.array(position_ids, np.int64),
            policy_index=np.array(policy_index, np.int32),
            past_lens=np.array(past_lens, np.int32),
            subsequence_begins=np.array(begins, np.int32),
            block_tables=block_tables,
            state_slots=self._state_slots(chunks),
            logits_indices=np.array(logits_indices, np.int64),
        )
        return step, wanted

    def _take_load(self, load: Load, now: float) -> None:
        for follower in self._followers.values():
            follower.update(load, now)

    def _policies_by_load(self) -> dict[int, int]:
        """The policy that requests of each policy of the kind `by_load` follow now, by index.

        The background is not asked for a load, and runs such a policy's own rows.
        """
        index, now = self.policies.index, time.monotonic()
        return {index(name): index(follower.policy_at(now)) for name, follower in self._followers.items()}

    def _state_slots(self, chunks: list[ScheduledChunk]) -> Int32Array | None:
        if not self._session.num_state_slots:
            return None
        return np.array([chunk.sequence.state_slot for chunk in chunks], np.int32)

    def _record(
        self, chunks: list[ScheduledChunk], step: StepInput, wanted: list[_Wanted], result: StepOutput
    ) -> tuple[list[Sequence], FloatArray]:
        """Note what was computed; the sequences that are due a token, and the logits [N, V] for it."""
        ready: list[Sequence] = []
        rows: list[int] = []
        begins = step.subsequence_begins.tolist()
        followed = self.policies.policy_of_row[step.policy_index[begins[:-1]]].tolist()
        tokens: dict[Request, int] = {}
        for (sequence, num_tokens), policy in zip(chunks, followed, strict=True):
            request, name = sequence.request, self.policies.names[policy]
            request.followed[name] = request.followed.get(name, 0) + num_tokens
            tokens[request] = tokens.get(request, 0) + num_tokens
        if result.reads is not None:
            experts = sum(result.reads.tolist()) / len(result.reads)
            for request, num_tokens in tokens.items():
                request.expert_reads = request.expert_reads or ExpertReads()
                request.expert_reads.add(experts, num_tokens, len(step.input_ids))
        for (sequence, num_tokens), begin, (context, last) in zip(chunks, begins, wanted, strict=False):
            sequence.record(result.k[begin : begin + num_tokens], result.entropy[begin : begin + num_tokens])
            if context.stop > context.start:
                sequence.record_prompt_rows(result.logits[context])
            if last is not None:
                ready.append(sequence)
                rows.append(last)
        # In most steps all rows are of this kind, and none needs to be copied.
        return ready, result.logits if len(rows) == len(result.logits) else result.logits[rows]

    def _choose(self, ready: list[Sequence], logits: FloatArray) -> tuple[list[RequestOutput], list[float]]:
        """Give each sequence its next token and end those that are done.

        Returns:
            The outputs that follow from it, and the seconds since the token before, of each sequence that had one.
        """
        choices = sample(logits, [sequence.sampling for sequence in ready]) if ready else []
        now = time.monotonic()
        outputs: list[RequestOutput] = []
        token_intervals: list[float] = []
        changed: dict[str, Request] = {}
        for sequence, choice, row in zip(ready, choices, logits, strict=True):
            request = sequence.request
            if request.request_id not in self._requests:
                continue  # a sibling's error ended it in this very step
            if choice.error is not None:
                outputs.append(self._end(request, "error", choice.error, "sampling"))
                continue
            self._counters.generation_tokens_total += not request.background
            if sequence.last_token_time is not None:
                token_intervals.append(now - sequence.last_token_time)
            sequence.last_token_time = request.metrics.last_token_time = now
            if request.metrics.first_token_time is None:
                request.metrics.first_token_time = now
            if sequence.generation_logits is not None:
                sequence.generation_logits.append(row[None])
            if choice.logprob is not None and choice.logprobs is not None:
                sequence.cumulative_logprob += choice.logprob
                sequence.logprobs.append(choice.logprobs)
            try:
                self._end_if_done(sequence, choice.token_id)
            except Exception as error:
                logger.exception("the text of request %s failed", request.request_id)
                outputs.append(self._end(request, "error", f"the answer's text failed: {error}", "text"))
                continue
            changed[request.request_id] = request
        for request_id, request in changed.items():
            if request_id not in self._requests:
                continue
            if request.finished:
                outputs.append(self._finished(request))
            elif request.options.streaming:
                outputs.append(request.output())
        return outputs, token_intervals

    def _end_if_done(self, sequence: Sequence, token_id: int) -> None:
        """Add the token's text, and end the sequence at an end token, a stop string or its length."""
        params = sequence.request.params
        if token_id in sequence.request.end_ids:
            named = params.stop_token_ids is not None and token_id in params.stop_token_ids
            sequence.finish("stop", token_id if named else None)
        elif (stop := sequence.text.append(token_id, sequence.num_generated)) is not None:
            sequence.finish("stop", stop)
        elif (word := sequence.sampling.stop_word) is not None:
            sequence.finish("stop", word)
        elif sequence.num_generated >= params.max_tokens or len(sequence.token_ids) >= self.limits.max_seq_len:
            sequence.finish("length")
        if sequence.finish_reason is not None:
            self._scheduler.remove(sequence)

    def _end(
        self, request: Request, reason: FinishReason, error: str | None = None, kind: ErrorKind | None = None
    ) -> RequestOutput:
        """End what still runs of a request, for a reason other than its own tokens."""
        request.error, request.error_kind = error, kind
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                sequence.finish(reason)
                self._scheduler.remove(sequence)
        if not request.background:
            self._counters.cancellations_total += reason == "cancelled"
            self._counters.errors_total += reason == "error"
        return self._finished(request)

    def _finished(self, request: Request) -> RequestOutput:
        del self._requests[request.request_id]
        if not self._requests:  # no step will tell that there is no load
            self._take_load(Load(), time.monotonic())
        self._counters.finished_total += not request.background
        return self._last_output(request)

    def _last_output(self, request: Request) -> RequestOutput:
        request.metrics.finished_time = time.monotonic()
        output = request.output()
        if self.observers and not request.background:
            self.observers.request_finished(output)
        return output

    # How a request is read

    def apply_chat_template(self, messages: SequenceOf[Message], **variables: Any) -> str:
        """The text of a conversation; see `ChatTemplate.render`.

        Raises:
            RequestError: the conversation is unusable, or there is no chat template.
        """
        if not isinstance(self.tokenizer, Tokenizer):
            raise RequestError("a conversation needs the engine's own tokenizer, and this engine was opened without.")
        return self.tokenizer.apply_chat_template(messages, **variables)

    def _encode(
        self, prompt: Prompt, params: SamplingParams, template_variables: Mapping[str, Any]
    ) -> tuple[str | None, list[int]]:
        is_text = isinstance(prompt, str)
        is_chat = not is_text and isinstance(prompt, SequenceOf) and prompt and isinstance(prompt[0], Mapping)
        if is_chat or template_variables:
            text = self.apply_chat_template(cast("SequenceOf[Message]", prompt), **template_variables)
            assert self.tokenizer is not None  # or there would be no text
            return text, self.tokenizer.encode(text, add_special_tokens=False)  # it has them
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("a text prompt needs the tokenizer, and this engine was opened without one.")
            return prompt, self.tokenizer.encode(prompt, add_special_tokens=params.add_special_tokens)
        try:
            if isinstance(prompt, bytes):  # a text, and not the numbers of its bytes
                raise TypeError
            return None, [operator.index(token_id) for token_id in prompt]  # type: ignore[arg-type]
        except TypeError:
            raise RequestError("a prompt is a text or a list of token ids.") from None

    def _decode(self, token_ids: list[int], params: SamplingParams) -> str:
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(token_ids, skip_special_tokens=params.skip_special_tokens)

    def _end_ids(self, params: SamplingParams) -> frozenset[int]:
        """The tokens that end an answer."""
        asked = [*(params.stop_token_ids or ())]
        if params.end_id is not None and params.end_id != -1:
            asked.append(params.end_id)
        for token_id in asked:
            if not 0 <= token_id < self._session.vocab_size:
                raise RequestError(
                    f"end_id and stop_token_ids must be token ids from 0 to {self._session.vocab_size - 1}, "
                    f"and {token_id} is not (an end_id of -1 is no end token)."
                )
        return frozenset(asked) | (self._eos_token_ids if params.end_id is None else frozenset())

    def _bad_words(self, params: SamplingParams) -> list[SequenceOf[int]]:
        """The token sequences in `bad`; those of a string as a word's beginning and within a text."""
        if params.bad_strings and self.tokenizer is None:
            raise RequestError("bad words need the tokenizer, and this engine was opened without one.")
        words: list[SequenceOf[int]] = [*params.bad_words]
        for string in params.bad_strings:
            assert self.tokenizer is not None
            found = [
                token_ids
                for form in dict.fromkeys((string, " " + string.lstrip()))
                if (token_ids := self.tokenizer.encode(form, add_special_tokens=False))
                and self.tokenizer.unk_token_id not in token_ids
            ]
            if not found:
                raise RequestError(f"the bad word {string!r} has no tokens in this model's vocabulary: leave it out.")
            words += found
        for word in words:
            self._check_token_ids("bad", word)
        return words

    def _logit_bias(self, params: SamplingParams) -> dict[int, float]:
        """What is added to each token's logit; a text in `logit_bias` adds to each of its tokens."""
        bias: dict[int, float] = {}
        for key, value in (params.logit_bias or {}).items():
            token_ids = [int(key)] if not isinstance(key, str) else self._tokens_of_word(key)
            for token_id in token_ids:
                bias[token_id] = bias.get(token_id, 0.0) + value
        self._check_token_ids("logit_bias", bias)
        return bias

    def _tokens_of_word(self, word: str) -> list[int]:
        if self.tokenizer is None:
            raise RequestError("texts in logit_bias need the tokenizer, and this engine was opened without one.")
        token_ids = self.tokenizer.encode(word, add_special_tokens=False)
        if not token_ids or self.tokenizer.unk_token_id in token_ids:
            raise RequestError(f"{word!r} in logit_bias has no tokens in this model's vocabulary: leave it out.")
        return token_ids

    def _check_token_ids(self, name: str, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self._session.vocab_size:
                raise RequestError(
                    f"{name} has token id {token_id}, but the model's are 0 to {self._session.vocab_size - 1}."
                )
