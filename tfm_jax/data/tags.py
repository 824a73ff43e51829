"""Words with a tag each, as rows of tokens. B batch, T length, N sentences."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfm_jax.data import rows
from tfm_jax.data.corpus import Corpus, cache_root, offsets, open_records
from tfm_jax.data.examples import named_once
from tfm_jax.data.files import text_of
from tfm_jax.data.rows import Part, Texts, joined, width_for
from tfm_jax.data.types import Batch, Data, Dataset, Frame, Records
from tfm_jax.errors import UserError, nearest


def make(
    *,
    source: str,
    words: str = "words",
    tags: str = "tags",
    names: Sequence[str] | None = None,
    tokenizer: str = "bpe:4096",
    seq_len: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    manual_dir: str | None = None,
    split: str = "auto",
    valid_fraction: float | None = None,
    cache_dir: str | None = None,
    workers: int = 0,
    tokenizer_dir: str | None = None,
) -> Data:
    """The config section `data` for `name="tags"`.

    A batch has the inputs `tokens` (B, T) int32 and `valid` (B, T) bool, the targets (B, T) int32 and weights (B, T), which
    are 1 at the first token of each word (Devlin et al. 2019, section 5.3). The words of a sentence are joined by spaces. T is
    as in `data.examples`.

    Args:
      source: `jsonl:GLOB`, `tfds:NAME` or `hf:DIR`; see `data.sources`.
      words: the field with a sentence's words.
      tags: the field with as many tags, names or, in the train split too, numbers.
      names: those of the numbers, in their order; for tags that are names, those of the train split if None.
      tokenizer: as for `data.tokens`.
      seq_len: longest row, marks included; of longer sentences the end is cut, and its words have no tag.
      batch_size: rows of the global batch.
      seed: of the order of the sentences.
      manual_dir: the folder of files that a TFDS builder wants you to have.
      split, valid_fraction, cache_dir, workers, tokenizer_dir: as for `data.tokens`.

    Raises:
      UserError: a field that the source lacks, more or fewer tags than words, a tag that the train split has not; with its place,
        in the train split or when another is asked for.
    """
    (corpus,) = open_records(
        "tags",
        source,
        [words],
        at_least_one={"seq_len": seq_len, "batch_size": batch_size},
        tokenizer=tokenizer,
        split=split,
        valid_fraction=valid_fraction,
        cache_dir=cache_dir,
        workers=workers,
        tokenizer_dir=tokenizer_dir,
        manual_dir=manual_dir,
    )
    codec, root = corpus.tokenizer, cache_root(cache_dir)
    frame = codec.frame()
    if seq_len <= len(frame.before) + len(frame.after):
        raise UserError(f"data.seq_len={seq_len}: the marks alone take {len(frame.before) + len(frame.after)}.")
    named_once(names, "tag")
    train = _sentences(corpus, "train", words, tags)
    kind = _kind(train, tags)
    if kind is int and names is None:
        raise UserError(f"data.source={source!r}: the tags in the field {tags!r} are numbers; name them: data.names.")
    known = list(names) if names is not None else sorted({tag for sentence in train for tag in sentence.tags})
    number: dict[Any, int] = {name: i for i, name in enumerate(known)}
    # Numbers beside a train split of names are of a coding that is not known.
    number |= {i: i for i in range(len(known))} if kind is int else {}

    @functools.cache
    def made(name: str) -> _Tagged:
        # Of splits that are asked for: a test set's tags may not be known.
        return _Tagged.of(
            corpus.texts(name),
            train if name == "train" else _sentences(corpus, name, words, tags),
            offsets(corpus, name, root),
            known,
            number,
            tags,
            frame,
            seq_len,
            codec.end_id,
        )

    def evals(name: str, size: int | None) -> Dataset:
        corpus.stream(name)
        return Pass(made(name), size or batch_size)

    facts = [corpus.fingerprint, tags, known, seq_len]
    return Data(
        train=rows.Training(made("train"), batch_size, seed),
        evals=evals,
        vocab_size=codec.vocab_size,
        tokenizer=codec,
        facts={name: {"examples": found["documents"]} for name, found in corpus.facts.items()},
        fingerprint=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
        sizes={"classes": len(known)},
        filled_in={"names": known},
    )


@dataclass(frozen=True)
class _Sentence:
    """Words and their tags, and where they stand."""

    where: str
    words: list[str]
    tags: list[Any]


def _sentences(corpus: Corpus, split: str, words: str, tags: str) -> list[_Sentence]:
    out = []
    for piece in corpus.pieces[split]:
        assert isinstance(piece, Records)
        for (where, found), (_, given) in zip(piece.values(words), piece.values(tags), strict=True):
            for field, value in ((words, found), (tags, given)):
                if not isinstance(value, list | tuple | np.ndarray):
                    raise UserError(f"{where}: the field {field!r} is a {type(value).__name__}, not a list.")
            kept = [text_of(word, where, words) for word in found]
            plain = [_plain(tag) for tag in given]
            if wrong := [tag for tag in plain if type(tag) not in (str, int)]:
                raise UserError(f"{where}: {wrong[0]!r} in the field {tags!r} is neither a name nor a whole number.")
            if len(kept) != len(plain):
                raise UserError(f"{where}: {len(kept)} words, but {len(plain)} tags.")
            out.append(_Sentence(where, kept, plain))
    return out


def _plain(tag: Any) -> Any:
    if isinstance(tag, bytes):
        return tag.decode()
    return tag.item() if isinstance(tag, np.generic) else tag


def _kind(sentences: Sequence[_Sentence], field: str) -> type[Any]:
    """What all tags are, names or numbers."""
    first = next(tag for sentence in sentences for tag in sentence.tags)
    for sentence in sentences:
        if wrong := [tag for tag in sentence.tags if type(tag) is not type(first)]:
            raise UserError(
                f"{sentence.where}: {wrong[0]!r} in the field {field!r} stands beside {first!r}: tags are all names or all numbers."
            )
    return type(first)


@dataclass(frozen=True, eq=False)
class _Tagged:
    """A split's sentences: for each, `first` its words' first tokens and `tags` their classes."""

    texts: Texts
    first: Sequence[np.ndarray]
    tags: Sequence[np.ndarray]
    names: Sequence[str]
    frame: Frame
    seq_len: int
    pad: int

    @classmethod
    def of(
        cls,
        texts: Texts,
        sentences: Sequence[_Sentence],
        places: Sequence[np.ndarray],
        names: Sequence[str],
        number: Mapping[Any, int],
        field: str,
        frame: Frame,
        seq_len: int,
        pad: int,
    ) -> _Tagged:
        first, tags = list[np.ndarray](), list[np.ndarray]()
        for sentence, spans in zip(sentences, places, strict=True):
            for tag in sentence.tags:
                if tag not in number:
                    hint = nearest(str(tag), names)
                    raise UserError(
                        f"{sentence.where}: {tag!r} in the field {field!r} is no tag of the train split or of data.names.{hint}"
                    )
            sizes = np.array([len(word) for word in sentence.words], np.int64)
            begins = np.cumsum(sizes + 1) - sizes - 1
            # The first token that has a character of the word; a word of which the tokenizer left nothing has no place.
            at = np.searchsorted(spans[:, 1], begins, side="right")
            there = at < len(spans)
            there[there] = spans[at[there], 0] < (begins + sizes)[there]
            first.append(np.where(there, at, -1))
            tags.append(np.array([number[tag] for tag in sentence.tags], np.int32))
        return cls(texts, first, tags, names, frame, seq_len, pad)

    def __len__(self) -> int:
        return len(self.tags)

    def sizes(self, index: np.ndarray) -> np.ndarray:
        room = self.seq_len - len(self.frame.before) - len(self.frame.after)
        found: np.ndarray = np.minimum(self.texts.sizes(index), room)
        return found

    def lengths(self, index: np.ndarray) -> np.ndarray:
        total: np.ndarray = self.sizes(index) + len(self.frame.before) + len(self.frame.after)
        return total

    def positions(self, sentence: int) -> tuple[np.ndarray, np.ndarray]:
        """Which of a sentence's words have a place in its row, and that place."""
        first = self.first[sentence]
        shown = np.flatnonzero((first >= 0) & (first < int(self.sizes(np.array([sentence]))[0])))
        return shown, first[shown] + len(self.frame.before)

    def batch(self, index: np.ndarray, whole: np.ndarray, inside: np.ndarray) -> Batch:
        width = width_for(int(self.lengths(whole).max()), self.seq_len)
        parts: list[Part] = [self.frame.before, self.texts.stretch(index, self.sizes(index)), self.frame.after]
        tokens, at = joined(parts, len(index), width, self.pad)
        targets, weights = np.zeros((len(index), width), np.int32), np.zeros((len(index), width), np.float32)
        for row, sentence in enumerate(index.tolist()):
            if inside[row]:
                shown, place = self.positions(sentence)
                targets[row, place], weights[row, place] = self.tags[sentence][shown], 1.0
        inputs = {"tokens": tokens, "valid": np.arange(width)[None] < at[-1]}
        return {"inputs": inputs, "targets": targets, "weights": weights}


class Pass(rows.Pass):
    """One pass, and the words whose tags are predicted."""

    def __init__(self, tagged: _Tagged, batch_size: int) -> None:
        super().__init__(tagged, batch_size)
        self.tagged, self.names = tagged, tagged.names

    def tagged_words(self, step: int) -> list[tuple[list[str], np.ndarray, np.ndarray]]:
        """For each row of a batch, without those behind the last: the tags of all words, and of those that have a place in the
        row, which they are and where they stand."""
        index, inside = self.places.at(step)
        found = []
        for i in index[inside].tolist():
            shown, place = self.tagged.positions(i)
            found.append(([self.names[tag] for tag in self.tagged.tags[i]], shown, place))
        return found
