"""Language-model batches from a stream of tokens on disk, memory-mapped and vectorised. T length, N tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tfm_jax.data import objectives
from tfm_jax.data.build import TokenStream
from tfm_jax.data.corpus import open_corpus, without_bytes
from tfm_jax.data.index import epoch_records, hash_ints
from tfm_jax.data.noise import Objective
from tfm_jax.data.segment_pairs import SHORTEST, Documents, SegmentPairs
from tfm_jax.data.types import Batch, Data, Rows
from tfm_jax.errors import UserError


def make(
    *,
    source: str,
    tokenizer: str = "bpe:4096",
    seq_len: int = 256,
    objective: objectives.Name = "next",
    mask_rate: float | None = None,
    span_length: float | None = None,
    mask_unit: objectives.Unit = "token",
    shuffle_sentences: float = 0.0,
    decoder_start: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    feature: str | None = None,
    manual_dir: str | None = None,
    split: str = "auto",
    valid_fraction: float | None = None,
    cache_dir: str | None = None,
    workers: int = 0,
    tokenizer_dir: str | None = None,
) -> Data:
    """The config section `data` for `name="tokens"`.

    Args:
      source: `stdlib`, `text:GLOB`, `jsonl:GLOB`, `tfds:NAME` or `hf:DIR`; see `data.sources`.
      tokenizer: `bytes`, `chars`, `words`, `bpe:N`, `wordpiece:N`, `unigram:N`, `file:PATH`, `sentencepiece:PATH` or `run:FOLDER`,
        the tokenizer of a run; those with a size are trained on the train split.
      seq_len: T, tokens a row; of an encoder's input where there are two sequences.
      objective: what is predicted: the `next` token, tokens behind a `mask`, a `span` behind a sentinel (T5), the whole
        text from one with holes (`denoise`, BART), how a text goes on after its first half (`continue`) or any place
        (`prefix`; `prefix_lm` for models without an encoder), or masked tokens of two segments and whether they stand in their
        `order` (ALBERT) or `follow` each other (BERT) in one document, for `task.name=masked_pairs`; see `data.objectives`.
      mask_rate: share of the tokens that are hidden; 0.15, and 0.3 for `denoise`, if None.
      decoder_start: the id that a decoder begins with; the end mark if None.
      span_length: mean length of hidden stretches for `span` and `denoise`; 3 if None.
      mask_unit: what is hidden as a whole: a `token`, or a `word`.
      shuffle_sentences: share of the rows of `denoise` whose sentences are permuted.
      batch_size: rows of the global batch.
      seed: of the order of the rows.
      feature: which field of a record is the text, where there are several.
      manual_dir: the folder of files that a TFDS builder wants you to have.
      split: how files become train and validation: `auto`, `names`, `hash`, `tail` or `all`; see `data.sources`.
      valid_fraction: how much `hash` and `tail` hold out; their own default if None.
      cache_dir: where prepared data goes; see `corpus.cache_root`.
      workers: processes that tokenize; 0 for one a core.
      tokenizer_dir: a run's saved tokenizer, used instead of making one (not a config key).
    """
    if seq_len < 1:
        raise UserError(f"data.seq_len={seq_len}: must be at least 1.")
    if batch_size < 1:
        raise UserError(f"data.batch_size={batch_size}: must be at least 1.")
    corpus = open_corpus(
        source,
        feature=feature,
        tokenizer=tokenizer,
        split=split,
        valid_fraction=valid_fraction,
        cache_dir=cache_dir,
        workers=workers,
        tokenizer_dir=tokenizer_dir,
        manual_dir=manual_dir,
    )
    codec, stream = corpus.tokenizer, corpus.stream("train")
    made = objectives.make(
        objective,
        seq_len,
        codec,
        mask_rate=mask_rate,
        span_length=span_length,
        decoder_start=decoder_start,
        mask_unit=mask_unit,
        shuffle_sentences=shuffle_sentences,
    )
    train = Training(stream, made, batch_size, seed)
    _check_documents(train.laid, source, "train")
    if not train.laid.training:
        raise UserError(
            f"data.source={source!r} has {stream.size} training tokens, too few for one row of"
            f" data.seq_len={seq_len} and the token after it."
        )

    def evals(name: str, rows: int | None) -> Pass:
        found = Pass(corpus.stream(name), made, rows or batch_size)
        _check_documents(found.laid, source, name)
        # Of a row that is cut off most objectives predict nothing.
        short = isinstance(found.laid, Windows) and found.stream.size < made.window
        if short and not found.batch_at(0, slice(1))["weights"].any():
            raise UserError(
                f"data.source={source!r}: the split {name!r} has {found.stream.size} tokens, too few for one row of"
                f" data.seq_len={seq_len} and data.objective={objective!r}, which takes {made.window}."
            )
        return found

    plain = objective == "next"
    return Data(
        train=train,
        evals=evals,
        vocab_size=codec.vocab_size + made.added,
        tokenizer=codec,
        # Rates in bytes mean something only where every token is predicted from those before it.
        facts=corpus.told() if plain else without_bytes(corpus.facts),
        fingerprint=corpus.fingerprint if plain else f"{corpus.fingerprint} {objectives.fingerprint(made)}",
    )


def _check_documents(laid: Windows | Documents, source: str, split: str) -> None:
    """Refuse documents that give no pairs of segments: none is long enough, or one alone has no strangers."""
    if not isinstance(laid, Documents):
        return
    if not len(laid.sizes):
        raise UserError(
            f"data.source={source!r}: segments of one document need {SHORTEST} tokens of it; none of the split {split!r} has them."
        )
    if laid.objective.elsewhere and len(laid.sizes) < 2:
        raise UserError(
            f"data.objective='follow' needs documents that do not follow each other: data.source={source!r} has one in the split"
            f" {split!r}. Take 'order'."
        )


@dataclass(frozen=True)
class Training:
    """Endless rows of a window's tokens, as the objective has them.

    In each epoch the stream, or each document, is cut into windows at an offset drawn from (seed, epoch), and the windows come
    in an order drawn from it too, so that several epochs over a small corpus do not see the same rows.
    """

    stream: TokenStream
    objective: Objective
    batch_size: int
    seed: int
    num_batches: None = None

    @cached_property
    def laid(self) -> Windows | Documents:
        return laid(self.stream, self.objective)

    def batch_at(self, step: int, rows: Rows = slice(None)) -> Batch:
        epoch, index = epoch_records(step, self.batch_size, self.laid.training, self.seed, rows)
        return self.laid.batch(index, hash_ints(self.seed, 1, epoch), hash_ints(self.seed, 2, epoch, index))


@dataclass(frozen=True)
class Pass:
    """One pass in order. Predicting the next token, it predicts each one behind the leading end mark exactly once."""

    stream: TokenStream
    objective: Objective
    batch_size: int

    @cached_property
    def laid(self) -> Windows | Documents:
        return laid(self.stream, self.objective)

    @property
    def num_batches(self) -> int:
        return -(-self.laid.once // self.batch_size)

    def batch_at(self, step: int, rows: Rows = slice(None)) -> Batch:
        index = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)[rows]
        return self.laid.batch(index, np.zeros(index.shape, np.uint64), hash_ints(0, 3, index))


def laid(stream: TokenStream, objective: Objective) -> Windows | Documents:
    """Segments belong together in one document; other rows run on over the ends of documents."""
    return Documents.of(stream, objective) if isinstance(objective, SegmentPairs) else Windows(stream, objective)


@dataclass(frozen=True)
class Windows:
    """Rows that lie one behind the other in the stream, over the ends of documents."""

    stream: TokenStream
    objective: Objective

    @property
    def training(self) -> int:
        """Rows of an epoch, at any shift."""
        return (self.stream.size - self._room) // self.objective.window

    @property
    def once(self) -> int:
        """Rows of a pass, without a shift; the last one may be cut off."""
        return -(-(self.stream.size - 1) // self.objective.window)

    @property
    def _room(self) -> int:
        # A shift below it leaves the last window, and the token after it, inside the stream.
        return max(min(self.objective.window, self.stream.size - self.objective.window), 1)

    def batch(self, index: np.ndarray, shift: np.ndarray, seeds: np.ndarray) -> Batch:
        """Rows by their number (B,) int64; `shift` (B,) uint64, of which a remainder is how much later they all begin."""
        start = index * self.objective.window + (shift % np.uint64(self._room)).astype(np.int64)
        place = start[:, None] + np.arange(self.objective.window + 1, dtype=np.int64)[None]
        found = self.stream.at(np.minimum(place, self.stream.size - 1))
        return self.objective.batch(found, place < self.stream.size, seeds)
