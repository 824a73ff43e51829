"""Documents to token shards on disk: parallel, resumable, and never half done under a finished name.

A split's stream begins with an end mark, and every document is followed by one. Folder: `tokens/<hash>/` with
`<split>-<number>.bin` (uint16, or uint32 for a vocabulary above 65,536), one `.json` of counts beside each, and
`meta.json`, which is written last and alone says that the build is whole.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import logging
import lzma
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm

from tfm_jax.data.locks import locked
from tfm_jax.data.types import Piece, Source, Tokenizer
from tfm_jax.errors import UserError
from tfm_jax.files import write_atomic

log = logging.getLogger(__name__)
FORMAT = 1
SHARD_BYTES = 64 << 20  # of text, about 16 M tokens
# Below this much text, starting processes takes longer than they save; the tokenizer's own threads do.
_SERIAL_BYTES = 32 << 20
_COMPRESS_LIMIT = 64 << 20
_DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True)
class TokenStream:
    """Shards, memory-mapped, as one array of `size` tokens."""

    shards: tuple[np.ndarray, ...]
    starts: np.ndarray  # of each shard, and the end of the last

    @property
    def size(self) -> int:
        return int(self.starts[-1])

    def places(self, token: int) -> np.ndarray:
        """Where a token stands, int64: for the end mark, before the first document and behind each."""
        found = [np.flatnonzero(shard == token) + start for shard, start in zip(self.shards, self.starts, strict=False)]
        return np.concatenate(found)

    def at(self, place: np.ndarray) -> np.ndarray:
        """The tokens (int32) at positions, any shape."""
        if len(self.shards) == 1:
            return self.shards[0][place].astype(np.int32)
        shard = np.searchsorted(self.starts, place, side="right") - 1
        out = np.empty(place.shape, np.int32)
        for number in np.unique(shard):
            here = shard == number
            out[here] = self.shards[number][place[here] - self.starts[number]]
        return out


class _Job(NamedTuple):
    path: Path
    pieces: tuple[Piece, ...]
    leads: bool  # whether the stream's first end mark is written here


def build_tokens(
    source: Source, tokenizer: Tokenizer, root: Path, *, workers: int = 0, shard_bytes: int = SHARD_BYTES
) -> tuple[Path, dict[str, Any]]:
    """The folder of a corpus in a tokenizer's ids, and its `meta.json`; built first where it is not whole yet.

    Args:
      workers: processes; 0 for one a core.

    Raises:
      UserError: no text in a split, or a damaged finished build.
    """
    identity = [FORMAT, source.fingerprint, tokenizer.fingerprint, shard_bytes]
    folder = root / "tokens" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    meta = folder / "meta.json"
    if not meta.is_file():
        with locked(folder):
            if not meta.is_file():
                folder.mkdir(exist_ok=True)
                _build(source, tokenizer, folder, workers, shard_bytes)
    return folder, json.loads(meta.read_text())


def open_split(folder: Path, meta: dict[str, Any], split: str) -> TokenStream:
    """A split's shards, memory-mapped.

    Raises:
      UserError: a shard is missing or has another size than when it was built.
    """
    dtype, shards, sizes = np.dtype(meta["dtype"]), [], [0]
    for shard in meta["splits"][split]["shards"]:
        path = folder / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["tokens"] * dtype.itemsize:
            raise UserError(f"{path} is missing or truncated. Delete {folder} and start again: it is built anew.")
        if shard["tokens"]:  # an empty file cannot be mapped; a hash may hold out no record of a shard
            shards.append(np.memmap(path, dtype, mode="r"))
            sizes.append(shard["tokens"])
    return TokenStream(tuple(shards), np.cumsum(sizes))


def _build(source: Source, tokenizer: Tokenizer, folder: Path, workers: int, shard_bytes: int) -> None:
    began = time.perf_counter()
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    jobs = {split: _plan(folder, split, pieces, shard_bytes) for split, pieces in source.splits.items()}
    todo = [job for many in jobs.values() for job in many if not _finished(job, dtype)]
    log.info("tokens: building %d of %d shards of %s ...", len(todo), sum(map(len, jobs.values())), source.name)
    size = sum(piece.size for job in todo for piece in job.pieces)
    workers = min(workers or os.cpu_count() or 1, len(todo))
    if workers > 1 and size > _SERIAL_BYTES:
        # Spawned, because forking a process that runs JAX's threads can deadlock.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
            done = as_completed([pool.submit(_write_shard, job, tokenizer, dtype) for job in todo])
            for future in _bar(done, len(todo)):
                future.result()
    else:
        for job in _bar(todo, len(todo)):
            _write_shard(job, tokenizer, dtype)
    splits = {split: _facts(split, many, source) for split, many in jobs.items()}
    meta = {
        "format": FORMAT,
        "source": source.name,
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "end_id": tokenizer.end_id,
        "tokenizer": tokenizer.fingerprint,
        "splits": splits,
    }
    write_atomic(folder / "meta.json", json.dumps(meta, indent=1).encode())
    counts = ", ".join(f"{split} {facts['tokens']:,} tokens" for split, facts in splits.items())
    log.info("tokens: %s in %.1f s.", counts, time.perf_counter() - began)


def _plan(folder: Path, split: str, pieces: Sequence[Piece], shard_bytes: int) -> list[_Job]:
    """Consecutive pieces, up to a shard's worth of text in each; the same whatever the number of workers."""
    groups: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if groups[-1] and size + piece.size > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.size
    return [_Job(folder / f"{split}-{i:05d}.bin", tuple(group), i == 0) for i, group in enumerate(groups)]


def _finished(job: _Job, dtype: np.dtype[Any]) -> bool:
    """The counts are written after their shard, so their presence with the right size means both are whole."""
    counts = job.path.with_suffix(".json")
    if not (counts.is_file() and job.path.is_file()):
        return False
    return job.path.stat().st_size == json.loads(counts.read_text())["tokens"] * dtype.itemsize


def _start_worker() -> None:
    # One process a core already; the tokenizer's threads would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _write_shard(job: _Job, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> None:
    tokens = documents = size = 0
    digest = hashlib.sha256()
    temporary = job.path.with_name(f".{job.path.name}.{os.getpid()}")
    end = np.array([tokenizer.end_id], np.int32)
    with open(temporary, "wb") as out:

        def put(ids: np.ndarray) -> None:
            nonlocal tokens
            data = ids.astype(dtype).tobytes()
            digest.update(data)
            out.write(data)
            tokens += len(ids)

        if job.leads:
            put(end)
        found = itertools.chain.from_iterable(piece.documents() for piece in job.pieces)
        while batch := list(itertools.islice(found, _DOCUMENTS_AT_ONCE)):
            for document, ids in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
                put(ids)
                size += len(document.text.encode("utf-8"))
                if document.ends:
                    put(end)
                    documents += 1
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, job.path)
    counts = {"file": job.path.name, "tokens": tokens, "documents": documents, "bytes": size}
    write_atomic(job.path.with_suffix(".json"), json.dumps({**counts, "sha256": digest.hexdigest()}).encode())


def _facts(split: str, jobs: Sequence[_Job], source: Source) -> dict[str, Any]:
    shards = [json.loads(job.path.with_suffix(".json").read_text()) for job in jobs]
    facts: dict[str, Any] = {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents", "bytes")}
    if facts["bytes"] == 0:
        raise UserError(f"data.source={source.name!r}: the split {split!r} has no text.")
    if split != "train" and facts["bytes"] <= _COMPRESS_LIMIT:
        # What general compressors make of the same bytes, to stand beside a model's bits per byte.
        text = b"".join(d.text.encode("utf-8") for piece in source.splits[split] for d in piece.documents())
        facts["gzip_bytes"] = len(gzip.compress(text, 9))
        facts["xz_bytes"] = len(lzma.compress(text, preset=9))
    return {**facts, "shards": shards}


def _bar(items: Any, total: int) -> Any:
    return tqdm.tqdm(items, total=total, desc="tokens", unit="shard", disable=not sys.stderr.isatty())
