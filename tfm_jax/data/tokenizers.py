"""Tokenizers behind one interface: Hugging Face `tokenizers` files and SentencePiece models.

A saved tokenizer is one file in a run folder, `tokenizer.json` or `tokenizer.model`; the end mark is found again
by what the file puts behind a text, or by name, so nothing else needs keeping.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tokenizers

from tfm_jax.data.types import Frame, Tokenizer
from tfm_jax.errors import UserError, closest

T = TypeVar("T", bound=Tokenizer)

END_MARK = "<|endoftext|>"
END_MARKS = (END_MARK, "</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<|im_end|>", "[SEP]")
JSON_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"


@dataclass(frozen=True)
class JsonTokenizer:
    """A `tokenizers.Tokenizer`, kept as the text of its `tokenizer.json`."""

    json: str
    name: str = JSON_FILE
    """Where it came from, for error messages."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The cached members below must not travel: a Tokenizer's pickle forgets encode_special_tokens.
        return (JsonTokenizer, (self.json, self.name))

    @cached_property
    def _engine(self) -> tokenizers.Tokenizer:
        try:
            engine = tokenizers.Tokenizer.from_str(self.json)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{self.name} is not a tokenizer.json: {error}.") from None
        engine.no_truncation()
        engine.no_padding()
        engine.encode_special_tokens = True
        return engine

    @cached_property
    def _vocab(self) -> dict[str, int]:
        return self._engine.get_vocab(with_added_tokens=True)

    @cached_property
    def vocab_size(self) -> int:
        return max(self._vocab.values()) + 1

    @cached_property
    def end_id(self) -> int:
        # The vocabularies of RoBERTa and BART have kept GPT-2's mark, which they never use; what stands behind a text is theirs.
        behind = self._behind_a_text
        return _find_end(self._vocab, self.name) if behind is None else behind

    @cached_property
    def _behind_a_text(self) -> int | None:
        """The mark that the file puts directly behind a text, if any."""
        if json.loads(self.json).get("post_processor") is None:
            return None
        # One of notes or of moves has no letter `a`, and may have no word for what it does not know.
        for text in filter(None, ["a", *self.pieces()[:100]]):
            try:
                found = self._engine.encode(text, add_special_tokens=True)
            except Exception:  # the library raises bare Exception
                continue
            if 0 in found.special_tokens_mask:
                behind = found.ids[len(found.ids) - found.special_tokens_mask[::-1].index(0) :]
                return int(behind[0]) if behind else None
        return None

    @cached_property
    def unk_id(self) -> int | None:
        model = json.loads(self.json)["model"]
        if model.get("unk_id") is not None:
            return int(model["unk_id"])
        return self._vocab.get(model.get("unk_token"))

    @cached_property
    def fingerprint(self) -> str:
        # Once all ended by the mark that is found by name, and prepared data did.
        ends = "" if self.end_id == _named_end(self._vocab) else f" {self.end_id}"
        return hashlib.sha256((self.json + ends).encode()).hexdigest()

    def token_id(self, mark: str) -> int | None:
        return self._vocab.get(mark)

    def pieces(self) -> list[str]:
        found = [""] * self.vocab_size
        for piece, i in self._vocab.items():
            found[i] = piece
        return found

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def offsets_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._engine.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2) for encoding in encodings]

    def frame(self) -> Frame:
        found = self._engine.encode("a", "a", add_special_tokens=True)
        texts = [i for i, mark in enumerate(found.special_tokens_mask) if not mark]
        second = next((i for a, i in itertools.pairwise(texts) if found.sequence_ids[a] != found.sequence_ids[i]), None)
        if second is None or len(texts) == len(found.ids):
            # It has no marks of its own: a document begins and ends with the mark of its end.
            return Frame([self.end_id], [self.end_id], [self.end_id], False)
        last = texts[texts.index(second) - 1]
        between = found.ids[last + 1 : second]
        return Frame(found.ids[: texts[0]], between, found.ids[texts[-1] + 1 :], found.type_ids[second] == 1)

    def prompt(self, text: str) -> list[int]:
        return list(self._engine.encode(text, add_special_tokens=True).ids)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._engine.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, JSON_FILE).write_text(self.json, encoding="utf-8")


@dataclass(frozen=True)
class SentencePieceTokenizer:
    """A SentencePiece model, kept as the bytes of its `.model` file. Decoding cannot bring back what it normalizes."""

    proto: bytes
    name: str = SENTENCEPIECE_FILE

    def __reduce__(self) -> tuple[Any, ...]:
        return (SentencePieceTokenizer, (self.proto, self.name))

    @cached_property
    def _engine(self) -> Any:
        try:
            import sentencepiece
        except ImportError:
            raise UserError(
                "A sentencepiece: tokenizer needs the sentencepiece package: pip install 'tfm_jax[sentencepiece]'."
            ) from None
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=self.proto)
        except Exception as error:  # RuntimeError or a subclass of it, by version
            raise UserError(f"{self.name} is not a SentencePiece model: {error}.") from None

    @cached_property
    def vocab_size(self) -> int:
        return int(self._engine.get_piece_size())

    @cached_property
    def end_id(self) -> int:
        engine = self._engine
        if engine.eos_id() >= 0:
            return int(engine.eos_id())
        return _find_end({engine.id_to_piece(i): i for i in range(self.vocab_size)}, self.name)

    @cached_property
    def unk_id(self) -> int | None:
        return int(self._engine.unk_id())

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.proto).hexdigest()

    def token_id(self, mark: str) -> int | None:
        found = int(self._engine.piece_to_id(mark))
        return None if found == self.unk_id else found

    def pieces(self) -> list[str]:
        return [str(self._engine.id_to_piece(i)) for i in range(self.vocab_size)]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, dtype=np.int32) for ids in self._engine.encode(list(texts))]

    def offsets_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = [self._engine.encode(text, out_type="immutable_proto").pieces for text in texts]
        return [np.array([(p.begin, p.end) for p in pieces], dtype=np.int32).reshape(-1, 2) for pieces in found]

    def frame(self) -> Frame:
        start = int(self._engine.bos_id())
        return Frame([start] if start >= 0 else [], [self.end_id], [self.end_id], False)

    def prompt(self, text: str) -> list[int]:
        start = int(self._engine.bos_id())
        return [*([start] if start >= 0 else []), *map(int, self._engine.encode(text))]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        size = self.vocab_size
        return str(self._engine.decode([int(i) for i in ids if int(i) < size]))

    def with_marks(self, marks: Sequence[str]) -> SentencePieceTokenizer:
        """The same with marks behind its pieces, which text does not spell."""
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto.FromString(self.proto)
        for mark in marks:
            model.pieces.add(piece=mark, score=0.0, type=model.SentencePiece.CONTROL)
        return SentencePieceTokenizer(model.SerializeToString(), self.name)

    def without(self, marks: re.Pattern[str]) -> SentencePieceTokenizer:
        """The same without the pieces whose names match."""
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto.FromString(self.proto)
        kept = [piece for piece in model.pieces if not marks.search(piece.piece)]
        del model.pieces[:]
        model.pieces.extend(kept)
        return SentencePieceTokenizer(model.SerializeToString(), self.name)

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, SENTENCEPIECE_FILE).write_bytes(self.proto)


def _named_end(vocab: dict[str, int]) -> int | None:
    return next((vocab[mark] for mark in END_MARKS if mark in vocab), None)


def _find_end(vocab: dict[str, int], name: str) -> int:
    if (found := _named_end(vocab)) is None:
        raise UserError(f"{name} has no end-of-document mark; looked for {', '.join(END_MARKS)}.")
    return found


def read_json_tokenizer(path: Path) -> JsonTokenizer:
    """The tokenizer of any `tokenizer.json`; truncation and padding that it asks for are switched off."""
    _must_exist(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a tokenizer.json: it is not UTF-8 text.") from None
    return _checked(JsonTokenizer(text, str(path)))


def read_sentencepiece(path: Path) -> SentencePieceTokenizer:
    _must_exist(path)
    return _checked(SentencePieceTokenizer(path.read_bytes(), str(path)))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that `save` wrote into `folder`."""
    folder = Path(folder)
    if (folder / JSON_FILE).exists():
        return read_json_tokenizer(folder / JSON_FILE)
    if (folder / SENTENCEPIECE_FILE).exists():
        return read_sentencepiece(folder / SENTENCEPIECE_FILE)
    if not folder.parent.is_dir():
        raise UserError(
            f"There is no {folder.parent}, whose tokenizer is asked for (data.tokenizer=run:{folder.parent}). A run of that name"
            " is trained, or made of somebody's model: python -m experiments.convert --from hf:FOLDER --to"
            f" {folder.parent}."
        )
    raise UserError(f"{folder} holds no tokenizer: neither {JSON_FILE} nor {SENTENCEPIECE_FILE} is there.")


def reads_others(folder: Path, tokenizer: Tokenizer | None) -> bool:
    """Whether a run folder's tokenizer gives other ids than this one; False where one of them has none."""
    saved = folder / "tokenizer"
    return tokenizer is not None and saved.is_dir() and load_tokenizer(saved).fingerprint != tokenizer.fingerprint


def _must_exist(path: Path) -> None:
    if not path.is_file():
        there = sorted(str(p) for p in path.parent.glob("*") if p.is_file()) if path.parent.is_dir() else []
        raise UserError(f"There is no tokenizer file {path}.{closest(path, there)}")


def _checked(tokenizer: T) -> T:
    """Parse it and find its end mark now, so that a bad file is an error where it is named."""
    _ = tokenizer.end_id
    return tokenizer


class TextStream:
    """Turns ids that arrive one by one into text that is only ever complete characters.

    The texts of all `push` calls and of `flush` joined are the whole text. Decoding looks at the ids since the last
    text but one, because a decoder may drop the space before the first word it sees.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0
        """How many of the ids kept have had their text given out."""

    def push(self, ids: int | Iterable[int]) -> str:
        self._ids += [ids] if isinstance(ids, int | np.integer) else [int(i) for i in ids]
        text = self._pending()
        # A character cut in the middle decodes to U+FFFD: wait for its other bytes.
        return "" if text.endswith("\ufffd") else self._give(text)

    def flush(self) -> str:
        """What is left, incomplete characters as U+FFFD."""
        return self._give(self._pending())

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown])
        return self._tokenizer.decode(self._ids)[len(before) :]

    def _give(self, text: str) -> str:
        if text:
            self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return text
