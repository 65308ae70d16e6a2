# SPDX-License-Identifier: Apache-2.0
"""Texts as windows: what is read, how it is divided, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adaptive_k_moe.calibration.errors import CalibrationError
from adaptive_k_moe.calibration.windows import make_windows, read_text, split, token_class


class Letters:
    """One token a letter, with or without a mark before a text."""

    eos_token_id = None
    unk_token_id = None

    def __init__(self, bos: int | None = 0) -> None:
        self._bos = bos

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = [ord(letter) for letter in text]
        return [self._bos, *ids] if add_special_tokens and self._bos is not None else ids

    def decode(self, token_ids: object, *, skip_special_tokens: bool = True) -> str:
        raise NotImplementedError


def test_every_window_begins_as_a_text_begins() -> None:
    windows = make_windows(Letters(), {"abc": "abcdefghij"}, 4)
    assert windows.tokens.tolist() == [[0, *map(ord, part)] for part in ("abc", "def", "ghi")]
    assert windows.first == 1 and windows.num_predicted == 3


def test_without_a_mark_the_first_token_is_context() -> None:
    windows = make_windows(Letters(None), {"a": "abcdefgh", "b": "ijkl"}, 4)
    assert windows.tokens.shape == (3, 4) and windows.num_predicted == 3
    assert windows.source.tolist() == [0, 0, 1]


def test_the_two_parts_share_no_window_and_see_every_text() -> None:
    text = "".join(chr(200 + i) for i in range(60))
    windows = make_windows(Letters(), {"a": text[:30], "b": text[30:]}, 3)
    fit, heldout = split(windows)
    assert not set(fit.tokens[:, 1]) & set(heldout.tokens[:, 1])
    assert len(fit) + len(heldout) == len(windows)
    assert set(fit.source) == set(heldout.source) == {0, 1}


def test_unusable_texts_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for name, sentence in (("empty.txt", "is empty"), ("bytes.txt", "is not UTF-8"), ("none.txt", "cannot read")):
        with pytest.raises(CalibrationError, match=sentence):
            read_text(tmp_path / name)
    with pytest.raises(CalibrationError, match="the text a has 3 tokens, fewer than the 7 of one window"):
        make_windows(Letters(), {"a": "abc"}, 8)
    with pytest.raises(CalibrationError, match="leaves nothing to predict"):
        make_windows(Letters(), {"a": "abc"}, 1)
    with pytest.raises(CalibrationError, match="fills 3 windows of 2 tokens"):
        split(make_windows(Letters(), {"a": "abc"}, 2))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" the", "word start"),
        ("ing", "word piece"),
        (" 12", "number"),
        ("7", "number"),
        (", ", "punctuation"),
        ("\n\n", "whitespace"),
        ("<s>", "special"),
        ("<", "punctuation"),
    ],
)
def test_token_classes(text: str, kind: str) -> None:
    assert token_class(text) == kind


def test_fingerprint_sees_tokens_and_shape() -> None:
    a = make_windows(Letters(), {"a": "abcdefgh"}, 3)
    assert a.fingerprint() == make_windows(Letters(), {"b": "abcdefgh"}, 3).fingerprint()
    assert a.fingerprint() != make_windows(Letters(), {"a": "abcdefgh"}, 5).fingerprint()
    assert a.fingerprint() != a.take(np.array([1, 0])).fingerprint()
