# SPDX-License-Identifier: Apache-2.0
"""A model's chat template: a conversation becomes the text that the model was trained to go on from.

Templates are Jinja programs that come with a checkpoint, so they run in Jinja's sandbox. What they find there
is what `transformers` gives them.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_k_moe.errors import DependencyError, EngineError, RequestError

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]
"""One turn of a conversation: its `role` ("system", "user", "assistant", …) and its `content`."""

TEMPLATE_NAME = "chat_template.jinja"


class ChatTemplate:
    """A chat template, compiled when it is first used.

    Args:
        source: the Jinja program.
        special_tokens: what else it may print, by name: "bos_token", "eos_token", …
        origin: where it comes from, for errors.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._origin = origin
        self._compiled: jinja2.Template | None = None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of a conversation, special tokens included.

        Args:
            messages: its turns.
            add_generation_prompt: end with what begins an answer of the assistant.
            variables: what else the model's template knows, such as `tools` or `enable_thinking`; plain data.

        Raises:
            RequestError: the template refuses the conversation, or it is not plain data.
            EngineError: the template is no Jinja.
            DependencyError: Jinja is not installed.
        """
        given: dict[str, Any] = {"tools": None, "documents": None, **variables}
        given |= {"messages": check_messages(messages), "add_generation_prompt": add_generation_prompt}
        try:
            plain = json.loads(json.dumps(given))  # a template must not get hold of an object
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"a conversation is plain data, as JSON has it: {error}.") from None
        template = self._template()
        try:
            return template.render({**self._special_tokens, **plain})
        except Exception as error:  # a program of the checkpoint's: whatever it raises, others go on
            raise RequestError(f"the chat template refuses this conversation: {str(error).rstrip('.')}.") from None

    def _template(self) -> jinja2.Template:
        if self._compiled is None:
            try:
                import jinja2
            except ModuleNotFoundError:
                raise DependencyError(
                    "chat templates need the package 'jinja2': install it with pip install 'adaptive-k-moe[engine]'."
                ) from None
            try:
                self._compiled = _environment().from_string(self._source)
            except jinja2.TemplateError as error:
                raise EngineError(f"{self._origin} is not a template that Jinja can read: {error}.") from None
        return self._compiled


def read_chat_template(directory: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """The chat template of a directory with a tokenizer; None if it has none.

    Args:
        directory: where a file of its own may lie, which goes first.
        config: ``tokenizer_config.json``, which may hold it, too.

    Raises:
        EngineError: the file cannot be read.
    """
    special = {name: text for name in config if name.endswith("_token") and (text := token_text(config, name))}
    path = directory / TEMPLATE_NAME
    if path.is_file():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), special, str(path))
        except (OSError, ValueError) as error:
            raise EngineError(f"{path} cannot be read as text: {error}.") from None
    source = config.get("chat_template")
    if isinstance(source, list):  # several by name; "default" is for plain conversations
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        return None
    return ChatTemplate(source, special, f"the chat_template in {directory / 'tokenizer_config.json'}")


def token_text(config: Mapping[str, Any], name: str) -> str | None:
    """A special token's text; ``tokenizer_config.json`` gives it plainly or as an object with `content`."""
    token = config.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def check_messages(messages: Any) -> Sequence[Message]:
    """The messages, if they are some.

    Raises:
        RequestError: they are not a list of objects with a role.
    """
    if (
        isinstance(messages, str | bytes)
        or not isinstance(messages, Sequence)
        or not messages
        or not all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in messages)
    ):
        raise RequestError('a conversation is a list of messages, each with a role: [{"role": "user", "content": …}].')
    return list(messages)


def _environment() -> jinja2.Environment:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's words for training; here it is only read over."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})  # Jinja's own escapes HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
