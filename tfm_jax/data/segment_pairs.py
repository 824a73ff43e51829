"""Masked tokens of two segments, and how the segments belong together. B rows, W window, T length, D documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tfm_jax.data.build import TokenStream
from tfm_jax.data.index import hash_ints
from tfm_jax.data.noise import Mask, Objective, uniform
from tfm_jax.data.types import Batch, Frame
from tfm_jax.errors import UserError

Question = Literal["order", "follow"]
# Tokens of a document that two segments can be cut from.
SHORTEST = 8


@dataclass(frozen=True)
class SegmentPairs:
    """Two segments of one document, of W tokens together or all of a shorter one, with the tokenizer's marks around them, cut at
    a drawn place of the middle half.

    `order`: half of the rows have their segments swapped (Lan et al. 2020, section 3.1). `follow`: in half of the rows the
    second one is of another document, cut at the same share of its own stretch (Devlin et al. 2019, section 3.1); it is as long as
    both documents have tokens for, so that its length does not tell whose it is. The tokens between the marks are masked as by
    `Mask`; `valid` says where the row is, and `token_types` which segment where the tokenizer's texts have types. Targets are
    `tokens` (B, T), the original at every position, and `pair` (B,), 1 where the segments are swapped or strangers; weights (B, T)
    are above 0 at the masked tokens.
    """

    mask: Mask
    frame: Frame
    question: Question
    window: int
    shortest: int = SHORTEST

    @classmethod
    def of(cls, mask: Mask, frame: Frame, question: Question) -> SegmentPairs:
        """For rows as long as the mask's own, marks included."""
        window = mask.seq_len - len(frame.before) - len(frame.between) - len(frame.after)
        if window < SHORTEST:
            raise UserError(
                f"data.seq_len={mask.seq_len}: two segments and their marks need at least {SHORTEST - window} more."
            )
        # One without marks of its own takes a document's: nobody's model has learnt what its segments are.
        if not frame.types and frame[:3] != ([mask.end_id],) * 3:
            raise UserError(
                f"data.objective={question!r} needs a tokenizer that tells two segments apart, as BERT's do."
            )
        return cls(mask, frame, question, window)

    @property
    def added(self) -> int:
        return self.mask.added

    @property
    def elsewhere(self) -> int:
        return self.window if self.question == "follow" else 0

    def batch(self, tokens: np.ndarray, known: np.ndarray, seeds: np.ndarray) -> Batch:
        size, there = known[:, : self.window].sum(axis=1)[:, None], known[:, self.window + 1 :].sum(axis=1)[:, None]
        draws = uniform(seeds, 2, 5)
        cut, changed = _cut(size, draws[:, :1]), draws[:, 1:] < 0.5
        # Where each segment begins in `tokens`, and how long it is.
        if self.question == "order":
            first, first_size = np.where(changed, cut, 0), np.where(changed, size - cut, cut)
            second, second_size = np.where(changed, 0, cut), np.where(changed, cut, size - cut)
        else:
            far = _cut(there, draws[:, :1])
            first, first_size = np.zeros_like(cut), cut
            second, second_size = np.where(changed, self.window + 1 + far, cut), np.minimum(size - cut, there - far)
        around = (self.frame.before, self.frame.between, self.frame.after)
        before, between, after = (len(marks) for marks in around)
        at = np.arange(self.mask.seq_len)[None]
        middle = before + first_size
        other = middle + between
        last = other + second_size
        is_first, is_second, valid = (at >= before) & (at < middle), (at >= other) & (at < last), at < last + after
        source = np.where(is_first, at - before + first, np.where(is_second, at - other + second, 0))
        row = np.where(valid, np.take_along_axis(tokens, source, axis=1), self.mask.end_id)
        for begin, marks in zip((np.zeros_like(middle), middle, last), around, strict=True):
            for i, mark in enumerate(marks):
                row = np.where(at == begin + i, mark, row)
        row = row.astype(np.int32)
        shown, chosen = self.mask.hidden(row, seeds, is_first | is_second)
        types = {"token_types": ((at >= other) & valid).astype(np.int32)} if self.frame.types else {}
        return {
            "inputs": {"tokens": shown, **types, "valid": valid},
            "targets": {"tokens": row, "pair": changed[:, 0].astype(np.int32)},
            "weights": (chosen & (size >= self.shortest)).astype(np.float32),
        }


def _cut(size: np.ndarray, share: np.ndarray) -> np.ndarray:
    """A place of the middle half, at a share of it in [0, 1)."""
    quarter = size // 4
    place: np.ndarray = quarter + (share * (size - 2 * quarter + 1)).astype(np.int64)
    return place


@dataclass(frozen=True)
class Documents:
    """Rows of one document each: as many whole windows as it has, or one of all that there is of a shorter document."""

    stream: TokenStream
    objective: Objective
    begins: np.ndarray
    """(D,) int64, where each document of at least `SHORTEST` tokens begins."""
    sizes: np.ndarray
    """(D,) int64, their tokens."""
    rows: np.ndarray
    """(D + 1,) int64, the first row of each, and how many there are in all."""

    @classmethod
    def of(cls, stream: TokenStream, objective: Objective) -> Documents:
        # A stream begins with the end mark.
        edges = stream.places(int(stream.at(np.zeros(1, np.int64))[0]))
        sizes = np.diff(edges) - 1
        long = sizes >= SHORTEST
        rows = np.concatenate([[0], np.cumsum(np.maximum(sizes[long] // objective.window, 1))])
        return cls(stream, objective, edges[:-1][long] + 1, sizes[long], rows)

    @property
    def training(self) -> int:
        return int(self.rows[-1])

    @property
    def once(self) -> int:
        return int(self.rows[-1])

    def batch(self, index: np.ndarray, shift: np.ndarray, seeds: np.ndarray) -> Batch:
        window, total = self.objective.window, self.training
        row = np.minimum(index, total - 1)
        document = self._document(row)
        start, size = self._stretch(row, shift)
        # A row of any other document; of a single one, which nothing is asked about, its own.
        own, after = self.rows[document], self.rows[document + 1]
        others = np.maximum(total - (after - own), 1)
        far = (hash_ints(seeds.view(np.int64), 4) % others.astype(np.uint64)).astype(np.int64)
        far = np.where(far >= own, np.minimum(far + (after - own), total - 1), far)
        far_start, far_size = self._stretch(far, shift)
        size = np.where(index < total, size, 0)
        along, elsewhere = np.arange(window + 1)[None], np.arange(self.objective.elsewhere)[None]
        place = np.concatenate([start[:, None] + along, far_start[:, None] + elsewhere], axis=1)
        known = np.concatenate([along < size[:, None], elsewhere < far_size[:, None]], axis=1)
        return self.objective.batch(self.stream.at(np.minimum(place, self.stream.size - 1)), known, seeds)

    def _document(self, row: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.searchsorted(self.rows, row, side="right") - 1
        return found

    def _stretch(self, row: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where a row's tokens begin, and how many they are. What windows leave over of a document is before and behind them."""
        document, window = self._document(row), self.objective.window
        count = self.rows[document + 1] - self.rows[document]
        over = np.maximum(self.sizes[document] - count * window, 0).astype(np.uint64)
        begin = self.begins[document] + (shift % (over + np.uint64(1))).astype(np.int64)
        return begin + (row - self.rows[document]) * window, np.minimum(self.sizes[document], window)
