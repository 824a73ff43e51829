"""Questions whose answers are stretches of a text, in windows where the text is long. B batch, T length, N windows."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tfm_jax.data import rows
from tfm_jax.data.corpus import Corpus, cache_root, offsets, open_records
from tfm_jax.data.files import text_of
from tfm_jax.data.rows import Part, Texts, joined, width_for
from tfm_jax.data.types import Batch, Data, Dataset, Frame, Records
from tfm_jax.errors import UserError

log = logging.getLogger(__name__)


def make(
    *,
    source: str,
    question: str = "question",
    context: str = "context",
    answers: str = "answers",
    tokenizer: str = "bpe:4096",
    seq_len: int = 384,
    overlap: int = 128,
    longest_question: int = 64,
    batch_size: int = 16,
    seed: int = 0,
    manual_dir: str | None = None,
    split: str = "auto",
    valid_fraction: float | None = None,
    cache_dir: str | None = None,
    workers: int = 0,
    tokenizer_dir: str | None = None,
) -> Data:
    """The config section `data` for `name="questions"`, records as in SQuAD.

    A row is a question and a window of its context. A batch has the inputs `tokens` (B, T) int32, `valid` (B, T) bool, where the
    tokenizer tells two texts apart `token_types` (B, T) int32, the targets (B, 2) int32, first and last position of the first
    answer, both 0 in a window that has not all of it, and the weights (B,). T is as in `data.examples`.

    Args:
      source: `jsonl:GLOB`, `tfds:NAME` or `hf:DIR`; see `data.sources`.
      question, context: the fields of the texts.
      answers: the field with `text` and `answer_start` (in characters of the context), each a list.
      tokenizer: as for `data.tokens`.
      seq_len: longest row, marks included.
      overlap: tokens of the context that a window shares with the one before.
      longest_question: in tokens; what is longer is cut at its end.
      batch_size: rows of the global batch.
      seed: of the order of the windows.
      manual_dir: the folder of files that a TFDS builder wants you to have.
      split, valid_fraction, cache_dir, workers, tokenizer_dir: as for `data.tokens`.

    Raises:
      UserError: a field that the source lacks, or an answer that is not in its context where it says, with its place, in the
        train split or when another is asked for.
    """
    corpora = open_records(
        "questions",
        source,
        [question, context],
        at_least_one={"seq_len": seq_len, "batch_size": batch_size, "longest_question": longest_question},
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
    room = seq_len - len(frame.before) - len(frame.between) - len(frame.after) - longest_question
    if not 0 <= overlap < room:
        raise UserError(
            f"data.overlap={overlap}: must be at least 0, and below the {room} tokens of a context that data.seq_len={seq_len}"
            f" leaves beside data.longest_question={longest_question}."
        )
    root = cache_root(cache_dir)

    @functools.cache
    def made(name: str) -> _Windows:
        # Of splits that are asked for: a test set's answers may not be known.
        return _Windows.of(
            corpora[0].texts(name),
            corpora[1].texts(name),
            _records(corpora[1], name, context, answers),
            offsets(corpora[1], name, root),
            frame,
            seq_len,
            overlap,
            longest_question,
            codec.end_id,
        )

    def evals(name: str, size: int | None) -> Dataset:
        corpora[0].stream(name)
        return Pass(made(name), size or batch_size)

    facts = [corpora[0].fingerprint, corpora[1].fingerprint, answers, seq_len, overlap, longest_question]
    counts = {name: {"questions": found["documents"]} for name, found in corpora[0].facts.items()}
    counts["train"]["examples"] = len(made("train"))
    return Data(
        train=rows.Training(made("train"), batch_size, seed),
        evals=evals,
        vocab_size=codec.vocab_size,
        tokenizer=codec,
        facts=counts,
        fingerprint=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
        sizes={"types": 2} if frame.types else {},
    )


class Record(NamedTuple):
    """A question's context, and its answers with where they begin in it."""

    context: str
    answers: list[str]
    starts: list[int]


def _records(corpus: Corpus, split: str, context: str, answers: str) -> list[Record]:
    out = []
    for piece in corpus.pieces[split]:
        assert isinstance(piece, Records)
        for (_, value), (where, found) in zip(piece.values(context), piece.values(answers), strict=True):
            text = text_of(value, where, context)
            if not isinstance(found, Mapping) or not {"text", "answer_start"} <= set(found):
                raise UserError(f"{where}: the field {answers!r} is not a dict with 'text' and 'answer_start'.")
            for key in ("text", "answer_start"):
                if not isinstance(found[key], list | tuple | np.ndarray):
                    raise UserError(f"{where}: the field {answers!r} has {found[key]!r} as {key!r}, which is no list.")
            texts, starts = [text_of(x, where, answers) for x in found["text"]], [*found["answer_start"]]
            if wrong := [i for i in starts if not isinstance(i, int | np.integer)]:
                raise UserError(f"{where}: the field {answers!r} has the start {wrong[0]!r}, which is no whole number.")
            starts = [int(i) for i in starts]
            if not texts or len(texts) != len(starts):
                raise UserError(f"{where}: the field {answers!r} has {len(texts)} texts and {len(starts)} starts.")
            for answer, start in zip(texts, starts, strict=True):
                # A negative start would be counted from the context's end.
                if start < 0 or text[start : start + len(answer)] != answer or not answer.strip():
                    place = text.find(answer)
                    there = f"at {place}" if place >= 0 else "nowhere in it"
                    hint = f" It is {there if answer.strip() else 'blank'}."
                    raise UserError(f"{where}: the answer {answer!r} is not in its context at {start}.{hint}")
            out.append(Record(text, texts, starts))
    return out


@dataclass(frozen=True, eq=False)
class _Windows:
    """A split's windows: `owner` (N,) which question, `window` (N, 2) the context's tokens it has, `targets` (N, 2)."""

    question: Texts
    context: Texts
    records: Sequence[Record]
    offsets: Sequence[np.ndarray]
    frame: Frame
    seq_len: int
    longest_question: int
    pad: int
    owner: np.ndarray
    window: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(
        cls,
        question: Texts,
        context: Texts,
        records: Sequence[Record],
        offsets: Sequence[np.ndarray],
        frame: Frame,
        seq_len: int,
        overlap: int,
        longest_question: int,
        pad: int,
    ) -> _Windows:
        marks = len(frame.before) + len(frame.between) + len(frame.after)
        asked = np.minimum(question.sizes(np.arange(len(records))), longest_question)
        owner, window, targets = list[int](), list[tuple[int, int]](), list[tuple[int, int]]()
        for i, (record, places) in enumerate(zip(records, offsets, strict=True)):
            assert len(places) == context.sizes(np.array([i]))[0], "The context was tokenized otherwise."
            room = seq_len - marks - int(asked[i])
            begins, ends = record.starts[0], record.starts[0] + len(record.answers[0])
            # The tokens that have a part of the answer.
            inside = np.flatnonzero((places[:, 1] > begins) & (places[:, 0] < ends))
            before = len(frame.before) + int(asked[i]) + len(frame.between)
            start = 0
            while True:
                stop = min(start + room, len(places))
                owner.append(i)
                window.append((start, stop))
                held = len(inside) and start <= inside[0] and inside[-1] < stop
                targets.append((before + inside[0] - start, before + inside[-1] - start) if held else (0, 0))
                if stop == len(places):
                    break
                start += room - overlap
        return cls(
            question, context, records, offsets, frame, seq_len, longest_question, pad,
            np.array(owner), np.array(window), np.array(targets, np.int32),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.owner)

    def asked(self, index: np.ndarray) -> np.ndarray:
        return np.minimum(self.question.sizes(self.owner[index]), self.longest_question)

    def lengths(self, index: np.ndarray) -> np.ndarray:
        marks = len(self.frame.before) + len(self.frame.between) + len(self.frame.after)
        total: np.ndarray = self.asked(index) + np.diff(self.window[index], axis=1)[:, 0] + marks
        return total

    def batch(self, index: np.ndarray, whole: np.ndarray, inside: np.ndarray) -> Batch:
        width = width_for(int(self.lengths(whole).max()), self.seq_len)
        frame, owner, window = self.frame, self.owner[index], self.window[index]
        shown = self.context.stretch(owner, window[:, 1] - window[:, 0])
        parts: list[Part] = [
            frame.before,
            self.question.stretch(owner, self.asked(index)),
            frame.between,
            shown._replace(start=shown.start + window[:, 0]),
            frame.after,
        ]
        tokens, at = joined(parts, len(index), width, self.pad)
        place = np.arange(width)[None]
        valid = place < at[-1]
        inputs = {"tokens": tokens, "valid": valid}
        if frame.types:
            inputs["token_types"] = (valid & (place >= at[3])).astype(np.int32)
        return {"inputs": inputs, "targets": self.targets[index], "weights": inside.astype(np.float32)}


class Pass(rows.Pass):
    """One pass, and what an answer is made of."""

    def __init__(self, windows: _Windows, batch_size: int) -> None:
        super().__init__(windows, batch_size)
        self.windows = windows

    @property
    def references(self) -> list[list[str]]:
        """The answers to each question."""
        return [record.answers for record in self.windows.records]

    def shown(self, step: int) -> list[tuple[int, int, np.ndarray]]:
        """For each row of a batch, without those behind the last: its question, the position where the context begins, and
        where in the context's text the tokens from there stand, (n, 2) characters."""
        index, inside = self.places.at(step)
        out = []
        for i in index[inside]:
            owner, (start, stop) = int(self.windows.owner[i]), self.windows.window[i]
            before = len(self.windows.frame.before) + len(self.windows.frame.between)
            first = before + int(self.windows.asked(np.array([i]))[0])
            out.append((owner, first, self.windows.offsets[owner][start:stop]))
        return out

    def text(self, owner: int, start: int, stop: int) -> str:
        """Characters of a question's context."""
        return self.windows.records[owner].context[start:stop]
