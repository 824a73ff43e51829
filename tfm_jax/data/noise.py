"""Rows of a token stream as examples: what is shown and what is predicted, in numpy, seeded row by row.

B rows, W window (tokens a row takes from the stream), S encoder length, T target length.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tfm_jax.data.index import hash_ints
from tfm_jax.data.spelling import Words
from tfm_jax.data.types import Batch
from tfm_jax.errors import UserError


class Objective(Protocol):
    """A row of a stream as an example."""

    @property
    def window(self) -> int:
        """W."""

    @property
    def added(self) -> int:
        """Ids that it needs behind the tokenizer's own."""

    @property
    def elsewhere(self) -> int:
        """Tokens of another document, drawn for each row, that it is given behind its own W + 1."""

    def batch(self, tokens: np.ndarray, known: np.ndarray, seeds: np.ndarray) -> Batch:
        """A batch from `tokens` (B, W + 1 + elsewhere) int32, the window and the token after it first.

        Args:
          known: of the same shape, bool, False past the end of the stream, or of a document where rows are of one.
          seeds: (B,) uint64; equal seeds give equal rows, in whatever batch they stand.
        """


def uniform(seeds: np.ndarray, size: int, tag: int) -> np.ndarray:
    """(B, size) float64 in [0, 1), a function of each row's seed and the tag."""
    bits = hash_ints(seeds.view(np.int64)[:, None], tag, np.arange(size)[None])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class Next:
    """Each token from those before it (causal language models)."""

    seq_len: int
    added: int = 0
    elsewhere: int = 0

    @property
    def window(self) -> int:
        return self.seq_len

    def batch(self, tokens: np.ndarray, known: np.ndarray, seeds: np.ndarray) -> Batch:
        return {
            "inputs": {"tokens": np.ascontiguousarray(tokens[:, :-1])},
            "targets": np.ascontiguousarray(tokens[:, 1:]),
            "weights": known[:, 1:].astype(np.float32),
        }


@dataclass(frozen=True)
class PrefixNext:
    """Each token from all of a row's beginning, up to a drawn place, and those before it (Raffel et al. 2020, section 3.2.1).

    `prefix` (B,) int32 says how long the beginning is, 1 to `seq_len` - 1, which is not predicted.
    """

    seq_len: int
    added: int = 0
    elsewhere: int = 0

    @property
    def window(self) -> int:
        return self.seq_len

    def batch(self, tokens: np.ndarray, known: np.ndarray, seeds: np.ndarray) -> Batch:
        plain, cut = Next(self.seq_len).batch(tokens, known, seeds), cuts(seeds, self.seq_len)
        later = np.arange(1, self.seq_len + 1)[None] >= cut
        inputs = {**plain["inputs"], "prefix": cut[:, 0].astype(np.int32)}
        return {**plain, "inputs": inputs, "weights": plain["weights"] * later.astype(np.float32)}


def cuts(seeds: np.ndarray, seq_len: int) -> np.ndarray:
    """(B, 1) int64, places uniform from 1 to `seq_len` - 1."""
    return 1 + (uniform(seeds, 1, 1) * (seq_len - 1)).astype(np.int64)


@dataclass(frozen=True)
class Mask:
    """Some tokens hidden, each to be told from all others (Devlin et al. 2019, section 3.1 and appendix A.1).

    Every token but the end mark is chosen with probability `rate`, anew in every epoch (Liu et al. 2019); 80 % of the
    chosen become the mask, 10 % a random token, 10 % stay. `targets` has the original at every position, `weights` is
    1 at the chosen ones.
    """

    seq_len: int
    end_id: int
    mask_id: int
    vocab_size: int
    rate: float
    words: Words | None = field(default=None, repr=False)
    """How words are told, where they are hidden as wholes (Cui et al. 2019)."""
    elsewhere: int = 0

    @property
    def window(self) -> int:
        return self.seq_len

    @property
    def added(self) -> int:
        return int(self.mask_id >= self.vocab_size)

    def batch(self, tokens: np.ndarray, known: np.ndarray, seeds: np.ndarray) -> Batch:
        tokens, whole = tokens[:, :-1], np.all(known[:, :-1], axis=1)
        shown, chosen = self.hidden(tokens, seeds, np.ones(tokens.shape, bool))
        return {
            "inputs": {"tokens": shown},
            "targets": np.ascontiguousarray(tokens),
            "weights": (chosen & whole[:, None]).astype(np.float32),
        }

    def hidden(self, tokens: np.ndarray, seeds: np.ndarray, may: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, T) tokens as they are shown, and which of them were chosen among those that may be."""
        length = tokens.shape[1]
        draws = uniform(seeds, length, 1)
        if self.words is not None:
            begins = self.words.begin(tokens) | (tokens == self.end_id)
            draws = np.take_along_axis(draws, np.cumsum(begins, axis=1) - 1, axis=1)
        chosen = (draws < self.rate) & (tokens != self.end_id) & may
        fate = uniform(seeds, length, 2)
        anything = (uniform(seeds, length, 3) * self.vocab_size).astype(np.int32)
        shown = np.where(fate < 0.8, np.int32(self.mask_id), np.where(fate < 0.9, anything, tokens))
        return np.where(chosen, shown, tokens).astype(np.int32), chosen


def span_sizes(seq_len: int, rate: float, length: float) -> tuple[int, int, int]:
    """(W, corrupted tokens, spans) such that what is left, one sentinel a span and an end mark fill `seq_len`."""

    def sizes(window: int) -> tuple[int, int]:
        noise = min(max(round(window * rate), 1), window - 1)
        return noise, max(1, min(round(noise / length), noise, window - noise))

    if seq_len < 3:
        raise UserError(f"data.seq_len={seq_len}: the objective 'span' needs at least 3.")
    window = seq_len

    def source(window: int) -> int:
        noise, spans = sizes(window)
        return window - noise + spans + 1

    window = seq_len
    while source(window + 1) <= seq_len:
        window += 1
    while source(window) > seq_len:
        window -= 1
    return window, *sizes(window)


@dataclass(frozen=True)
class Span:
    """Spans replaced by sentinels, to be spelled out (Raffel et al. 2020, section 3.1.4).

    The numbers of corrupted tokens and of spans are those of the rate, exactly, so that every row has the same shape:
    S = W - noise + spans + 1, T = noise + spans + 1, both with the end mark at their end.
    """

    window: int
    noise: int
    sentinels: tuple[int, ...]
    end_id: int
    start_id: int
    vocab_size: int
    elsewhere: int = 0

    @property
    def added(self) -> int:
        return sum(i >= self.vocab_size for i in self.sentinels)

    def batch(self, tokens: np.ndarray, known: np.ndarray, seeds: np.ndarray) -> Batch:
        tokens, whole = tokens[:, :-1], np.all(known[:, :-1], axis=1)
        rows, spans = len(tokens), len(self.sentinels)
        kept = _segments(self.window - self.noise, spans, uniform(seeds, self.window, 1))
        lost = _segments(self.noise, spans, uniform(seeds, self.window, 2))
        # Kept and lost stretches take turns, kept first.
        ends = np.cumsum(np.stack([kept, lost], axis=2).reshape(rows, -1), axis=1)
        stretch = (np.arange(self.window)[None, :, None] >= ends[:, None, :]).sum(axis=2)
        noisy = stretch % 2 == 1
        starts = noisy & (np.diff(stretch, axis=1, prepend=-1) > 0)
        marks = np.asarray(self.sentinels, np.int32)[stretch // 2]
        end = np.full((rows, 1), self.end_id, np.int32)
        source = np.where(starts, marks, tokens)[~noisy | starts].reshape(rows, -1)
        spelled = np.stack([marks, tokens], axis=2)[np.stack([starts, noisy], axis=2)].reshape(rows, -1)
        targets = np.concatenate([spelled, end], axis=1).astype(np.int32)
        weights = np.broadcast_to(whole[:, None], targets.shape).astype(np.float32)
        inputs = {
            "tokens": np.concatenate([source, end], axis=1).astype(np.int32),
            "decoder_tokens": _shifted(self.start_id, targets),
        }
        return {"inputs": inputs, "targets": targets, "weights": weights}


def _segments(items: int, count: int, noise: np.ndarray) -> np.ndarray:
    """(B, count) lengths of at least 1 that add up to `items`, every way being as likely."""
    cuts = np.sort(np.argsort(noise[:, : items - 1], axis=1, kind="stable")[:, : count - 1], axis=1) + 1
    edges = np.concatenate([np.zeros((len(noise), 1), np.int64), cuts, np.full((len(noise), 1), items)], axis=1)
    return np.diff(edges, axis=1)


# A full stop and what closes behind it: straight quotes, brackets, and in UTF-8 the right quotes, single, double and angled. The
# second of two straight quotes opens what follows, where WordPiece has left out the space between them.
_STOP = re.compile(rb"""[.!?]+(?:(?<!")"|(?<!')'|[)\]}]|\xe2\x80[\x99\x9d]|\xc2\xbb)*""")


@dataclass(frozen=True)
class Denoise:
    """The text from itself with stretches hidden behind one mask each (Lewis et al. 2020, "text infilling"), of some rows with
    the sentences of each document in a drawn order ("sentence permutation").

    Stretches of Poisson(`length`) tokens, until `rate` of them are hidden; a stretch of none inserts a mask. The
    source is padded to S, which leaves room for such masks; `valid` says where it is.
    """

    seq_len: int
    end_id: int
    start_id: int
    mask_id: int
    vocab_size: int
    rate: float
    length: float
    shuffled: float = 0.0
    """The share of the rows whose sentences are permuted."""
    spelled: tuple[bytes, ...] = field(default=(), repr=False)
    """What each id adds to a text, in UTF-8, where sentences are permuted."""
    elsewhere: int = 0

    @property
    def window(self) -> int:
        return self.seq_len

    @property
    def added(self) -> int:
        return int(self.mask_id >= self.vocab_size)

    def batch(self, tokens: np.ndarray, known: np.ndarray, seeds: np.ndarray) -> Batch:
        targets, whole = np.ascontiguousarray(tokens[:, :-1]), np.all(known[:, :-1], axis=1)
        source = np.full(targets.shape, self.end_id, np.int32)
        valid = np.zeros(targets.shape, bool)
        for row, seed in enumerate(seeds):
            rng = np.random.Generator(np.random.Philox(key=int(seed)))
            text = targets[row]
            if self.shuffled and rng.random() < self.shuffled:
                text = self.permuted(text, rng)
            found = self._source(text, rng)
            source[row, : len(found)], valid[row, : len(found)] = found, True
        weights = np.broadcast_to(whole[:, None], targets.shape).astype(np.float32)
        inputs = {"tokens": source, "valid": valid, "decoder_tokens": _shifted(self.start_id, targets)}
        return {"inputs": inputs, "targets": targets, "weights": weights}

    def permuted(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A row (T,) with each document's sentences, whole or cut by the row's edges, in a drawn order; end marks stay."""
        out = tokens.copy()
        edges = [-1, *np.flatnonzero(tokens == self.end_id), len(tokens)]
        for before, after in itertools.pairwise(edges):
            text = tokens[before + 1 : after]
            sentences = np.split(text, self._ends(text))
            out[before + 1 : after] = np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])
        return out

    def _ends(self, tokens: np.ndarray) -> np.ndarray:
        """Behind which tokens of a text a sentence ends: the last that ends in a full stop or what closes behind it."""
        spelled = [self.spelled[i] for i in tokens]
        places = np.cumsum([len(text) for text in spelled])
        found = np.array([stop.span() for stop in _STOP.finditer(b"".join(spelled))], np.int64).reshape(-1, 2)
        least, most = np.searchsorted(places, found[:, 0] + 1), np.searchsorted(places, found[:, 1], side="right") - 1
        return most[most >= least] + 1

    def _source(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        budget = max(1, round(self.rate * len(tokens)))
        drawn = rng.poisson(self.length, 4 * budget + 8)
        # Some are empty: more stretches than hidden tokens would make the source, with a mark for each, longer than the text.
        count = min(int(np.searchsorted(np.cumsum(drawn), budget)) + 1, budget)
        lengths = drawn[:count].copy()
        beyond = int(lengths.sum()) - budget
        if beyond > 0:
            lengths[-1] -= beyond
        else:
            lengths += rng.multinomial(-beyond, np.full(count, 1 / count))
        rng.shuffle(lengths)
        # Each stretch stands in one of the gaps between the tokens that stay.
        gaps = np.sort(rng.integers(0, len(tokens) - budget + 1, count))
        starts = gaps + np.cumsum(lengths) - lengths
        pieces: list[np.ndarray] = []
        before = 0
        for start, size in zip(starts, lengths, strict=True):
            pieces += [tokens[before:start], np.array([self.mask_id], np.int32)]
            before = start + size
        return np.concatenate([*pieces, tokens[before:]])


@dataclass(frozen=True)
class Continue:
    """The second half of a window from the first, S = T = `seq_len` (sequence to sequence without a parallel text)."""

    seq_len: int
    start_id: int
    added: int = 0
    elsewhere: int = 0

    @property
    def window(self) -> int:
        return 2 * self.seq_len

    def batch(self, tokens: np.ndarray, known: np.ndarray, seeds: np.ndarray) -> Batch:
        source, targets = np.split(tokens[:, :-1], 2, axis=1)
        inputs = {"tokens": np.ascontiguousarray(source), "decoder_tokens": _shifted(self.start_id, targets)}
        weights = known[:, self.seq_len : -1] & known[:, self.seq_len - 1 : self.seq_len]
        return {"inputs": inputs, "targets": np.ascontiguousarray(targets), "weights": weights.astype(np.float32)}


@dataclass(frozen=True)
class Prefix:
    """The rest of a window from its beginning, cut at a drawn place (Raffel et al. 2020, section 3.2.3); S = T = `seq_len`.

    `valid` says where the source is, the weights where the targets are.
    """

    seq_len: int
    end_id: int
    start_id: int
    added: int = 0
    elsewhere: int = 0

    @property
    def window(self) -> int:
        return self.seq_len

    def batch(self, tokens: np.ndarray, known: np.ndarray, seeds: np.ndarray) -> Batch:
        tokens, whole = tokens[:, :-1], np.all(known[:, :-1], axis=1)
        cut = cuts(seeds, self.seq_len)
        place = np.arange(self.seq_len)[None]
        valid, asked = place < cut, place < self.seq_len - cut
        later = np.take_along_axis(tokens, np.minimum(place + cut, self.seq_len - 1), axis=1)
        targets = np.where(asked, later, self.end_id).astype(np.int32)
        inputs = {
            "tokens": np.where(valid, tokens, self.end_id).astype(np.int32),
            "valid": valid,
            "decoder_tokens": _shifted(self.start_id, targets),
        }
        return {"inputs": inputs, "targets": targets, "weights": (asked & whole[:, None]).astype(np.float32)}


def _shifted(start_id: int, targets: np.ndarray) -> np.ndarray:
    """What a decoder is given: the targets one place later, behind its first token."""
    start = np.full((len(targets), 1), start_id, np.int32)
    return np.concatenate([start, targets[:, :-1]], axis=1).astype(np.int32)
