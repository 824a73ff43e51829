"""Batches whose rows go on from step to step, for models with a memory. T segment length, B rows, N tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tfm_jax.data.build import TokenStream
from tfm_jax.data.corpus import open_corpus
from tfm_jax.data.index import hash_ints
from tfm_jax.data.types import Batch, Data, Rows
from tfm_jax.errors import UserError


def make(
    *,
    source: str,
    tokenizer: str = "bpe:4096",
    seq_len: int = 256,
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
    """The config section `data` for `name="segments"`: the corpus of `name="tokens"`, each row a stretch of it.

    The inputs are `tokens` (B, T) and `fresh` (B,) bool, true where a row begins somewhere else.

    Args:
      seq_len: T, tokens of each row in a batch.
      batch_size: B, the number of stretches that are read side by side.
      seed: of where the epochs are cut.
      source, tokenizer, feature, manual_dir, split, valid_fraction, cache_dir, workers, tokenizer_dir: see `data.tokens`.
    """
    for key, value in (("seq_len", seq_len), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"data.{key}={value}: must be at least 1.")
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
    stream = corpus.stream("train")
    if stream.size <= batch_size * seq_len:
        raise UserError(
            f"data.source={source!r} has {stream.size} training tokens, too few for data.batch_size={batch_size} rows of"
            f" data.seq_len={seq_len} and the token after them."
        )

    return Data(
        train=Training(stream, seq_len, batch_size, seed),
        evals=lambda name, rows: Pass(corpus.stream(name), seq_len, rows or batch_size),
        vocab_size=corpus.tokenizer.vocab_size,
        tokenizer=corpus.tokenizer,
        facts=corpus.told(),
        fingerprint=corpus.fingerprint,
    )


@dataclass(frozen=True)
class Training:
    """Endless: an epoch is the stream cut into B stretches of equally many segments, one of each a step.

    Each epoch is cut at an offset drawn from (seed, epoch), so that several over a small corpus differ.
    """

    stream: TokenStream
    seq_len: int
    batch_size: int
    seed: int
    num_batches: None = None

    def batch_at(self, step: int, rows: Rows = slice(None)) -> Batch:
        across = self.batch_size * self.seq_len
        # An offset below `room` leaves the last segment, and the token after it, inside the stream.
        room = min(self.seq_len, self.stream.size - across)
        segments = (self.stream.size - room) // across
        epoch, segment = divmod(step, segments)
        offset = int(hash_ints(self.seed, 1, epoch)[0] % np.uint64(room))
        row = np.arange(self.batch_size, dtype=np.int64)[rows]
        start = offset + (row * segments + segment) * self.seq_len
        return _batch(self.stream, start, np.full(row.shape, self.stream.size), self.seq_len, segment == 0)


@dataclass(frozen=True)
class Pass:
    """One pass that predicts each token behind the leading end mark exactly once, in B stretches side by side.

    More rows are faster; fewer leave fewer tokens at the beginning of a stretch, where there is no memory yet.
    """

    stream: TokenStream
    seq_len: int
    batch_size: int

    @property
    def _stretch(self) -> int:
        """Tokens to predict in a row; the last rows may have fewer."""
        return -(-(self.stream.size - 1) // self.batch_size)

    @property
    def num_batches(self) -> int:
        return -(-self._stretch // self.seq_len)

    def batch_at(self, step: int, rows: Rows = slice(None)) -> Batch:
        row = np.arange(self.batch_size, dtype=np.int64)[rows]
        # The token at a stretch's end is predicted in it, and leads the next one.
        stop = np.minimum((row + 1) * self._stretch + 1, self.stream.size)
        return _batch(self.stream, row * self._stretch + step * self.seq_len, stop, self.seq_len, step == 0)


def _batch(stream: TokenStream, start: np.ndarray, stop: np.ndarray, seq_len: int, fresh: bool) -> Batch:
    """Tokens from `start` and those that follow them, each (rows,) of places; what lies at `stop` weighs nothing."""
    place = start[:, None] + np.arange(seq_len + 1, dtype=np.int64)[None, :]
    found = stream.at(np.minimum(place, stream.size - 1))
    return {
        "inputs": {"tokens": np.ascontiguousarray(found[:, :-1]), "fresh": np.full(start.shape, fresh)},
        "targets": np.ascontiguousarray(found[:, 1:]),
        "weights": (place[:, 1:] < stop[:, None]).astype(np.float32),
    }
