# SPDX-License-Identifier: Apache-2.0
"""From tokens to text while they come: no half characters, no half stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from adaptive_k_moe.runtime.tokenizer import TokenizerLike

_REPLACEMENT = "\ufffd"

# Tokens of the prompt that the answer's first tokens are decoded behind. A decoder looks back one
# token for spaces and three for the bytes of a character; the rest is margin.
_CONTEXT_TOKENS = 8


class Detokenizer:
    """Decodes an answer piece by piece; the pieces together are what decoding it behind its prompt gives.

    A token's text depends on the tokens before it (spaces, characters of several bytes), so each new
    token is decoded behind the latest piece's tokens, and a piece is given out only when it does not
    end in the middle of a character.

    Args:
        tokenizer: decodes.
        context: the prompt's token ids; the answer follows them.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: TokenizerLike, context: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        size = _CONTEXT_TOKENS
        self._window = list(context[-size:])
        self._given_text = self._decode(self._window)
        # A context that begins within a character would spoil the run of bytes after it.
        while size < len(context) and self._given_text.startswith(_REPLACEMENT):
            size *= 2
            self._window = list(context[-size:])
            self._given_text = self._decode(self._window)
        self._num_given = len(self._window)

    def append(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._window.append(token_id)
        text = self._decode(self._window)
        return "" if text.endswith(_REPLACEMENT) else self._give(text)

    def finish(self) -> str:
        """What is left at the end; a character that stayed unfinished is U+FFFD."""
        return self._give(self._decode(self._window))

    def _give(self, text: str) -> str:
        if text.startswith(self._given_text):
            piece = text[len(self._given_text) :]
            if not piece:
                return ""
            # What was given out before this piece has done its work as context.
            del self._window[: self._num_given]
        else:
            # The prompt ended within a character, and the answer has finished it; both stay as context.
            pairs = enumerate(zip(self._given_text, text, strict=False))
            piece = text[next((i for i, (old, new) in pairs if old != new), len(text)) :]
        self._num_given = len(self._window)
        self._given_text = self._decode(self._window)
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


class StopStrings:
    """Finds the first stop string in text that comes in pieces, however it is cut.

    The string whose last character comes first wins; of several that end there, the longest. Text that
    may still become a stop string is held back.

    Args:
        stops: strings to look for; none of them empty.
        include: whether the text keeps the stop string that ended it.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._longest_part = max((len(stop) - 1 for stop in self._stops), default=0)
        self._held = ""

    def append(self, piece: str, *, armed: bool = True) -> tuple[str, str | None]:
        """Text that is certain now, and the stop string that ended it, if one did.

        Args:
            piece: the new text.
            armed: whether a stop string that ends in this piece counts.
        """
        if not self._stops:
            return piece, None
        text = self._held + piece
        if armed and (found := self._find(text)) is not None:
            start, end, stop = found
            self._held = ""
            return text[: end if self._include else start], stop
        certain = len(text) - self._held_length(text)
        self._held = text[certain:]
        return text[:certain], None

    def finish(self) -> str:
        """The text that was held back."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> tuple[int, int, str] | None:
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            # A match must end in the new piece.
            start = text.find(stop, max(0, len(self._held) - len(stop) + 1))
            if start >= 0:
                end = start + len(stop)
                if best is None or (end, start) < (best[1], best[0]):
                    best = start, end, stop
        return best

    def _held_length(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest_part, len(text)), 0, -1):
            end = text[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stops):
                return length
        return 0


class AnswerText:
    """An answer's text as its tokens come, ended by a stop string where one appears.

    Args:
        tokenizer: decodes; without one the text stays empty.
        context: the prompt's token ids.
        stops: strings that end the text.
        include_stop: whether the text keeps the stop string.
        min_tokens: generated tokens before which no stop string counts.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(
        self,
        tokenizer: TokenizerLike | None,
        context: Sequence[int],
        *,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        self.text = ""
        self._min_tokens = min_tokens
        self._detokenizer = (
            None if tokenizer is None else Detokenizer(tokenizer, context, skip_special_tokens=skip_special_tokens)
        )
        self._stop_strings = StopStrings(stops, include=include_stop)
        self._ended = False

    def append(self, token_id: int, num_generated: int) -> str | None:
        """Take the answer's token number `num_generated`; the stop string that ends the text, if one does."""
        if self._detokenizer is None:
            return None
        return self._take(self._detokenizer.append(token_id), num_generated)

    def finish(self, num_generated: int) -> str | None:
        """No token follows: bring out what was held back; the stop string in it, if there is one."""
        if self._detokenizer is None or self._ended:
            return None
        stop = self._take(self._detokenizer.finish(), num_generated)
        if stop is None:
            self.text += self._stop_strings.finish()
        self._ended = True
        return stop

    def _take(self, piece: str, num_generated: int) -> str | None:
        if not piece:
            return None
        certain, stop = self._stop_strings.append(piece, armed=num_generated >= self._min_tokens)
        self.text += certain
        self._ended = stop is not None
        return stop
