"""Text files and JSON-lines files, plain or `.gz`: one pass to hash and cut them, then reading by byte range."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from tfm_jax.data.splits import Keep
from tfm_jax.data.types import Document
from tfm_jax.errors import UserError, nearest

BLOCK = 1 << 20


class Cut(NamedTuple):
    """A place after a newline: bytes (of the decompressed file) and lines before it."""

    byte: int
    line: int


@dataclass(frozen=True)
class FileIndex:
    path: str
    name: str
    """Relative to the fixed part of the glob, posix: moving the folder changes nothing."""
    size: int
    """Decompressed, in bytes."""
    characters: int
    sha256: str
    """Of the decompressed content."""
    cuts: tuple[Cut, ...]
    """The start, a newline about every `piece_bytes`, and the end."""


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    try:
        with cast(BinaryIO, gzip.open(path)) if path.endswith(".gz") else open(path, "rb") as file:
            yield file
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is not a whole gzip file: {error}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def _starts_character(block: bytes) -> np.ndarray:
    """Which bytes begin a UTF-8 character."""
    return np.asarray((np.frombuffer(block, np.uint8) & 0xC0) != 0x80)


def index_file(path: Path, name: str, piece_bytes: int) -> FileIndex:
    """Read the whole file once, in blocks."""
    digest, characters, size, lines = hashlib.sha256(), 0, 0, 0
    cuts = [Cut(0, 0)]
    with _opened(str(path)) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            characters += int(np.count_nonzero(_starts_character(block)))
            while (at := block.find(b"\n", max(0, cuts[-1].byte + piece_bytes - size))) >= 0:
                cuts.append(Cut(size + at + 1, lines + block.count(b"\n", 0, at + 1)))
            size += len(block)
            lines += block.count(b"\n")
    if cuts[-1].byte < size:
        cuts.append(Cut(size, lines))
    return FileIndex(str(path), name, size, characters, digest.hexdigest(), tuple(cuts))


def byte_of_character(path: str, character: int) -> int:
    """Where a character starts."""
    seen = passed = 0
    with _opened(path) as file:
        while block := file.read(BLOCK):
            starts = np.flatnonzero(_starts_character(block))
            if seen + starts.size > character:
                return passed + int(starts[character - seen])
            seen += starts.size
            passed += len(block)
    return passed


def _read_range(path: str, start: int, stop: int) -> bytes:
    with _opened(path) as file:
        file.seek(start)
        data = file.read(stop - start)
    if len(data) != stop - start:
        raise UserError(f"{path} became shorter while it was being read.")
    return data


def _decoded(data: bytes, path: str, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {offset + error.start}.") from None


class TextSpan(NamedTuple):
    path: str
    start: int
    stop: int
    ends: bool
    """Whether the document ends here."""


@dataclass(frozen=True)
class TextPiece:
    """Parts of text files; every file is one document."""

    spans: tuple[TextSpan, ...]

    @property
    def size(self) -> int:
        return sum(span.stop - span.start for span in self.spans)

    def documents(self) -> Iterator[Document]:
        for path, start, stop, ends in self.spans:
            yield Document(_decoded(_read_range(path, start, stop), path, start), ends)


def text_pieces(spans: list[TextSpan], piece_bytes: int) -> list[TextPiece]:
    """Group consecutive spans until they reach `piece_bytes`."""
    pieces: list[TextPiece] = []
    group: list[TextSpan] = []
    for span in spans:
        group.append(span)
        if sum(s.stop - s.start for s in group) >= piece_bytes:
            pieces.append(TextPiece(tuple(group)))
            group = []
    return [*pieces, TextPiece(tuple(group))] if group else pieces


def text_spans(index: FileIndex, start: int, stop: int) -> list[TextSpan]:
    """The bytes [start, stop) of a file as one document, cut where the index says."""
    inner = [cut.byte for cut in index.cuts if start < cut.byte < stop]
    edges = [start, *inner, stop]
    return [TextSpan(index.path, a, b, b == stop) for a, b in itertools.pairwise(edges)]


@dataclass(frozen=True)
class JsonlPiece:
    """Whole lines of a JSON-lines file; every line that is not blank is a document."""

    path: str
    name: str
    start: int
    stop: int
    first_line: int
    feature: str
    keep: Keep | None

    @property
    def size(self) -> int:
        return self.stop - self.start

    def documents(self) -> Iterator[Document]:
        for where, value in self.values(self.feature):
            yield Document(text_of(value, where, self.feature), True)

    def values(self, field: str) -> Iterator[tuple[str, Any]]:
        lines = _read_range(self.path, self.start, self.stop).split(b"\n")
        for number, line in enumerate(lines, start=self.first_line + 1):
            if line.strip() and (self.keep is None or self.keep(f"{self.name}:{number}")):
                where = f"{self.path}, line {number}"
                yield where, self._value(line, field, where)

    def _value(self, line: bytes, field: str, where: str) -> Any:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON: {error}.") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: a JSON {type(record).__name__}, not an object.")
        if field not in record:
            raise UserError(f"{where}: no field {field!r}.{nearest(field, record)}")
        return record[field]


def text_of(value: Any, where: str, field: str) -> str:
    """A record's text: a string, bytes, or words, which are joined by spaces.

    Raises:
      UserError: it is something else.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, list | tuple | np.ndarray) and all(isinstance(word, str | bytes) for word in value):
        return " ".join(text_of(word, where, field) for word in value)
    if not isinstance(value, str):
        raise UserError(f"{where}: the field {field!r} is a {type(value).__name__}, not text.")
    # Half a surrogate pair is legal JSON but no text.
    return value.encode("utf-8", "replace").decode("utf-8")


def jsonl_pieces(index: FileIndex, feature: str, keep: Keep | None) -> list[JsonlPiece]:
    return [
        JsonlPiece(index.path, index.name, a.byte, b.byte, a.line, feature, keep)
        for a, b in itertools.pairwise(index.cuts)
    ]
