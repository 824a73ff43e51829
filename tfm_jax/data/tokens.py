"""Language-model batches from a stream of tokens on disk, memory-mapped and vectorised. T length, N tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tfm_jax.data import objectives
from tfm_jax.data.build import TokenStream
from tfm_jax.data.corpus import open_corpus, without_bytes
from tfm_jax.data.index import epoch_records, hash_ints
from tfm_jax.data.noise import Objective
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
        (`prefix`; `prefix_lm` for models without an encoder), or masked tokens of two segments and whether they stand in their `order` (ALBERT) or `follow` each other
        (BERT), for `task.name=masked_pairs`; see `data.objectives`.
      mask_rate: share of the tokens that are hidden; 0.15, and 0.3 for `denoise`, if None.
      decoder_start: the id that a decoder begins with; the end mark if None.
      span_length: mean length of hidden stretches for `span` and `denoise`; 3 if None.
      mask_unit: what is hidden as a whole: a `token`, or a `word`.
      shuffle_sentences: share of the rows of `denoise` whose sentences are permuted.
      batch_size: rows of the global batch.
      seed: of the order of the rows.
      feature: which field of a record is the text, where there are several.
      manual_dir: the folder of files that a TFDS builder wants you to have.
      split: how files become train and validation: `auto`, `names`, `hash` or `tail`; see `data.sources`.
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
    if stream.size < made.window + 1:
        raise UserError(
            f"data.source={source!r} has {stream.size} training tokens, too few for one row of"
            f" data.seq_len={seq_len} and the token after it."
        )

    plain = objective == "next"
    return Data(
        train=Training(stream, made, batch_size, seed),
        evals=lambda name, rows: Pass(corpus.stream(name), made, rows or batch_size),
        vocab_size=codec.vocab_size + made.added,
        tokenizer=codec,
        # Rates in bytes mean something only where every token is predicted from those before it.
        facts=corpus.told() if plain else without_bytes(corpus.facts),
        fingerprint=corpus.fingerprint if plain else f"{corpus.fingerprint} {objectives.fingerprint(made)}",
    )


@dataclass(frozen=True)
class Training:
    """Endless rows of a window's tokens, as the objective has them.

    In each epoch the stream is cut into windows at an offset drawn from (seed, epoch), and the windows come in an order
    drawn from it too, so that several epochs over a small corpus do not see the same rows.
    """

    stream: TokenStream
    objective: Objective
    batch_size: int
    seed: int
    num_batches: None = None

    def batch_at(self, step: int, rows: Rows = slice(None)) -> Batch:
        # An offset below `room` leaves the last window, and the token after it, inside the stream.
        window = self.objective.window
        room = min(window, self.stream.size - window)
        windows = (self.stream.size - room) // window
        epoch, index = epoch_records(step, self.batch_size, windows, self.seed, rows)
        offset = (hash_ints(self.seed, 1, epoch) % np.uint64(room)).astype(np.int64)
        seeds = hash_ints(self.seed, 2, epoch, index)
        return _batch(self.stream, index * window + offset, self.objective, seeds)


@dataclass(frozen=True)
class Pass:
    """One pass in order. Predicting the next token, it predicts each one behind the leading end mark exactly once."""

    stream: TokenStream
    objective: Objective
    batch_size: int

    @property
    def num_batches(self) -> int:
        windows = -(-(self.stream.size - 1) // self.objective.window)
        return -(-windows // self.batch_size)

    def batch_at(self, step: int, rows: Rows = slice(None)) -> Batch:
        window = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)[rows]
        return _batch(self.stream, window * self.objective.window, self.objective, hash_ints(0, 3, window))


def _batch(stream: TokenStream, start: np.ndarray, objective: Objective, seeds: np.ndarray) -> Batch:
    place = start[:, None] + np.arange(objective.window + 1, dtype=np.int64)[None, :]
    if objective.elsewhere:
        # Another place of the stream for each row, drawn from the row's seed.
        far = (hash_ints(seeds.view(np.int64), 4) % np.uint64(max(stream.size - objective.elsewhere, 1))).astype(
            np.int64
        )
        place = np.concatenate([place, far[:, None] + np.arange(objective.elsewhere)[None, :]], axis=1)
    return objective.batch(stream.at(np.minimum(place, stream.size - 1)), place < stream.size, seeds)
