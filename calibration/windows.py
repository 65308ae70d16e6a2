# SPDX-License-Identifier: Apache-2.0
"""Texts as windows of tokens, and their division into a part to fit on and a part to report on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.runtime.tokenizer import TokenizerLike

TokenArray = npt.NDArray[np.int64]

BLOCK_WINDOWS = 4
"""Windows in a block: blocks go to the fitted and to the reported part in turn."""


@dataclass(frozen=True, eq=False)
class Windows:
    """W windows of n tokens, each read with no context before it.

    Attributes:
        tokens: [W, n] token ids; every window begins with the special tokens that the tokenizer puts
            before a text, if any.
        first: index of the first token that counts as predicted, at least 1.
        source: [W] the text that each window is from, as an index into `names`.
        names: the texts.
    """

    tokens: TokenArray
    first: int
    source: npt.NDArray[np.int64]
    names: list[str]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def window(self) -> int:
        """Tokens in a window, special tokens among them."""
        return int(self.tokens.shape[1])

    @property
    def num_predicted(self) -> int:
        """Tokens of one window that are predicted."""
        return self.window - self.first

    def take(self, rows: npt.NDArray[np.int64]) -> Windows:
        """Some of the windows."""
        return Windows(self.tokens[rows], self.first, self.source[rows], self.names)

    def fingerprint(self) -> str:
        """SHA-256 over the tokens and their shape."""
        digest = hashlib.sha256(repr((self.tokens.shape, self.first)).encode())
        digest.update(np.ascontiguousarray(self.tokens, "<i8").tobytes())
        return digest.hexdigest()


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text.

    Raises:
        CalibrationError: it cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"cannot read the text {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise CalibrationError(f"{path} is not UTF-8 text.") from None
    if not text.strip():
        raise CalibrationError(f"the text {path} is empty: give one with at least a window of tokens.")
    return text


def make_windows(
    tokenizer: TokenizerLike, texts: dict[str, str], window: int, *, max_tokens: int | None = None
) -> Windows:
    """Cut texts into windows that do not overlap; what is left over at a text's end is not used.

    Args:
        tokenizer: the engine's.
        texts: name to text.
        window: tokens in a window, the leading special tokens included.
        max_tokens: use no more than about this many tokens of each text.

    Raises:
        CalibrationError: a text is shorter than one window, or the window has no room for a prediction.
    """
    plain, dressed = (tokenizer.encode("a", add_special_tokens=add) for add in (False, True))
    prefix = dressed[: dressed.index(plain[0])] if plain and plain[0] in dressed else []
    first = max(1, len(prefix))
    if window <= first:
        raise CalibrationError(f"a window of {window} tokens leaves nothing to predict: give --window a larger number.")
    step = window - len(prefix)
    rows: list[list[int]] = []
    source: list[int] = []
    for index, (name, text) in enumerate(texts.items()):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) < step:
            raise CalibrationError(
                f"the text {name} has {len(ids)} tokens, fewer than the {step} of one window: "
                "give a longer text or a smaller --window."
            )
        ids = ids[: None if max_tokens is None else max(max_tokens, step)]
        starts = range(0, len(ids) - step + 1, step)
        rows += [prefix + ids[start : start + step] for start in starts]
        source += [index] * len(starts)
    return Windows(np.array(rows, np.int64), first, np.array(source, np.int64), list(texts))


def split(windows: Windows) -> tuple[Windows, Windows]:
    """Divide windows into one part to fit on and one to report on.

    Blocks of neighbouring windows go to the two parts in turn, so both see every text and every stretch
    of it, and only the windows at a block's edge have a neighbour in the other part.

    Raises:
        CalibrationError: there are too few windows for two parts.
    """
    if len(windows) < 4:
        raise CalibrationError(
            f"the text fills {len(windows)} windows of {windows.window} tokens, and fitting on one part and "
            "reporting on another needs at least 4: give more text, --heldout_text, or a smaller --window."
        )
    size = min(BLOCK_WINDOWS, len(windows) // 2)
    block = np.arange(len(windows)) // size
    odd = block % 2 == 1
    return windows.take(np.flatnonzero(~odd)), windows.take(np.flatnonzero(odd))


def token_texts(tokenizer: TokenizerLike, ids: Sequence[int]) -> list[str]:
    """The text of each token by itself."""
    return [tokenizer.decode([int(i)], skip_special_tokens=False) for i in ids]


def token_class(text: str) -> str:
    """A coarse class of a token by its text: what a reader would call it, not what the model knows."""
    bare = text.strip()
    if not bare:
        return "whitespace"
    if bare.startswith("<") and bare.endswith(">") and len(bare) > 2:
        return "special"
    if bare[0].isdigit():
        return "number"
    if any(character.isalpha() for character in bare):
        return "word start" if text[0].isspace() else "word piece"
    return "punctuation"
