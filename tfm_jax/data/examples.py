"""Labelled texts, alone or in pairs, one a row. B batch, T length, N examples."""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tfm_jax.data.corpus import Corpus, cache_root, open_records
from tfm_jax.data.locks import once
from tfm_jax.data.rows import Part, Pass, Texts, Training, joined, width_for
from tfm_jax.data.types import Batch, Data, Dataset, Frame, Records
from tfm_jax.errors import UserError, nearest

log = logging.getLogger(__name__)
Kind = Literal["class", "number"]


def make(
    *,
    source: str,
    text: str = "text",
    pair: str | None = None,
    pair_as: Literal["joined", "apart"] = "joined",
    label: str | None = "label",
    kind: Kind = "class",
    names: Sequence[Any] | None = None,
    predictions: str | None = None,
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
    `token_types` (B, T) int32, and where there are labels the targets (B,), int32 classes or float32 numbers. T is `seq_len`,
    or 3/4, 1/2, 3/8 of it and so on, as the batch's longest row allows (`rows.width_for`): one compiled program for each of the
    few lengths.
    Texts that stay apart are `inputs` and `other`, of one length, each as above.

    Args:
      source: `jsonl:GLOB`, `tfds:NAME` or `hf:DIR`; see `data.sources`.
      text: the field that is the text.
      pair: the field of a second text.
      pair_as: whether the two are `joined` in one row, or stay `apart`, for a task that compares them.
      label: the field to predict; None for texts that only belong together, or whose labels are not known, for
        `python -m experiments.predict`: their batches have no targets.
      names: the classes in their order, each once; those of the train split, sorted, if None, and kept with the run. Labels
        may be their places in it instead, from 0, where no name is a number itself.
      predictions: a `.npy` of what a teacher predicts for each example of the train split, in its order, (N, C) float, as
        `python -m experiments.predict` writes it, and beside it a `.about.json` with its classes and a digest of the texts,
        which are compared; a training batch then has it as `teacher`.
      kind: `class`, whose names or numbers are those of the train split, or a finite `number`.
      tokenizer: as for `data.tokens`.
      seq_len: longest row, marks included; of longer examples the longer text is cut at its end.
      batch_size: rows of the global batch.
      seed: of the order of the examples.
      manual_dir: the folder of files that a TFDS builder wants you to have.
      split, valid_fraction, cache_dir, workers, tokenizer_dir: as for `data.tokens`.

    Raises:
      UserError: a field that the source lacks; a label that is no class of the train split or no number, with its place, in
        the train split or when another is asked for.
    """
    corpora = open_records(
        "examples",
        source,
        [text] if pair is None else [text, pair],
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
    apart = pair_as == "apart"
    if apart and pair is None:
        raise UserError("data.pair_as='apart': there is no second text. Set data.pair=FIELD.")
    marks = len(frame.before) + len(frame.after) + (0 if pair is None or apart else len(frame.between))
    needed = 1 if apart else len(corpora)
    if seq_len < marks + needed:
        raise UserError(f"data.seq_len={seq_len}: the marks alone take {marks}, and each text at least one more.")
    root = cache_root(cache_dir)
    counts = {name: found["documents"] for name, found in corpora[0].facts.items()}
    if names is not None and kind != "class":
        raise UserError(f"data.names={tuple(names)}: a number has no classes. Leave it out.")
    known = named_once(names, "class")
    classes = list[Any]()
    if kind == "class" and label is not None:
        classes = known
        if not known:
            found = _labels(corpora[0], "train", label, root)
            classes, times = _classes(found, corpora[0], label), collections.Counter(found)
            # A misspelt label of the train split is a class of its own.
            said = ", ".join(f"{name} {times[name]}" for name in classes[:20]) + (", ..." if len(classes) > 20 else "")
            log.info("labels: %d classes in the train split: %s.", len(classes), said)

    def texts(name: str) -> str:
        return _digest(corpora, name, [text] if pair is None else [text, pair], root)

    told = None if predictions is None else _told(predictions, counts["train"], classes, texts)

    @functools.cache
    def made(name: str) -> _Examples | _Apart:
        # Of splits that are asked for: GLUE's test sets have labels that are none.
        given = None if label is None else _labels(corpora[0], name, label, root)
        targets = None if given is None else _targets(given, kind, classes, corpora[0], name, str(label))
        teacher = told if name == "train" else None

        def of(*corpora: Corpus) -> _Examples:
            texts = tuple(corpus.texts(name) for corpus in corpora)
            return _Examples(texts, targets, frame, seq_len, codec.end_id, teacher)

        return _Apart(*(of(corpus) for corpus in corpora)) if apart else of(*corpora)

    def evals(name: str, rows: int | None) -> Dataset:
        corpora[0].stream(name)
        return Pass(made(name), rows or batch_size)

    facts = [corpora[0].fingerprint, *(c.fingerprint for c in corpora[1:]), label, kind, classes, seq_len]
    facts += ["apart"] if apart else []
    digest = "" if told is None else hashlib.sha256(np.ascontiguousarray(told).tobytes()).hexdigest()
    sizes = {"classes": len(classes) if kind == "class" else 1} if label is not None else {}
    return Data(
        train=Training(made("train"), batch_size, seed),
        evals=evals,
        vocab_size=codec.vocab_size,
        tokenizer=codec,
        facts={name: {"examples": count} for name, count in counts.items()},
        fingerprint=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
        filled_in={"names": classes} if label is not None and kind == "class" else {},
        told=digest,
        texts=texts,
        sizes=sizes | ({"types": 2} if pair is not None and not apart and frame.types else {}),
    )


def same_classes(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """Whether two list the same names in the same order, but for their case."""
    return [str(name).casefold() for name in ours] == [str(name).casefold() for name in theirs]


def named_once(names: Sequence[str] | None, what: str) -> list[str]:
    """`data.names`, of which each stands there once."""
    known = list(names or ())
    if twice := [name for i, name in enumerate(known) if name in known[:i]]:
        raise UserError(f"data.names={tuple(known)}: {twice[0]!r} stands there twice. Name each {what} once.")
    return known


def _digest(corpora: Sequence[Corpus], split: str, fields: Sequence[str], root: Path) -> str:
    """Of a split's texts, one after the other; read once and kept beside the labels."""
    about = hashlib.sha256(json.dumps([split, *fields]).encode()).hexdigest()[:16]

    def read() -> bytes:
        found = hashlib.sha256()
        for corpus, field in zip(corpora, fields, strict=True):
            log.info("texts: reading the field %r of %s, %s.", field, corpus.source, split)
            for _, value in _placed(corpus, split, field):
                found.update(json.dumps(value).encode())
        return found.hexdigest().encode()

    return once(root / "labels" / f"{corpora[0].fingerprint}-{about}.sha256", read).decode()


def _told(path: str, examples: int, classes: Sequence[Any], texts: Callable[[str], str]) -> np.ndarray:
    """A teacher's predictions for the train split, (N, C) float32, of the same classes and texts as far as it has told them."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"data.predictions={path!r}: there is no such file. python -m experiments.predict writes it.")
    try:
        found: np.ndarray = np.load(file, allow_pickle=False)
    except ValueError:
        raise UserError(
            f"data.predictions={path!r} is no array: python -m experiments.predict --to FILE.npy writes one."
        ) from None
    if found.ndim == 1:
        raise UserError(
            f"data.predictions={path!r} holds numbers {found.shape}, and a student learns from logits (N, C). One that is"
            " to predict numbers learns from the teacher itself: task.teacher=RUN."
        )
    if found.ndim != 2 or len(found) != examples:
        raise UserError(f"data.predictions={path!r} is {found.shape}, and the train split has {examples} examples.")
    if (wrong := np.flatnonzero(~np.isfinite(found).all(axis=1))).size:
        raise UserError(f"data.predictions={path!r}: row {wrong[0]} has a number that is not finite.")
    said = file.with_suffix(".about.json")
    if not said.is_file():
        log.warning("data.predictions=%r: no %s beside it says which classes and texts these are of.", path, said.name)
        return found.astype(np.float32)
    about = json.loads(said.read_text())
    names = about["names"]
    if about["texts"] != texts("train"):
        raise UserError(
            f"data.predictions={path!r} is of other texts, or of these in another order, as {said.name} says: make it of this"
            " data's train split."
        )
    if classes and not same_classes(names, classes):
        raise UserError(
            f"data.predictions={path!r} is of the classes {names}, as {said.name} says, and here they are {[*classes]}: set"
            " data.names in the teacher's order."
        )
    return found.astype(np.float32)


def _labels(corpus: Corpus, split: str, field: str, root: Path) -> list[Any]:
    """What each record has in a field, as JSON has it; read once and kept beside the tokens."""
    path = root / "labels" / f"{corpus.fingerprint}-{hashlib.sha256(f'{split} {field}'.encode()).hexdigest()[:16]}.json"

    def read() -> bytes:
        log.info("labels: reading the field %r of %s, %s.", field, corpus.source, split)
        return json.dumps(list(_values(corpus, split, field))).encode()

    found: list[Any] = json.loads(once(path, read))
    return found


def _values(corpus: Corpus, split: str, field: str) -> Iterator[Any]:
    return (value for _, value in _placed(corpus, split, field))


def _place(corpus: Corpus, split: str, field: str, number: int) -> str:
    """Where a label stands, for an error."""
    return next(where for where, _ in itertools.islice(_placed(corpus, split, field), number, None))


def _placed(corpus: Corpus, split: str, field: str) -> Iterator[tuple[str, Any]]:
    for piece in corpus.pieces[split]:
        assert isinstance(piece, Records)
        for where, value in piece.values(field):
            plain = value.item() if isinstance(value, np.generic) else value
            plain = plain.decode("utf-8", "replace") if isinstance(plain, bytes) else plain
            if not isinstance(plain, str | int | float):
                raise UserError(f"{where}: the field {field!r} is a {type(plain).__name__}, not a label.")
            yield where, plain


def _classes(labels: Sequence[Any], corpus: Corpus, field: str) -> list[Any]:
    """The train split's: sorted names, or all whole numbers from 0."""
    named = isinstance(labels[0], str)
    for i, value in enumerate(labels):
        if isinstance(value, str) != named:
            wrong = f"stands beside {labels[0]!r}: classes are all names or all numbers."
        elif isinstance(value, float) and not value.is_integer():
            wrong = "is not a whole number; is it a number to predict (data.kind=number)?"
        elif not named and value < 0:
            wrong = "is a class below 0."
        else:
            continue
        raise UserError(f"{_place(corpus, 'train', field, i)}: {value!r} in the field {field!r} {wrong}")
    return sorted(set(labels)) if named else list(range(int(max(labels)) + 1))


def _targets(
    labels: Sequence[Any], kind: Kind, classes: Sequence[Any], corpus: Corpus, split: str, field: str
) -> np.ndarray:
    if kind == "number":
        largest = float(np.finfo(np.float32).max)
        for i, value in enumerate(labels):
            # NaN compares with nothing.
            if isinstance(value, str) or not abs(value) <= largest:
                raise UserError(
                    f"{_place(corpus, split, field, i)}: the field {field!r} is {value!r}, not a finite number (float32)."
                )
        return np.asarray(labels, np.float32)
    number: dict[Any, int] = {name: i for i, name in enumerate(classes)}
    values = [_value(name) for name in classes]
    # Among names that are numbers, or write one, a place would be another class's name, or hide a label that is none.
    numbered = {value: i for i, value in enumerate(values) if value is not None}
    number = (numbered or {i: i for i in range(len(classes))}) | number
    for i, value in enumerate(labels):
        if value not in number:
            hint = nearest(str(value), [str(name) for name in classes])
            where = _place(corpus, split, field, i)
            raise UserError(
                f"{where}: {value!r} in the field {field!r} is none of the classes, which are the train split's or"
                f" data.names.{hint}"
            )
    return np.asarray([number[value] for value in labels], np.int32)


def _value(name: Any) -> float | None:
    """The number that a class's name is or writes."""
    try:
        found = float(name)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


@dataclass(frozen=True, eq=False)
class _Examples:
    """Tokenized examples of a split: their texts, and targets (N,) if they have any."""

    texts: tuple[Texts, ...]
    targets: np.ndarray | None
    frame: Frame
    seq_len: int
    pad: int
    told: np.ndarray | None
    """What a teacher predicts, (N, C)."""

    def __len__(self) -> int:
        return len(self.texts[0].edges) - 1

    @property
    def marks(self) -> list[list[int]]:
        """Those before, between and behind the texts."""
        return [self.frame.before, *([self.frame.between] if len(self.texts) > 1 else []), self.frame.after]

    def sizes(self, index: np.ndarray) -> list[np.ndarray]:
        """Tokens of each text as they are used: the longer one of a pair is cut first."""
        sizes = [text.sizes(index) for text in self.texts]
        room = self.seq_len - sum(map(len, self.marks))
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
        total: np.ndarray = np.sum(self.sizes(index), axis=0) + sum(map(len, self.marks))
        return total

    def batch(self, index: np.ndarray, whole: np.ndarray, inside: np.ndarray) -> Batch:
        return self.rows(index, inside, width_for(int(self.lengths(whole).max()), self.seq_len))

    def rows(self, index: np.ndarray, inside: np.ndarray, width: int) -> Batch:
        batch: Batch = {"inputs": self.inputs(index, width), "weights": inside.astype(np.float32)}
        for name, of_each in (("targets", self.targets), ("teacher", self.told)):
            if of_each is not None:
                batch[name] = of_each[index]
        return batch

    def inputs(self, index: np.ndarray, width: int) -> dict[str, np.ndarray]:
        """What a model is given of some examples."""
        first, *later = self.marks
        parts: list[Part] = [first]
        for text, size, marks in zip(self.texts, self.sizes(index), later, strict=True):
            parts += [text.stretch(index, size), marks]
        tokens, at = joined(parts, len(index), width, self.pad)
        place = np.arange(width)[None]
        valid = place < at[-1]
        inputs = {"tokens": tokens, "valid": valid}
        if len(self.texts) > 1 and self.frame.types:
            inputs["token_types"] = (valid & (place >= at[3])).astype(np.int32)
        return inputs


@dataclass(frozen=True, eq=False)
class _Apart:
    """Pairs of texts, each in a row of its own."""

    first: _Examples
    second: _Examples

    def __len__(self) -> int:
        return len(self.first)

    def lengths(self, index: np.ndarray) -> np.ndarray:
        return np.maximum(self.first.lengths(index), self.second.lengths(index))

    def batch(self, index: np.ndarray, whole: np.ndarray, inside: np.ndarray) -> Batch:
        # One length for both: a program for each pair of lengths would be many.
        width = width_for(int(self.lengths(whole).max()), self.first.seq_len)
        return self.first.rows(index, inside, width) | {"other": self.second.inputs(index, width)}
