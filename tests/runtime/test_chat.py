# SPDX-License-Identifier: Apache-2.0
"""Conversations through a checkpoint's chat template: the text is `transformers`', and the tokens are, too."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_k_moe.cli import main
from adaptive_k_moe.engine_builder import build
from adaptive_k_moe.errors import AdaptiveKError, EngineError, RequestError
from adaptive_k_moe.runtime import LLM, SamplingParams
from adaptive_k_moe.runtime.tokenizer import Tokenizer

# In the manners of the families: instructions in brackets, marked turns, and what templates do besides.
BRACKETS = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Turns must alternate.') }}
{% endif %}
{% if message.role == 'user' %}
{{- ' [INST] ' + message.content + ' [/INST]' }}
{% else %}
{{- ' ' + message.content.strip() + eos_token }}
{%- endif %}
{% endfor %}"""
MARKED = """{%- set ns = namespace(system='Be brief.') %}
{%- for m in messages if m.role == 'system' %}{% set ns.system = m.content %}{% endfor %}
<|system|>{{ ns.system }}</s>
{% if tools is not none %}{{ tools | tojson(indent=2) }}
{% endif %}
{% for m in messages %}
    {% if m.role == 'system' %}{% continue %}{% endif %}
<|{{ m.role }}|>
    {% if m.role == 'assistant' %}
{% generation %}{{ m.content }}</s>{% endgeneration %}

    {% else %}
{{ m.content }}</s>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{% endif %}"""
JSON = """{{ messages | tojson }}{{ {'a<b': "c'd"} | tojson }}
{% for m in messages %}{{ m['content'] | trim | length }};{% endfor %}"""
TEMPLATES = {"brackets": BRACKETS, "marked": MARKED, "json": JSON}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "Who was Noah?"}],
    "three turns": [
        {"role": "user", "content": "  Grüße 你好 <b>&</b> "},
        {"role": "assistant", "content": " {{ not jinja }} \n"},
        {"role": "user", "content": ""},
    ],
}


def with_template(checkpoint: Path, directory: Path, template: str, *, apart: bool = True) -> Path:
    """The checkpoint with a template: in a file of its own, or in the tokenizer's configuration."""
    shutil.copytree(checkpoint, directory)
    if apart:
        (directory / "chat_template.jinja").write_text(template)
    else:
        path = directory / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return directory


@pytest.fixture(scope="module", params=TEMPLATES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, checkpoint_dir: Path) -> Path:
    return with_template(checkpoint_dir, tmp_path_factory.mktemp("chat") / "model", TEMPLATES[request.param])


def expected(checkpoint: Path, messages: list[dict[str, Any]], **options: Any) -> tuple[str, list[int]]:
    """The text and the tokens that `transformers` makes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return text, tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_text_and_tokens_are_those_of_transformers(
    checkpoint: Path, messages: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    tokenizer = Tokenizer.from_dir(checkpoint)
    text, token_ids = expected(checkpoint, messages, add_generation_prompt=add_generation_prompt)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt) == text
    assert tokenizer.encode(text, add_special_tokens=False) == token_ids


def test_what_a_template_knows_besides_may_be_given(tmp_path: Path, checkpoint_dir: Path) -> None:
    checkpoint = with_template(checkpoint_dir, tmp_path / "model", MARKED)
    messages = [{"role": "system", "content": "Sing."}, *CONVERSATIONS["one turn"]]
    tools = [{"type": "function", "function": {"name": "größe", "parameters": {}}}]
    options: dict[str, Any] = {"tools": tools, "enable_thinking": False}
    text, _ = expected(checkpoint, messages, add_generation_prompt=True, **options)
    assert "größe" in text
    assert "<think></think>" in text
    assert Tokenizer.from_dir(checkpoint).apply_chat_template(messages, **options) == text


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant"]), "content": st.text(st.characters(codec="utf-8"))},
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_conversation_gives_what_transformers_gives(messages: list[dict[str, Any]]) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    from adaptive_k_moe.runtime.chat_template import ChatTemplate

    for name in ("marked", "json"):
        rendered, _ = render_jinja_template([messages], chat_template=TEMPLATES[name], add_generation_prompt=True)
        assert ChatTemplate(TEMPLATES[name], {}, "here").render(messages) == rendered[0]


def test_the_places_of_a_template(tmp_path: Path, checkpoint_dir: Path) -> None:
    messages = CONVERSATIONS["one turn"]
    inside = with_template(checkpoint_dir, tmp_path / "inside", BRACKETS, apart=False)
    text, _ = expected(inside, messages)
    assert Tokenizer.from_dir(inside).apply_chat_template(messages) == text
    # A file of its own goes first.
    (inside / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    text, _ = expected(inside, messages)
    assert text == "Who was Noah?</s>"
    assert Tokenizer.from_dir(inside).apply_chat_template(messages) == text
    # Several by name, as some checkpoints have them.
    named = with_template(checkpoint_dir, tmp_path / "named", "", apart=False)
    config = json.loads((named / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "rag", "template": "no"}, {"name": "default", "template": BRACKETS}]
    config["bos_token"] = {"content": "<s>", "special": True}
    (named / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_dir(named).apply_chat_template(messages) == expected(named, messages)[0]


@pytest.mark.parametrize(
    ("template", "messages", "error", "names"),
    [
        (None, [{"role": "user", "content": "a"}], RequestError, "no chat template"),
        ("{% for %}", [{"role": "user", "content": "a"}], EngineError, "chat_template.jinja is not a template"),
        (BRACKETS, [{"role": "assistant", "content": "a"}], RequestError, "conversation: Turns must alternate.$"),
        (BRACKETS, [{"role": "user"}], RequestError, "refuses this conversation"),
        (BRACKETS, [{"role": "user", "content": object()}], RequestError, "plain data"),
        (BRACKETS, [], RequestError, "list of messages"),
        (BRACKETS, ["a"], RequestError, "list of messages"),
        (BRACKETS, "hello", RequestError, "list of messages"),
        (BRACKETS, [{"content": "a"}], RequestError, "list of messages"),
        ("{{ messages.append(1) }}", [{"role": "user", "content": "a"}], RequestError, "refuses"),
        ("{{ ''.__class__.__mro__ }}", [{"role": "user", "content": "a"}], RequestError, "refuses.*unsafe"),
        ("{{ 1 // 0 }}", [{"role": "user", "content": "a"}], RequestError, "refuses"),
    ],
)
def test_what_cannot_be_rendered_is_one_sentence(
    template: str | None,
    messages: Any,
    error: type[AdaptiveKError],
    names: str,
    tmp_path: Path,
    checkpoint_dir: Path,
) -> None:
    checkpoint = shutil.copytree(checkpoint_dir, tmp_path / "model")
    if template is not None:
        (checkpoint / "chat_template.jinja").write_text(template)
    with pytest.raises(error, match=names) as caught:
        Tokenizer.from_dir(checkpoint).apply_chat_template(messages)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def chat_engine(tmp_path_factory: pytest.TempPathFactory, checkpoint_dir: Path) -> Path:
    """An engine that got its template from the checkpoint."""
    directory = tmp_path_factory.mktemp("engine")
    checkpoint = with_template(checkpoint_dir, directory / "model", BRACKETS)
    build(checkpoint, directory / "engine", max_seq_len=256)
    return directory / "engine"


def test_chat_answers_what_generate_answers_to_the_templates_tokens(chat_engine: Path) -> None:
    params = SamplingParams(max_tokens=6)
    with LLM(chat_engine) as llm:
        one = llm.chat(CONVERSATIONS["one turn"], params)
        many = llm.chat(list(CONVERSATIONS.values()), [params, params])
        tokens = [expected(chat_engine.parent / "model", messages)[1] for messages in CONVERSATIONS.values()]
        plain = llm.generate(tokens, params)
        assert [output.prompt_token_ids for output in many] == tokens
        assert [output.outputs[0].token_ids for output in many] == [output.outputs[0].token_ids for output in plain]
        assert one.outputs[0].text == many[0].outputs[0].text
        streamed = list(llm.generate_async(CONVERSATIONS["one turn"], params, streaming=True))
        assert "".join(output.outputs[0].text_diff for output in streamed) == one.outputs[0].text
        assert [output.prompt for output in llm.generate(list(CONVERSATIONS.values()), params)] == [
            output.prompt for output in many
        ]
        assert llm.chat([], params) == []
        with pytest.raises(RequestError, match="2 prompts came with 1"):
            llm.chat(list(CONVERSATIONS.values()), [params])
        for wrong in ("hello", CONVERSATIONS["one turn"][0], None):
            with pytest.raises(RequestError, match="list of messages"):
                llm.chat(wrong, params)  # type: ignore[call-overload]
        with pytest.raises(RequestError, match="list of messages"):
            llm.generate([{"prompt": "hello"}], params)
    with LLM(chat_engine, skip_tokenizer_init=True) as llm, pytest.raises(RequestError, match="own tokenizer"):
        llm.chat(CONVERSATIONS["one turn"])


def test_the_generate_command_takes_a_users_message(
    chat_engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["generate", "--engine_dir", str(chat_engine), "--max_tokens", "6", "--apply_chat_template"]
    assert main([*arguments, "--prompt", "Who was Noah?"]) == 0
    said = capsys.readouterr()
    with LLM(chat_engine) as llm:
        assert said.out == llm.chat(CONVERSATIONS["one turn"], SamplingParams(max_tokens=6)).outputs[0].text + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("Who was Noah?"))
    assert main([*arguments, "--prompt", "-"]) == 0
    assert capsys.readouterr().out == said.out
    assert main([*arguments, "--prompt", "Who?", "--system_prompt", "Sing."]) == 1
    assert "Turns must alternate" in capsys.readouterr().err
    assert main([*arguments[:-1], "--prompt", "Who?", "--system_prompt", "Sing."]) == 1
    assert "--apply_chat_template" in capsys.readouterr().err


def test_what_else_the_template_knows_comes_by_every_way(
    tmp_path: Path, checkpoint_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(with_template(checkpoint_dir, tmp_path / "model", MARKED), tmp_path / "engine", max_seq_len=256)
    messages, params, variables = CONVERSATIONS["one turn"], SamplingParams(max_tokens=6), {"enable_thinking": False}
    text, token_ids = expected(tmp_path / "model", messages, add_generation_prompt=True, **variables)
    with LLM(tmp_path / "engine") as llm:
        outputs = [
            llm.chat(messages, params, chat_template_kwargs=variables),
            *llm.chat([messages], params, chat_template_kwargs=variables),
            llm.generate_async(messages, params, chat_template_kwargs=variables).result(),
        ]
        assert [(output.prompt, output.prompt_token_ids) for output in outputs] == [(text, token_ids)] * 3
        plain = llm.chat(messages, params, chat_template_kwargs={})
        assert plain.prompt != text
        for wrong, sentence in (
            ("tools", "must be a dictionary with names as keys"),
            ({1: 2}, "must be a dictionary with names as keys"),
            ({"messages": []}, "cannot hold 'messages'"),
            ({"self": 1}, "cannot hold 'self'"),
            ({"tools": object()}, "plain data"),
        ):
            for ask in (llm.chat, llm.generate_async):
                with pytest.raises(RequestError, match=sentence):
                    ask(messages, params, chat_template_kwargs=wrong)  # type: ignore[operator]
        with pytest.raises(RequestError, match="list of messages"):
            llm.generate_async("Who?", params, chat_template_kwargs=variables)
    arguments = ["generate", "--engine_dir", str(tmp_path / "engine"), "--max_tokens", "6", "--prompt", "Who was Noah?"]
    assert main([*arguments, "--apply_chat_template", "--chat_template_kwargs", json.dumps(variables)]) == 0
    assert capsys.readouterr().out == outputs[0].outputs[0].text + "\n"
    assert main([*arguments, "--chat_template_kwargs", "{}"]) == 1
    assert "give --apply_chat_template" in capsys.readouterr().err
    for wrong in ("{", "[1]"):
        with pytest.raises(SystemExit, match="2"):
            main([*arguments, "--apply_chat_template", "--chat_template_kwargs", wrong])
        assert "argument --chat_template_kwargs: it must be a JSON object" in capsys.readouterr().err
