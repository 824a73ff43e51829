"""One text from another: translation, summaries. B batch, S source length, T target length, N examples."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfm_jax.data import rows
from tfm_jax.data.corpus import open_records
from tfm_jax.data.files import text_of
from tfm_jax.data.rows import Part, Texts, joined, width_for
from tfm_jax.data.types import Batch, Data, Frame, Records
from tfm_jax.errors import UserError


def make(
    *,
    source: str,
    text: str = "source",
    target: str = "target",
    references: str | None = None,
    tokenizer: str = "bpe:8000",
    seq_len: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    decoder_start: int | None = None,
    manual_dir: str | None = None,
    split: str = "auto",
    valid_fraction: float | None = None,
    cache_dir: str | None = None,
    workers: int = 0,
    tokenizer_dir: str | None = None,
) -> Data:
    """The config section `data` for `name="pairs"`.

    A batch has the inputs `tokens` (B, S) int32, `valid` (B, S) bool and `decoder_tokens` (B, T) int32, targets (B, T) and
    weights (B, T). S and T are `seq_len`, or 3/4, 1/2, 3/8 of it and so on, as the batch's longest rows allow (`rows.width_for`):
    one compiled program for each pair of lengths.

    Args:
      source: `jsonl:GLOB`, `tfds:NAME` or `hf:DIR`; see `data.sources`.
      text: the field that is read.
      target: the field that is written.
      references: the field of the texts, one or a list, that an answer is compared with; the target if None.
      tokenizer: as for `data.tokens`; one that learns, learns from both fields.
      seq_len: longest source and longest target, marks included; what is longer is cut at its end.
      batch_size: rows of the global batch.
      seed: of the order of the examples.
      decoder_start: the id that a decoder begins with; the end mark if None.
      manual_dir: the folder of files that a TFDS builder wants you to have.
      split, valid_fraction, cache_dir, workers, tokenizer_dir: as for `data.tokens`.

    Raises:
      UserError: a field that the source lacks, or a length that leaves no room for a text.
    """
    corpora = open_records(
        "pairs",
        source,
        [text, target],
        at_least_one={"seq_len": seq_len, "batch_size": batch_size},
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
    marks = len(frame.before) + len(frame.after)
    if seq_len <= marks:
        raise UserError(f"data.seq_len={seq_len}: the marks alone take {marks}.")
    start = codec.end_id if decoder_start is None else decoder_start

    @functools.cache
    def made(name: str) -> _Pairs:
        return _Pairs(
            corpora[0].texts(name),
            corpora[1].texts(name),
            frame,
            seq_len,
            codec.end_id,
            start,
            tuple(corpora[1].pieces[name]),
            references or target,
        )

    def evals(name: str, size: int | None) -> Pass:
        corpora[0].stream(name)
        return Pass(made(name), size or batch_size)

    prints = [*(corpus.fingerprint for corpus in corpora), seq_len, start]
    return Data(
        train=rows.Training(made("train"), batch_size, seed),
        evals=evals,
        vocab_size=codec.vocab_size,
        tokenizer=codec,
        facts={name: {"examples": found["documents"]} for name, found in corpora[0].facts.items()},
        fingerprint=" ".join(map(str, prints)),
    )


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Tokenized pairs of a split; `pieces` and `field` lead back to the targets' texts."""

    source: Texts
    target: Texts
    frame: Frame
    seq_len: int
    end_id: int
    start_id: int
    pieces: Sequence[Any]
    field: str

    def __len__(self) -> int:
        return len(self.source.edges) - 1

    @property
    def opening(self) -> list[int]:
        """What a target begins with: the marks before a text, unless they are the one that ends it."""
        return [mark for mark in self.frame.before if mark != self.end_id]

    def sizes(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of source and target as they are used, without marks."""
        room = self.seq_len - len(self.frame.before) - len(self.frame.after)
        left = self.seq_len - len(self.opening) - 1
        return np.minimum(self.source.sizes(index), room), np.minimum(self.target.sizes(index), left)

    def both(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sizes = self.sizes(index)
        marks = len(self.frame.before) + len(self.frame.after)
        return sizes[0] + marks, sizes[1] + len(self.opening) + 1

    def lengths(self, index: np.ndarray) -> np.ndarray:
        first, second = self.both(index)
        # By the longer of the two: each has its own width, and a sum would put a long source beside a long target.
        found: np.ndarray = np.maximum(first, second) * 2 * self.seq_len + first + second
        return found

    def widths(self, index: np.ndarray) -> tuple[int, int]:
        first, second = (int(x.max()) for x in self.both(index))
        return width_for(first, self.seq_len), width_for(second, self.seq_len)

    def batch(self, index: np.ndarray, whole: np.ndarray, inside: np.ndarray) -> Batch:
        sizes, frame, count, widths = self.sizes(index), self.frame, len(index), self.widths(whole)
        read: list[Part] = [frame.before, self.source.stretch(index, sizes[0]), frame.after]
        tokens, at = joined(read, count, widths[0], self.end_id)
        written: list[Part] = [self.opening, self.target.stretch(index, sizes[1]), [self.end_id]]
        targets, end = joined(written, count, widths[1], self.end_id)
        start = np.full((count, 1), self.start_id, np.int32)
        inputs = {
            "tokens": tokens,
            "valid": np.arange(widths[0])[None] < at[-1],
            "decoder_tokens": np.concatenate([start, targets[:, :-1]], axis=1),
        }
        weights = (np.arange(widths[1])[None] < end[-1]) & inside[:, None]
        return {"inputs": inputs, "targets": targets, "weights": weights.astype(np.float32)}

    @functools.cached_property
    def texts(self) -> list[list[str]]:
        """What the source has for each example to be compared with."""
        out = []
        for piece in self.pieces:
            assert isinstance(piece, Records)
            for where, value in piece.values(self.field):
                texts = value if isinstance(value, list | tuple | np.ndarray) else [value]
                if not len(texts):
                    raise UserError(f"{where}: the field {self.field!r} is empty.")
                out.append([text_of(text, where, self.field) for text in texts])
        return out


class Pass(rows.Pass):
    """One pass, and what an answer is compared with."""

    def __init__(self, pairs: _Pairs, batch_size: int) -> None:
        super().__init__(pairs, batch_size)
        self.pairs = pairs

    def references(self, step: int) -> list[list[str]]:
        """The texts that a batch's rows are compared with, without the rows behind the last example."""
        index, inside = self.places.at(step)
        return [self.pairs.texts[i] for i in index[inside]]
