"""Masked tokens of two segments, and how the segments belong together. B rows, W window, T length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tfm_jax.data.noise import Mask, uniform
from tfm_jax.data.types import Batch, Frame
from tfm_jax.errors import UserError

Question = Literal["order", "follow"]


@dataclass(frozen=True)
class SegmentPairs:
    """Two segments of W tokens together, with the tokenizer's marks around them, cut at a drawn place of the middle half.

    `order`: half of the rows have their segments swapped (Lan et al. 2020, section 3.1). `follow`: in half of the rows the
    second one is of another place of the corpus (Devlin et al. 2019, section 3.1). The tokens between the marks are masked
    as by `Mask`. Targets are `tokens` (B, T), the original at every position, and `pair` (B,), 1 where the segments are
    swapped or strangers; weights (B, T) are above 0 at the masked tokens.
    """

    mask: Mask
    frame: Frame
    question: Question
    window: int

    @classmethod
    def of(cls, mask: Mask, frame: Frame, question: Question) -> SegmentPairs:
        """For rows as long as the mask's own, marks included."""
        window = mask.seq_len - len(frame.before) - len(frame.between) - len(frame.after)
        if window < 8:
            raise UserError(
                f"data.seq_len={mask.seq_len}: two segments and their marks need at least {8 - window} more."
            )
        if not frame.types:
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
        own, other = tokens[:, : self.window], tokens[:, self.window + 1 :]
        whole = np.all(known[:, : self.window], axis=1)
        quarter = self.window // 4
        draws = uniform(seeds, 2, 5)
        cut = (quarter + draws[:, 0] * (self.window - 2 * quarter + 1)).astype(np.int64)[:, None]
        changed = draws[:, 1] < 0.5
        place = np.arange(self.window)[None]
        first = cut
        if self.question == "order":
            # Swapped, the row begins where it was cut.
            first = np.where(changed[:, None], self.window - cut, cut)
            text = np.take_along_axis(own, np.where(changed[:, None], (place + cut) % self.window, place), axis=1)
        else:
            text = np.where(changed[:, None] & (place >= cut), other, own)
        frame = self.frame
        between, after = len(frame.between), len(frame.after)
        before = len(frame.before)
        at = np.arange(self.mask.seq_len)[None]
        middle = before + first
        is_first, is_second = (
            (at >= before) & (at < middle),
            (at >= middle + between) & (at < before + self.window + between),
        )
        source = np.where(is_first, at - before, np.where(is_second, at - before - between, 0))
        row = np.take_along_axis(text, source, axis=1)
        for i, mark in enumerate(frame.before):
            row = np.where(at == i, np.int32(mark), row)
        for i, mark in enumerate(frame.between):
            row = np.where(at == middle + i, np.int32(mark), row)
        for i, mark in enumerate(frame.after):
            row = np.where(at == self.mask.seq_len - after + i, np.int32(mark), row)
        row = row.astype(np.int32)
        shown, chosen = self.mask.hidden(row, seeds, is_first | is_second)
        types = (at >= middle + between).astype(np.int32)
        return {
            "inputs": {"tokens": shown, "token_types": np.broadcast_to(types, row.shape).copy()},
            "targets": {"tokens": row, "pair": changed.astype(np.int32)},
            "weights": (chosen & whole[:, None]).astype(np.float32),
        }
