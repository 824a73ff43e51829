"""What the pieces of a vocabulary add to a text, and so where words begin. V vocabulary, B rows, T length."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tfm_jax.data.vocabularies import byte_tokenizer
from tfm_jax.errors import UserError

GOES_ON_BEHIND_LETTERS, GOES_ON = 1, 2
AS_BEFORE = 2


class Words(NamedTuple):
    """Where words begin in a row of ids, by a byte of each id of the vocabulary (V,) for its first and its last character."""

    first: bytes
    """`GOES_ON_BEHIND_LETTERS` (or digits) with the word before, `GOES_ON` with it behind whatever stands there, or 0."""
    last: bytes
    """1 for a letter or digit, 0 for another; `AS_BEFORE` where it says nothing but the middle of the piece before's."""

    def begin(self, tokens: np.ndarray) -> np.ndarray:
        """(B, T) bool, for `tokens` (B, T); a row begins a word."""
        first, last = (np.frombuffer(table, np.uint8)[tokens] for table in self)
        says = np.maximum.accumulate(np.where(last == AS_BEFORE, 0, np.arange(tokens.shape[1])[None]), axis=1)
        behind = np.take_along_axis(last, says, axis=1)[:, :-1]
        out = first == 0
        out[:, 1:] |= (first[:, 1:] == GOES_ON_BEHIND_LETTERS) & (behind != 1)
        out[:, 0] = True
        return out


def word_parts(pieces: Sequence[str]) -> Words:
    """How the words of a text are told from its pieces: runs of letters and digits, whatever else stands between them.

    WordPiece marks the pieces that go on with a word. The others mark spaces alone, so that whether a piece begins a word is
    also of the piece before it: behind a quote or the end of a line there is no space.
    """
    mark = _mark(pieces)
    if mark is None:
        raise UserError("data.mask_unit='word': this tokenizer does not say where words begin.")
    if mark == _INSIDE:
        return Words(bytes(GOES_ON if piece.startswith(mark) else 0 for piece in pieces), bytes(len(pieces)))
    spelled = [_spelled(piece, mark) for piece in pieces]
    return Words(bytes(map(_first, spelled)), bytes(map(_last, spelled)))


# A space as byte-level BPE and SentencePiece write it, and what WordPiece writes where there is none.
_BYTES, _SPACE, _INSIDE = "\u0120", "\u2581", "##"
_BYTE_OF = {piece: bytes([byte]) for byte, piece in enumerate(byte_tokenizer().pieces()[:256])}
_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def _mark(pieces: Sequence[str]) -> str | None:
    """The one that most pieces begin with: GPT-2 has a few that begin with two hashes, which are headings. Bytes alone have no
    piece that is longer than their space."""
    if _BYTE_OF.keys() <= {*pieces}:
        return _BYTES
    counts = {
        mark: sum(len(p) > len(mark) and p.startswith(mark) for p in pieces) for mark in (_BYTES, _SPACE, _INSIDE)
    }
    found = max(counts, key=lambda mark: counts[mark])
    return found if counts[found] else None


def _spelled(piece: str, mark: str | None) -> bytes:
    """What a piece adds to a text, in UTF-8, of which it may begin or end in the middle of a character."""
    if mark == _BYTES:
        return b"".join(_BYTE_OF.get(character, character.encode()) for character in piece)
    if mark == _SPACE:
        byte = _FALLBACK.fullmatch(piece)
        return bytes.fromhex(byte[1]) if byte else piece.replace(mark, " ").encode()
    return piece.removeprefix(mark or "").encode()


def _first(text: bytes) -> int:
    if text and _is_middle(text[0]):
        return GOES_ON
    return GOES_ON_BEHIND_LETTERS if _is_letter(_characters(text)[:1]) else 0


def _last(text: bytes) -> int:
    if all(map(_is_middle, text)):
        return AS_BEFORE
    return int(_is_letter(_characters(text)[-1:]))


def _is_middle(byte: int) -> bool:
    """Whether a character does not begin here, in UTF-8."""
    return byte & 0xC0 == 0x80


def _is_letter(character: str) -> bool:
    """Or a digit, or what is written over, under or around one."""
    return character.isalnum() or (bool(character) and unicodedata.category(character).startswith("M"))


def _characters(text: bytes) -> str:
    """From the first character that begins in it. One that is cut off is guessed: its first bytes say its block, all but always."""
    while text and _is_middle(text[0]):
        text = text[1:]
    for rest in (b"", *(byte * count for byte in (b"\x9f", b"\xa0") for count in (1, 2, 3))):
        try:
            return (text + rest).decode()
        except UnicodeDecodeError:
            continue
    return text.decode(errors="replace")


def spelled(pieces: Sequence[str]) -> tuple[bytes, ...]:
    """What each piece adds to a text, in UTF-8; WordPiece's are without the spaces between them."""
    mark = _mark(pieces)
    found = tuple(_spelled(piece, mark) for piece in pieces)
    if not any(text.endswith((b".", b"!", b"?")) for text in found):
        raise UserError("data.shuffle_sentences: this tokenizer has no piece for a full stop.")
    return found
