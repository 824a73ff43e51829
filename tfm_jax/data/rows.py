"""Rows put together from marks and stretches of token streams, and the order in which examples of all lengths come.

B batch, T length, N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from tfm_jax.data.build import TokenStream
from tfm_jax.data.index import epoch_records, hash_ints, permute
from tfm_jax.data.types import Batch, Rows

SHORTEST = 8
POOL = 16
"""Batches whose rows are sorted by length together, so that a batch's rows are about equally long. Not many more: a small
classifier from scratch, whose 37 batches an epoch were 37 slices of length, learnt nothing in the steps that it needs otherwise."""


class Texts(NamedTuple):
    """The documents of a stream: `edges` (N + 1,), where the end marks stand before the first and behind each."""

    stream: TokenStream
    edges: np.ndarray

    @classmethod
    def of(cls, stream: TokenStream, end_id: int) -> Texts:
        return cls(stream, stream.places(end_id))

    def sizes(self, index: np.ndarray) -> np.ndarray:
        found: np.ndarray = self.edges[index + 1] - self.edges[index] - 1
        return found

    def stretch(self, index: np.ndarray, sizes: np.ndarray) -> Stretch:
        """The beginnings of some documents."""
        return Stretch(self.stream, self.edges[index] + 1, sizes)


class Stretch(NamedTuple):
    """For each row, `size` (B,) tokens of a stream from `start` (B,) on."""

    stream: TokenStream
    start: np.ndarray
    size: np.ndarray


Part = Sequence[int] | Stretch


def joined(parts: Sequence[Part], rows: int, width: int, pad: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """(B, T) int32 rows of marks and stretches one behind the other, and (B, 1) where each part begins and the last ends."""
    place = np.arange(width)[None]
    tokens = np.full((rows, width), pad, np.int32)
    at = [np.zeros((rows, 1), np.int64)]
    for part in parts:
        if isinstance(part, Stretch):
            size = part.size[:, None]
            here = (place >= at[-1]) & (place < at[-1] + size)
            found = part.stream.at(np.where(here, part.start[:, None] + place - at[-1], 0))
            tokens = np.where(here, found, tokens)
            at.append(at[-1] + size)
        else:
            for i, mark in enumerate(part):
                tokens = np.where(place == at[-1] + i, np.int32(mark), tokens)
            at.append(at[-1] + len(part))
    return tokens, at


def width_for(longest: int, limit: int) -> int:
    """T of a batch: the smallest of the limit, 3/4, 1/2, 3/8, 1/4 of it and so on that takes its longest row, halves of halves
    from 8 on and three quarters from 16 on. Few enough to compile a program for each; halves alone would leave a third more padding."""
    need, width = max(longest, SHORTEST), limit
    while width // 2 >= need:
        width //= 2
    shorter = width * 3 // 4
    return shorter if shorter >= max(need, 2 * SHORTEST) else width


def pooled(step: int, batch_size: int, size: int, seed: int, lengths: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """(batch_size,) examples of a training step.

    Each epoch has an order drawn from (seed, epoch); `POOL` batches at a time are sorted by length and taken in a drawn
    order.
    """
    pool, place = divmod(step, POOL)
    epoch, records = epoch_records(pool, POOL * batch_size, size, seed)
    # By epoch first: an example of two epochs would come to stand beside itself.
    order = np.lexsort((lengths(records), epoch)).reshape(POOL, batch_size)
    mine: np.ndarray = records[order[permute(np.array([place]), POOL, hash_ints(seed, 4, pool).view(np.int64))[0]]]
    return mine


class Places(NamedTuple):
    """One pass over examples in a given order, `batch_size` at a time."""

    order: np.ndarray
    batch_size: int

    @property
    def num_batches(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def at(self, step: int, rows: Rows = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Which examples the rows are, and (B,) bool, False for rows behind the last one."""
        place = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)[rows]
        inside = place < len(self.order)
        return self.order[np.where(inside, place, 0)], inside


class Examples(Protocol):
    """A split whose examples are of all lengths."""

    def __len__(self) -> int: ...

    def lengths(self, index: np.ndarray) -> np.ndarray:
        """What examples are sorted by, (B,)."""

    def batch(self, index: np.ndarray, whole: np.ndarray, inside: np.ndarray) -> Batch:
        """Rows for some examples, as wide as the `whole` global batch of them needs; without weight where not `inside`."""


@dataclass(frozen=True)
class Training:
    """Endless examples; see `pooled`."""

    examples: Examples
    batch_size: int
    seed: int
    num_batches: None = None

    def batch_at(self, step: int, rows: Rows = slice(None)) -> Batch:
        whole = pooled(step, self.batch_size, len(self.examples), self.seed, self.examples.lengths)
        return self.examples.batch(whole[rows], whole, np.ones(len(whole[rows]), bool))


class Pass:
    """One pass, the shortest examples first."""

    def __init__(self, examples: Examples, batch_size: int) -> None:
        self.batch_size, self._examples = batch_size, examples
        self.places = Places(np.argsort(examples.lengths(np.arange(len(examples))), kind="stable"), batch_size)

    @property
    def num_batches(self) -> int:
        return self.places.num_batches

    def batch_at(self, step: int, rows: Rows = slice(None)) -> Batch:
        index, inside = self.places.at(step, rows)
        return self._examples.batch(index, self.places.at(step)[0], inside)
