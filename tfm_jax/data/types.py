"""The shapes that the parts of the data side hand to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

Batch = dict[str, Any]
"""`{"inputs": {"tokens": int32 (B, T)}, "targets": int32 (B, T), "weights": float32 (B, T)}` for token data."""

Rows = slice | np.ndarray


class Document(NamedTuple):
    """A stretch of one document's text; `ends` says that it is the last one."""

    text: str
    ends: bool


class Piece(Protocol):
    """A part of a split that one process reads in one go. Picklable; reading it twice gives the same text."""

    @property
    def size(self) -> int:
        """About how many bytes of text."""

    def documents(self) -> Iterator[Document]: ...


@runtime_checkable
class Records(Piece, Protocol):
    """A piece of records, each of which is a document by one of its fields."""

    def values(self, field: str) -> Iterator[tuple[str, Any]]:
        """For each record, in the order of its documents, where it stands and what it has in a field."""


@dataclass(frozen=True)
class Source:
    """Where text comes from, cut into splits ("train", "validation", "test") and those into pieces, in order."""

    name: str
    rule: str
    """How the splits were found; "auto" is resolved."""
    fingerprint: str
    """sha256 of everything that determines the text and its cutting."""
    splits: Mapping[str, Sequence[Piece]]


class Frame(NamedTuple):
    """The ids before a text, between two texts, and after the last; `types` says whether two texts are told apart by
    their segment (0 up to the marks between them, then 1)."""

    before: list[int]
    between: list[int]
    after: list[int]
    types: bool


class Tokenizer(Protocol):
    """Text to ids and back. Marks such as `<|endoftext|>` inside a text are encoded as the plain text they are, unless the file has
    them among the pieces of a text (`</s>` in T5's): there a document ends."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_id(self) -> int:
        """The end-of-document mark."""

    @property
    def unk_id(self) -> int | None: ...

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that determines the ids."""

    def token_id(self, mark: str) -> int | None:
        """The id of a mark such as `[MASK]`, if there is one."""

    def pieces(self) -> list[str]:
        """What stands for each id in the vocabulary, with its marks of spaces; empty where there is nothing."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array a text, without marks at either end."""

    def offsets_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """For each text, where in it each of its tokens begins and ends: (N, 2) int32 characters."""

    def frame(self) -> Frame:
        """The marks that stand around one text or two."""

    def prompt(self, text: str) -> list[int]:
        """A text with the marks that the tokenizer's own file puts around one (`<s>` before Llama's prompts)."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Marks are left out; bytes that are not UTF-8 become U+FFFD."""

    def save(self, folder: str | Path) -> None:
        """Write what `load_tokenizer(folder)` needs."""


class Dataset(Protocol):
    """Batches addressed by step, without state: the same step gives the same batch on any host, at any time."""

    @property
    def batch_size(self) -> int:
        """Rows of the *global* batch."""

    @property
    def num_batches(self) -> int | None:
        """None: endless (training). n: one pass, the last batch padded with weight 0."""

    def batch_at(self, step: int, rows: Rows = slice(None)) -> Batch:
        """The given rows of the global batch of `step`, as numpy arrays."""


@dataclass(frozen=True)
class Data:
    """What a data set's `make` returns."""

    train: Dataset
    evals: Callable[[str, int | None], Dataset]
    """(split, batch size or None for the training one) -> one pass in order."""
    vocab_size: int | None
    tokenizer: Tokenizer | None
    facts: dict[str, dict[str, Any]]
    """Per split, what is known of it: tokens, documents and bytes, and for held-out splits gzip_bytes and xz_bytes where measured; or
    examples, of which the train split's decide its share in a mixture, and questions."""
    fingerprint: str
    """Of all that the batches are cut from, and of the objective; a seed, or how many and how long the rows are, it may leave to
    the config."""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    """What a model needs besides the vocabulary, by its field (`classes`); one that a config leaves out is filled in."""
    filled_in: Mapping[str, Any] = field(default_factory=dict)
    """Keys of its own section that it has decided and a run is to keep: the names of its classes."""
    told: str = ""
    """A digest of what only training reads besides: a teacher's predictions. Hosts compare both, and a run records them."""
    texts: Callable[[str], str] | None = None
    """A digest of a split's texts in their order, whatever tokenizer reads them, where each is an example to predict for."""
