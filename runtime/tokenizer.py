# SPDX-License-Identifier: Apache-2.0
"""The tokenizer that lies in an engine directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from adaptive_k_moe.errors import EngineError, RequestError
from adaptive_k_moe.runtime.chat_template import ChatTemplate, Message, read_chat_template, token_text

if TYPE_CHECKING:
    import tokenizers


@runtime_checkable
class TokenizerLike(Protocol):
    """What the runtime needs of a tokenizer."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends an answer, if the tokenizer knows one."""

    @property
    def unk_token_id(self) -> int | None:
        """The token that stands for what cannot be encoded, if there is one."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Text to token ids."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Token ids to text."""


class Tokenizer:
    """A `tokenizer.json`, with the special tokens that `tokenizer_config.json` names.

    Args:
        tokenizer: of the `tokenizers` package; its padding and truncation are switched off.
        eos_token: text of the token that ends an answer.
        unk_token: text of the token for what cannot be encoded; None asks the model.
        chat_template: makes a text of a conversation; None if the model has none.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        eos_token: str | None = None,
        unk_token: str | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.eos_token_id: int | None = None if eos_token is None else tokenizer.token_to_id(eos_token)
        unk_token = getattr(tokenizer.model, "unk_token", None) if unk_token is None else unk_token
        self.unk_token_id: int | None = None if unk_token is None else tokenizer.token_to_id(unk_token)
        self._chat_template = chat_template

    @classmethod
    def from_dir(cls, directory: str | Path) -> Tokenizer:
        """Load `tokenizer.json` (and `tokenizer_config.json` and the chat template, if they are there).

        Raises:
            EngineError: the file is missing or is not a tokenizer.
        """
        import tokenizers

        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise EngineError(
                f"{path} does not exist: put the checkpoint's tokenizer.json there, or pass "
                "skip_tokenizer_init=True and use token ids."
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises a bare Exception
            raise EngineError(f"{path} is not a tokenizer that this version can read: {error}.") from None
        config = _read_config(path.with_name("tokenizer_config.json"))
        return cls(
            tokenizer,
            eos_token=token_text(config, "eos_token"),
            unk_token=token_text(config, "unk_token"),
            chat_template=read_chat_template(path.parent, config),
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones among them."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Text to token ids; `add_special_tokens` adds what the model expects around a text (such as BOS).

        Raises:
            RequestError: the text is not encodable (a lone surrogate, say).
        """
        try:
            text.encode()  # says what is wrong with a text that is none
            # `encode` would hold up every other thread of Python for as long as it takes, the engine's among them.
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return list(encoding.ids)
        except Exception as error:  # the package raises a bare Exception
            raise RequestError(f"the tokenizer cannot encode this text: {error}.") from None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Token ids to text; bytes that are not UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a conversation; it has its special tokens, so it is encoded without adding any.

        Args, and what is raised, are those of `ChatTemplate.render`; a model without a template is a `RequestError`.
        """
        if self._chat_template is None:
            raise RequestError("this model's tokenizer has no chat template: give the whole prompt as a text.")
        return self._chat_template.render(messages, add_generation_prompt=add_generation_prompt, **variables)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(f"{path} cannot be read as JSON: {error}.") from None
    return content if isinstance(content, dict) else {}
