"""A text source, tokenized: the streams of its splits, on disk and memory-mapped."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfm_jax.data.build import TokenStream, build_tokens, open_split
from tfm_jax.data.locks import once
from tfm_jax.data.rows import Texts
from tfm_jax.data.sources import open_source
from tfm_jax.data.tokenizers import load_tokenizer
from tfm_jax.data.types import Piece, Source, Tokenizer
from tfm_jax.data.vocabularies import open_tokenizer
from tfm_jax.errors import UserError, nearest

log = logging.getLogger(__name__)
# Characters of documents, to see whether a tokenizer gives them back.
_LOOKED_AT = 20_000
# Characters of a text, in an error.
_SHOWN = 80


def cache_root(cache_dir: str | None) -> Path:
    """The asked folder, else `$TFM_JAX_CACHE`, else `tfm_jax` under `$XDG_CACHE_HOME` or `~/.cache`."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if own := os.environ.get("TFM_JAX_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tfm_jax"


@dataclass(frozen=True)
class Corpus:
    """Token streams by split.

    Attributes:
      source: as the config names it.
      pieces: what the streams were made of, by split, in their order.
      facts: see `types.Data`.
      fingerprint: of everything that determines the tokens.
    """

    source: str
    streams: Mapping[str, TokenStream]
    pieces: Mapping[str, Sequence[Piece]]
    tokenizer: Tokenizer
    facts: dict[str, dict[str, Any]]
    fingerprint: str

    def stream(self, split: str) -> TokenStream:
        if split not in self.streams:
            raise UserError(f"data.source={self.source!r} has no split {split!r}.{nearest(split, self.streams)}")
        return self.streams[split]

    def texts(self, split: str) -> Texts:
        """The documents of a split, of which each is a record's.

        Raises:
          UserError: a text has the tokenizer's end mark among its pieces, and so is two.
        """
        found = Texts.of(self.stream(split), self.tokenizer.end_id)
        if len(found.edges) - 1 != self.facts[split]["documents"]:
            texts = (document.text for piece in self.pieces[split] for document in piece.documents())
            end = self.tokenizer.end_id
            wrong = next(text for text in texts if (self.tokenizer.encode_batch([text])[0] == end).any())
            shown = wrong if len(wrong) <= _SHOWN else f"{wrong[:_SHOWN]} ..."
            raise UserError(
                f"data.source={self.source!r}: the text {shown!r} of the split {split!r} has {self.tokenizer.pieces()[end]!r} in it, which"
                " this tokenizer reads as the end of a text. Take it out."
            )
        return found

    def told(self) -> dict[str, dict[str, Any]]:
        """The facts, those in bytes only where the tokens say all of the text, by the first documents that are held out:
        `words`, `wordpiece`, tokenizers that write lower case and letters that `chars` has not met do not."""
        found = next(((text, back) for text, back in self._there_and_back() if text != back), None)
        if found is None:
            return self.facts
        differing = (i for i, (a, b) in enumerate(zip(*found, strict=False)) if a != b)
        at = next(differing, min(map(len, found)))
        log.info(
            "data: no bits per byte, for tokens do not say all of the text: %r comes back as %r.",
            *(text[max(0, at - 10) : at + 20] for text in found),
        )
        return without_bytes(self.facts)

    def _there_and_back(self) -> Iterator[tuple[str, str]]:
        """Documents that are held out, and what their tokens say."""
        held = next((name for name in ("validation", "test") if name in self.pieces), "train")
        left = _LOOKED_AT
        for text in (document.text[:left] for piece in self.pieces[held] for document in piece.documents()):
            yield text, self.tokenizer.decode(self.tokenizer.encode_batch([text])[0])
            left -= len(text)
            if left <= 0:
                return


def without_bytes(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The facts of each split, of which nothing in bytes is left."""
    return {name: {k: v for k, v in found.items() if "bytes" not in k} for name, found in facts.items()}


def open_corpus(source: str, *, feature: str | None, **settings: Any) -> Corpus:
    """Open a source and tokenize it, or find it tokenized; see `open_corpora`."""
    return open_corpora(source, [feature], **settings)[0]


def open_corpora(
    source: str,
    features: Sequence[str | None],
    *,
    tokenizer: str,
    split: str,
    valid_fraction: float | None,
    cache_dir: str | None,
    workers: int,
    tokenizer_dir: str | None,
    manual_dir: str | None = None,
) -> list[Corpus]:
    """A corpus of each of some fields of the same records, by one tokenizer, which learns from all of them.

    The other arguments are those of `data.tokens`.
    """
    root = cache_root(cache_dir)
    opened = [
        open_source(
            source, feature=feature, split=split, valid_fraction=valid_fraction, cache_dir=root, manual_dir=manual_dir
        )
        for feature in features
    ]
    if valid_fraction is not None and opened[0].rule == "names":
        raise UserError(
            f"data.valid_fraction={valid_fraction}: {source!r} names its own splits. Leave it out, or set"
            " data.split='hash'."
        )
    codec = load_tokenizer(tokenizer_dir) if tokenizer_dir else open_tokenizer(tokenizer, together(opened), root)
    out = []
    for one in opened:
        folder, meta = build_tokens(one, codec, root, workers=workers)
        streams = {name: open_split(folder, meta, name) for name in meta["splits"]}
        out.append(Corpus(source, streams, one.splits, codec, meta["splits"], folder.name))
    return out


def open_records(
    reader: str, source: str, fields: Sequence[str], *, at_least_one: Mapping[str, int], **settings: Any
) -> list[Corpus]:
    """A corpus of each of some fields of records, for a reader that has settings which must be `at_least_one`; see
    `open_corpora`."""
    for name, value in at_least_one.items():
        if value < 1:
            raise UserError(f"data.{name}={value}: must be at least 1.")
    if source.partition(":")[0] in ("stdlib", "text"):
        raise UserError(f"data.source={source!r} has no fields: {reader} need jsonl:GLOB, tfds:NAME or hf:DIR.")
    return open_corpora(source, fields, **settings)


def together(sources: Sequence[Source]) -> Source:
    """All their texts, for a tokenizer to learn from."""
    if len(sources) == 1:
        return sources[0]
    splits = {name: [piece for source in sources for piece in source.splits[name]] for name in sources[0].splits}
    fingerprint = hashlib.sha256(" ".join(source.fingerprint for source in sources).encode()).hexdigest()
    return Source(sources[0].name, sources[0].rule, fingerprint, splits)


def offsets(corpus: Corpus, split: str, root: Path) -> list[np.ndarray]:
    """Where each document's tokens stand in it, (tokens, 2) int32 characters; found once and kept beside the tokens."""
    path = root / "labels" / f"{corpus.fingerprint}-{split}-offsets.npz"

    def align() -> bytes:
        log.info("offsets: aligning the tokens of %s, %s.", corpus.source, split)
        texts = [document.text for piece in corpus.pieces[split] for document in piece.documents()]
        # A context comes once for each of its questions.
        different = list(dict.fromkeys(texts))
        found = dict(zip(different, corpus.tokenizer.offsets_batch(different), strict=True))
        sizes = np.array([len(found[text]) for text in texts])
        content = io.BytesIO()
        whole = np.concatenate([found[text] for text in texts]) if texts else np.zeros((0, 2), np.int32)
        np.savez_compressed(content, offsets=whole, sizes=sizes)
        return content.getvalue()

    with np.load(io.BytesIO(once(path, align))) as kept:
        return np.split(kept["offsets"], np.cumsum(kept["sizes"])[:-1])
