"""Labelled texts, alone or in pairs, one a row. B batch, T length, N examples."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tfm_jax.data.build import TokenStream
from tfm_jax.data.corpus import Corpus, cache_root, open_corpora
from tfm_jax.data.index import epoch_records, hash_ints, permute
from tfm_jax.data.locks import locked
from tfm_jax.data.types import Batch, Data, Dataset, Frame, Records, Rows
from tfm_jax.errors import UserError, nearest
from tfm_jax.files import write_atomic

log = logging.getLogger(__name__)
Kind = Literal["class", "number"]
SHORTEST = 16
POOL = 16
"""Batches whose rows are sorted by length together, so that a batch's rows are about equally long."""


def make(
    *,
    source: str,
    text: str = "text",
    pair: str | None = None,
    label: str = "label",
    kind: Kind = "class",
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
    """The config section `data` for `name="examples"`.

    A batch has the inputs `tokens` (B, T) int32 and `valid` (B, T) bool, for pairs whose tokenizer tells them apart also
    `token_types` (B, T) int32, and the targets (B,), int32 classes or float32 numbers. T is `seq_len` halved as often as
    the batch's longest row allows, but not below 16: one compiled program for each of the few lengths.

    Args:
      source: `jsonl:GLOB`, `tfds:NAME` or `hf:DIR`; see `data.sources`.
      text: the field that is the text.
      pair: the field of a second text.
      label: the field to predict.
      kind: `class`, whose names or numbers are those of the train split, or a `number`.
      tokenizer: as for `data.tokens`.
      seq_len: longest row, marks included; of longer examples the longer text is cut at its end.
      batch_size: rows of the global batch.
      seed: of the order of the examples.
      manual_dir: the folder of files that a TFDS builder wants you to have.
      split, valid_fraction, cache_dir, workers, tokenizer_dir: as for `data.tokens`.

    Raises:
      UserError: a field that the source lacks, a label that is no class of the train split or no number, with its place.
    """
    for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"data.{name}={value}: must be at least 1.")
    if source.partition(":")[0] in ("stdlib", "text"):
        raise UserError(f"data.source={source!r} has no fields: examples need jsonl:GLOB, tfds:NAME or hf:DIR.")

    corpora = open_corpora(
        source,
        [text] if pair is None else [text, pair],
        tokenizer=tokenizer,
        split=split,
        valid_fraction=valid_fraction,
        cache_dir=cache_dir,
        workers=workers,
        tokenizer_dir=tokenizer_dir,
        manual_dir=manual_dir,
    )
    codec = corpora[0].tokenizer
    frame = codec.frame()
    marks = len(frame.before) + len(frame.after) + (0 if pair is None else len(frame.between))
    if seq_len < marks + len(corpora):
        raise UserError(f"data.seq_len={seq_len}: the marks alone take {marks}, and each text at least one more.")
    root = cache_root(cache_dir)
    labels = {name: _labels(corpora[0], name, label, root) for name in corpora[0].streams}
    classes = _classes(labels["train"], source, label) if kind == "class" else []
    makers = {
        name: _Examples(
            tuple(corpus.streams[name] for corpus in corpora),
            tuple(corpus.streams[name].places(codec.end_id) for corpus in corpora),
            _targets(found, kind, classes, f"data.source={source!r}, {name}", label),
            frame,
            seq_len,
            codec.end_id,
        )
        for name, found in labels.items()
    }

    def evals(name: str, rows: int | None) -> Dataset:
        corpora[0].stream(name)
        return Pass(makers[name], rows or batch_size)

    facts = [corpora[0].fingerprint, *(c.fingerprint for c in corpora[1:]), label, kind, classes, seq_len]
    sizes = {"classes": len(classes) if kind == "class" else 1}
    return Data(
        train=Training(makers["train"], batch_size, seed),
        evals=evals,
        vocab_size=codec.vocab_size,
        tokenizer=codec,
        facts={name: {"examples": len(found.targets)} for name, found in makers.items()},
        fingerprint=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
        sizes=sizes | ({"types": 2} if pair is not None and frame.types else {}),
    )


def _labels(corpus: Corpus, split: str, field: str, root: Path) -> list[Any]:
    """What each record has in a field, as JSON has it; read once and kept beside the tokens."""
    path = root / "labels" / f"{corpus.fingerprint}-{hashlib.sha256(f'{split} {field}'.encode()).hexdigest()[:16]}.json"
    with locked(path):
        if not path.is_file():
            log.info("labels: reading the field %r of %s, %s.", field, corpus.source, split)
            write_atomic(path, json.dumps(list(_values(corpus, split, field))).encode())
    found: list[Any] = json.loads(path.read_text())
    return found


def _values(corpus: Corpus, split: str, field: str) -> Iterator[Any]:
    for piece in corpus.pieces[split]:
        assert isinstance(piece, Records)
        for where, value in piece.values(field):
            plain = value.item() if isinstance(value, np.generic) else value
            plain = plain.decode("utf-8", "replace") if isinstance(plain, bytes) else plain
            if not isinstance(plain, str | int | float):
                raise UserError(f"{where}: the field {field!r} is a {type(plain).__name__}, not a label.")
            yield plain


def _classes(labels: Sequence[Any], source: str, field: str) -> list[Any]:
    """The train split's: sorted names, or all whole numbers from 0."""
    kinds = {str if isinstance(value, str) else int if float(value).is_integer() else float for value in labels}
    if len(kinds) != 1 or kinds == {float}:
        raise UserError(
            f"data.source={source!r}: the field {field!r} mixes names and numbers, or has fractions; is it a number to"
            " predict (data.kind=number)?"
        )
    if kinds == {str}:
        return sorted(set(labels))
    if min(labels) < 0:
        raise UserError(f"data.source={source!r}: the class {min(labels)} in the field {field!r} is below 0.")
    return list(range(int(max(labels)) + 1))


def _targets(labels: Sequence[Any], kind: Kind, classes: Sequence[Any], where: str, field: str) -> np.ndarray:
    if kind == "number":
        for i, value in enumerate(labels):
            if isinstance(value, str):
                raise UserError(f"{where} {i}: the field {field!r} is {value!r}, not a number.")
        return np.asarray(labels, np.float32)
    number = {name: i for i, name in enumerate(classes)}
    for i, value in enumerate(labels):
        if value not in number:
            hint = nearest(str(value), [str(name) for name in classes])
            raise UserError(f"{where} {i}: {value!r} in the field {field!r} is no class of the train split.{hint}")
    return np.asarray([number[value] for value in labels], np.int32)


@dataclass(frozen=True, eq=False)
class _Examples:
    """Tokenized examples of a split.

    Attributes:
      streams: of each text.
      edges: for each text (N + 1,), where the end marks stand that are before the first and behind each.
      targets: (N,).
    """

    streams: tuple[TokenStream, ...]
    edges: tuple[np.ndarray, ...]
    targets: np.ndarray
    frame: Frame
    seq_len: int
    pad: int

    def __post_init__(self) -> None:
        for edges in self.edges:
            assert len(edges) == len(self.targets) + 1, "A record gave more than one document, or none."

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def marks(self) -> int:
        between = len(self.frame.between) if len(self.streams) > 1 else 0
        return len(self.frame.before) + between + len(self.frame.after)

    def text_lengths(self, index: np.ndarray) -> list[np.ndarray]:
        """Tokens of each text as they are used: the longer one of a pair is cut first."""
        sizes = [edges[index + 1] - edges[index] - 1 for edges in self.edges]
        room = self.seq_len - self.marks
        if len(sizes) == 1:
            return [np.minimum(sizes[0], room)]
        first, second = sizes
        # Each may have half of the room, and what the other leaves of its half; an odd token is the longer one's.
        half = np.where(first > second, room - room // 2, room // 2)
        return [
            np.minimum(first, np.maximum(room - second, half)),
            np.minimum(second, np.maximum(room - first, room - half)),
        ]

    def lengths(self, index: np.ndarray) -> np.ndarray:
        total: np.ndarray = np.sum(self.text_lengths(index), axis=0) + self.marks
        return total

    def width(self, longest: int) -> int:
        """T of a batch whose longest row has this length."""
        width = self.seq_len
        while width // 2 >= max(longest, SHORTEST):
            width //= 2
        return width

    def batch(self, index: np.ndarray, width: int, weights: np.ndarray) -> Batch:
        sizes, frame = self.text_lengths(index), self.frame
        place = np.arange(width)[None]
        tokens = np.full((len(index), width), self.pad, np.int32)
        types = np.zeros((len(index), width), np.int32)
        at = np.zeros((len(index), 1), np.int64)
        gaps = [frame.before, *([frame.between] if len(sizes) > 1 else []), frame.after]
        for number, marks in enumerate(gaps):
            if number:
                size, start = sizes[number - 1][:, None], self.edges[number - 1][index][:, None] + 1
                here = (place >= at) & (place < at + size)
                found = self.streams[number - 1].at(np.where(here, start + place - at, 0))
                tokens = np.where(here, found, tokens)
                at = at + size
            for i, mark in enumerate(marks):
                tokens = np.where(place == at + i, np.int32(mark), tokens)
            at = at + len(marks)
            if number == 1 and len(sizes) > 1:
                types = np.where(place >= at, 1, 0).astype(np.int32)
        valid = place < at
        inputs = {"tokens": tokens, "valid": valid}
        if len(sizes) > 1 and frame.types:
            inputs["token_types"] = np.where(valid, types, 0).astype(np.int32)
        return {"inputs": inputs, "targets": self.targets[index], "weights": weights}


@dataclass(frozen=True)
class Training:
    """Endless examples, each epoch in an order drawn from (seed, epoch).

    `POOL` batches at a time are drawn together, sorted by length, and taken in a drawn order.
    """

    examples: _Examples
    batch_size: int
    seed: int
    num_batches: None = None

    def batch_at(self, step: int, rows: Rows = slice(None)) -> Batch:
        pool, place = divmod(step, POOL)
        _, records = epoch_records(pool, POOL * self.batch_size, len(self.examples), self.seed)
        lengths = self.examples.lengths(records)
        order = np.argsort(lengths, kind="stable").reshape(POOL, self.batch_size)
        key = hash_ints(self.seed, 4, pool).view(np.int64)
        mine = order[permute(np.array([place]), POOL, key)[0]]
        width = self.examples.width(int(lengths[mine].max()))
        index = records[mine][rows]
        return self.examples.batch(index, width, np.ones(len(index), np.float32))


@dataclass(frozen=True)
class Pass:
    """One pass, the shortest examples first."""

    examples: _Examples
    batch_size: int
    order: np.ndarray = dataclasses.field(init=False, compare=False)

    def __post_init__(self) -> None:
        lengths = self.examples.lengths(np.arange(len(self.examples)))
        object.__setattr__(self, "order", np.argsort(lengths, kind="stable"))

    @property
    def num_batches(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def index_at(self, step: int, rows: Rows = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Which examples the rows are, and (B,) bool, False for rows behind the last one."""
        place = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)[rows]
        inside = place < len(self.examples)
        return self.order[np.where(inside, place, 0)], inside

    def batch_at(self, step: int, rows: Rows = slice(None)) -> Batch:
        everything, _ = self.index_at(step)
        width = self.examples.width(int(self.examples.lengths(everything).max()))
        index, inside = self.index_at(step, rows)
        return self.examples.batch(index, width, inside.astype(np.float32))
