# SPDX-License-Identifier: Apache-2.0
"""Text while it comes: whole characters, spaces, stop strings, whatever the tokens cut through."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from typing import Any

import pytest
import toy_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batching import run_all
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import models
from toy_session import ToySession, toy_policies

from adaptive_k_moe.errors import EngineError, RequestError
from adaptive_k_moe.runtime.detokenizer import AnswerText, Detokenizer, StopStrings
from adaptive_k_moe.runtime.engine import Engine, EngineLimits
from adaptive_k_moe.runtime.outputs import RequestOutput
from adaptive_k_moe.runtime.sampling_params import SamplingParams
from adaptive_k_moe.runtime.sequence import RunOptions
from adaptive_k_moe.runtime.tokenizer import Tokenizer

from checkpoints import MIXTRAL_SMALL

REPLACEMENT = "\ufffd"

texts = st.lists(
    st.sampled_from(
        [
            "the",
            " quick",
            " fox",
            " ",
            "  ",
            "\n",
            "é",
            "ü",
            "你好",
            "世",
            "😀",
            "👩‍👩‍👧",
            "x",
            "STOP",
            ".",
            " expert",
            "ß",
        ]
    ),
    min_size=1,
    max_size=12,
).map("".join)


def pieces(tokenizer: Tokenizer, context: list[int], token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, context)
    return [*(detokenizer.append(token_id) for token_id in token_ids), detokenizer.finish()]


@pytest.mark.parametrize("kind", toy_tokenizers.ALL)
@settings(max_examples=150, deadline=None)
@given(text=texts, data=st.data())
def test_pieces_are_the_text_decoded_in_context(kind: str, text: str, data: st.DataObject) -> None:
    tokenizer = toy_tokenizers.ALL[kind]()
    token_ids = tokenizer.encode(text)
    assert tokenizer.decode(token_ids) == text
    cut = data.draw(st.integers(0, len(token_ids)))
    prompt, answer = token_ids[:cut], token_ids[cut:]
    given_out = pieces(tokenizer, prompt, answer)
    assert not any(REPLACEMENT in piece for piece in given_out)
    before = tokenizer.decode(prompt)
    # A character cut by the end of the prompt is the answer's.
    assert "".join(given_out) == text[len(before.rstrip(REPLACEMENT)) :]


@settings(max_examples=150, deadline=None)
@given(token_ids=st.lists(st.integers(0, 299), max_size=30))
def test_any_tokens_at_all_give_what_decoding_them_at_once_gives(token_ids: list[int]) -> None:
    tokenizer = toy_tokenizers.byte_level()
    assert "".join(pieces(tokenizer, [], token_ids)) == tokenizer.decode(token_ids)


def test_an_unfinished_character_waits_and_comes_at_the_end_as_it_is() -> None:
    tokenizer = toy_tokenizers.byte_fallback()
    heart = tokenizer.encode("♥")[-3:]
    assert pieces(tokenizer, [], heart) == ["", "", "♥", ""]
    assert pieces(tokenizer, [], heart[:2]) == ["", "", REPLACEMENT * 2]


def stopped_at(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Character by character: the first stop string to be complete ends the text; the longest of several."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=400, deadline=None)
@given(
    text=st.text("abc", max_size=14),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.sets(st.integers(0, 14)),
    include=st.booleans(),
)
def test_a_stop_string_is_found_however_the_text_is_cut(
    text: str, stops: list[str], cuts: set[int], include: bool
) -> None:
    expected, expected_stop = stopped_at(text, stops, include)
    marks = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    matcher = StopStrings(stops, include=include)
    got, stop = "", None
    for start, end in pairwise(marks):
        certain, stop = matcher.append(text[start:end])
        got += certain
        assert expected.startswith(got)  # what was given out is never taken back
        if stop is not None:
            break
    else:
        got += matcher.finish()
    assert (got, stop) == (expected, expected_stop)


def test_no_more_text_is_held_back_than_may_become_a_stop_string() -> None:
    matcher = StopStrings(["STOP", "\n\n"])
    assert matcher.append("go ST") == ("go ", None)
    assert matcher.append("AR") == ("STAR", None)
    assert matcher.append("\n") == ("", None)
    assert matcher.append("x\nSTO") == ("\nx\n", None)
    assert matcher.append("P after") == ("", "STOP")


def test_a_stop_string_that_came_too_early_does_not_count_later() -> None:
    matcher = StopStrings(["b", "abc"])
    assert matcher.append("ab", armed=False) == ("", None)
    assert matcher.append("x") == ("abx", None)
    assert matcher.append("ab") == ("a", "b")


def test_a_stop_string_counts_only_from_min_tokens_on() -> None:
    tokenizer = toy_tokenizers.byte_level()
    token_ids = tokenizer.encode("STOP x STOP y")
    early = next(n for n in range(1, 20) if "STOP" in tokenizer.decode(token_ids[:n]))

    def run(min_tokens: int) -> tuple[str, str | None]:
        text = AnswerText(tokenizer, [], stops=["STOP"], min_tokens=min_tokens)
        for count, token_id in enumerate(token_ids, start=1):
            if (stop := text.append(token_id, count)) is not None:
                return text.text, stop
        text.finish(len(token_ids))
        return text.text, None

    assert run(0) == run(early) == ("", "STOP")
    assert run(early + 1) == ("STOP x ", "STOP")
    assert run(99) == ("STOP x STOP y", None)


class Scripted(ToySession):
    """A session that says a given text, whatever it is asked."""

    def __init__(self, token_ids: list[int], prompt_len: int, vocab_size: int) -> None:
        super().__init__(vocab_size=vocab_size)
        self._script, self._prompt_len = token_ids, prompt_len

    def step(self, step: Any) -> Any:
        output = super().step(step)
        for row, index in enumerate(step.logits_indices):
            output.logits[row, self._script[step.position_ids[index] - self._prompt_len + 1]] = 100
        return output


def say(kind: str, text: str, prompt: str = "the", **params: Any) -> list[RequestOutput]:
    """The outputs of a streaming request that is answered with `text` and an end token."""
    tokenizer = toy_tokenizers.ALL[kind]()
    assert tokenizer.eos_token_id is not None
    prompt_ids = tokenizer.encode(prompt)
    script = tokenizer.encode(prompt + text)[len(prompt_ids) :] + [tokenizer.eos_token_id] * 50
    session = Scripted(script, len(prompt_ids), 450)
    limits = EngineLimits(max_batch_size=4, max_num_tokens=32, max_seq_len=128)
    engine = Engine(
        session, toy_policies(), limits, tokenizer=tokenizer, eos_token_ids=[tokenizer.eos_token_id], full_k=2
    )
    engine.add(engine.prepare(prompt, SamplingParams(**{"max_tokens": 40, **params}), RunOptions("a", streaming=True)))
    outputs: list[RequestOutput] = []
    while engine.has_work:
        outputs += engine.step()
    for output in outputs:
        assert output.outputs[0].text == "".join(o.outputs[0].text_diff for o in outputs[: outputs.index(output) + 1])
    return outputs


@pytest.mark.parametrize("kind", toy_tokenizers.ALL)
def test_an_answer_ends_at_the_end_token_which_has_no_text(kind: str) -> None:
    outputs = say(kind, " quick 你好 fox")
    answer = outputs[-1].outputs[0]
    assert answer.text == " quick 你好 fox"
    assert answer.token_ids[-1] == toy_tokenizers.ALL[kind]().eos_token_id
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)
    assert outputs[0].outputs[0].text  # the first token's text came with the first output


@pytest.mark.parametrize("kind", toy_tokenizers.ALL)
@pytest.mark.parametrize("include", [False, True])
def test_an_answer_ends_at_a_stop_string_across_tokens(kind: str, include: bool) -> None:
    outputs = say(kind, " quick fox. END of", stop=["fox. E", "never"], include_stop_str_in_output=include)
    answer = outputs[-1].outputs[0]
    assert answer.text == (" quick fox. E" if include else " quick ")
    assert (answer.finish_reason, answer.stop_reason) == ("stop", "fox. E")
    assert not any("f" in output.outputs[0].text for output in outputs[:-1])


def test_text_held_back_comes_out_when_the_length_ends_the_answer() -> None:
    tokens = len(toy_tokenizers.byte_level().encode(" quick fox"))
    answer = say("byte_level", " quick fox", stop="fox!", max_tokens=tokens)[-1].outputs[0]
    assert (answer.text, answer.finish_reason) == (" quick fox", "length")


def test_stop_token_ids_name_themselves() -> None:
    (token_id,) = toy_tokenizers.byte_level().encode("!")
    answer = say("byte_level", " quick! fox", stop_token_ids=[token_id])[-1].outputs[0]
    assert (answer.text, answer.token_ids[-1], answer.stop_reason) == (" quick", token_id, token_id)


def test_end_id_minus_one_never_ends() -> None:
    answer = say("byte_level", " quick", end_id=-1, max_tokens=12)[-1].outputs[0]
    assert (len(answer.token_ids), answer.finish_reason, answer.text) == (12, "length", " quick")
    visible = say("byte_level", " quick", end_id=-1, max_tokens=12, skip_special_tokens=False)[-1].outputs[0]
    assert visible.text.startswith(" quick<eos><eos>")


def test_min_tokens_keeps_the_end_away() -> None:
    answer = say("byte_level", " x", min_tokens=10)[-1].outputs[0]
    eos = toy_tokenizers.byte_level().eos_token_id
    assert eos not in answer.token_ids[:9]
    assert len(answer.token_ids) >= 10


def test_the_prompt_may_be_part_of_the_answer() -> None:
    outputs = say("byte_fallback", " quick fox", exclude_input_from_output=False)
    answer = outputs[-1].outputs[0]
    assert answer.text == "the quick fox"
    assert outputs[0].outputs[0].text_diff.startswith("the")
    prompt_ids = outputs[-1].prompt_token_ids
    assert answer.token_ids[: len(prompt_ids)] == prompt_ids
    assert [t for o in outputs for t in o.outputs[0].token_ids_diff] == answer.token_ids


@pytest.mark.parametrize("kind", toy_tokenizers.ALL)
def test_bad_words_do_not_come(kind: str) -> None:
    assert "fox" not in say(kind, " quick fox", bad=["fox"])[-1].outputs[0].text
    assert " quick fox" in say(kind, " quick fox", bad=["dog"])[-1].outputs[0].text


def test_a_bad_word_without_tokens_is_refused() -> None:
    tokenizer = Tokenizer(HfTokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    limits = EngineLimits(max_batch_size=4, max_num_tokens=32, max_seq_len=128)
    engine = Engine(ToySession(), toy_policies(), limits, tokenizer=tokenizer, eos_token_ids=[], full_k=2)
    with pytest.raises(RequestError, match="bad word 'zebra' has no tokens"):
        engine.prepare([1], SamplingParams(bad="zebra"), RunOptions("a"))
    with pytest.raises(
        RequestError, match=r"cannot encode this text: .*'\\ud800' in position 0: surrogates not allowed"
    ):
        engine.prepare("\ud800", SamplingParams(), RunOptions("a"))
    assert not run_all(engine)


def test_other_threads_run_while_a_long_prompt_is_encoded() -> None:
    tokenizer, text = toy_tokenizers.byte_level(), "the quick brown fox " * 10_000
    counts, encoded = [0], threading.Event()

    def count() -> None:
        while not encoded.is_set():
            counts[0] += 1
            time.sleep(0)

    counter = threading.Thread(target=count)
    counter.start()
    before = counts[0]
    token_ids = tokenizer.encode(text)
    during = counts[0] - before
    encoded.set()
    counter.join()
    assert token_ids == tokenizer._tokenizer.encode(text).ids
    assert during > 10


BUNDLED = Tokenizer.from_dir(MIXTRAL_SMALL)  # adds a token in front


@given(st.text(st.characters(codec="utf-8")), st.booleans())
def test_tokens_are_those_of_the_packages_plain_encode(text: str, special: bool) -> None:
    for tokenizer in (toy_tokenizers.byte_level(), toy_tokenizers.byte_fallback(), BUNDLED):
        plain = tokenizer._tokenizer.encode(text, add_special_tokens=special).ids
        assert tokenizer.encode(text, add_special_tokens=special) == plain


def test_a_text_that_fails_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = toy_tokenizers.byte_level()
    limits = EngineLimits(max_batch_size=4, max_num_tokens=32, max_seq_len=64)
    engine = Engine(ToySession(vocab_size=400), toy_policies(), limits, tokenizer=tokenizer, eos_token_ids=[], full_k=2)
    for name in ("a", "b"):
        engine.add(engine.prepare([ord(name)], SamplingParams(max_tokens=4), RunOptions(name)))
    decode = tokenizer.decode

    def broken(token_ids: Any, **options: Any) -> str:
        if token_ids[0] == ord("a"):
            raise ValueError("broken tokenizer")
        return decode(token_ids, **options)

    monkeypatch.setattr(tokenizer, "decode", broken)
    ends = run_all(engine)
    assert ends["a"].outputs[0].finish_reason == "error"
    assert ends["a"].error == "the answer's text failed: broken tokenizer"
    assert ends["b"].outputs[0].finish_reason == "length"
    assert engine.stats().kv_blocks_used == 0


def test_a_tokenizer_is_read_from_a_directory(tmp_path: Any) -> None:
    with pytest.raises(EngineError, match="skip_tokenizer_init"):
        Tokenizer.from_dir(tmp_path)
    source = toy_tokenizers.byte_level()._tokenizer
    source.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_dir(tmp_path).eos_token_id is None
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<eos>"}, "unk_token": null}')
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.eos_token_id == 0
    assert tokenizer.decode(tokenizer.encode("grüße 你好")) == "grüße 你好"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(EngineError, match="not a tokenizer"):
        Tokenizer.from_dir(tmp_path)


def test_a_text_in_the_logit_bias_stands_for_each_of_its_tokens() -> None:
    tokenizer = toy_tokenizers.byte_level()
    token_ids = tokenizer.encode("ab", add_special_tokens=False)
    assert len(token_ids) == 2
    by_text = say("byte_level", " quick fox", logit_bias={"ab": 1000.0}, max_tokens=3, end_id=-1)[-1]
    by_id = say("byte_level", " quick fox", logit_bias=dict.fromkeys(token_ids, 1000.0), max_tokens=3, end_id=-1)[-1]
    assert by_text.outputs[0].token_ids == by_id.outputs[0].token_ids
    assert set(by_id.outputs[0].token_ids) <= set(token_ids)
    # What two keys say of one token adds up.
    both = say("byte_level", " quick fox", logit_bias={"a": 1000.0, token_ids[0]: -1000.0}, max_tokens=3)[-1]
    assert both.outputs[0].text == say("byte_level", " quick fox", max_tokens=3)[-1].outputs[0].text
