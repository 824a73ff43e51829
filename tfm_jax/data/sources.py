"""From a source string such as `text:~/books/**/*.txt` to splits made of pieces that any process can read.

stdlib                        the running Python's standard library
text:GLOB  jsonl:GLOB         files, `.gz` or not
tfds:NAME                     a TFDS data set in ArrayRecord (see `records.open_tfds`)
hf:DIR                        a Hugging Face `datasets` folder on disk (extra: hf)
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import json
import logging
import math
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tfm_jax.data import files, records
from tfm_jax.data.locks import once
from tfm_jax.data.splits import Keep, check_rule, draw, split_in_name
from tfm_jax.data.types import Piece, Source
from tfm_jax.errors import UserError, closest, nearest

log = logging.getLogger(__name__)
T = TypeVar("T")

KINDS = ("stdlib", "text:GLOB", "jsonl:GLOB", "tfds:NAME", "hf:DIR")
PLAN_VERSION = 1
TAIL_FRACTION = 0.1
HASH_FRACTION = 0.05


def open_source(
    source: str,
    *,
    cache_dir: Path,
    feature: str | None = None,
    split: str = "auto",
    valid_fraction: float | None = None,
    manual_dir: str | None = None,
    piece_bytes: int = 8 << 20,
) -> Source:
    """Find the text, its splits and its pieces.

    split: "names" (file names, or a data set's own splits), "hash" (of the relative path or the record's index),
      "tail" (the end of a single text, nanoGPT's rule), "all" (everything in both splits, to evaluate a model on a text
      that it was not trained on) or "auto", which chooses names, hash or tail and logs it.
    valid_fraction: what "hash" and "tail" hold out; None is 0.05 and 0.1.
    manual_dir: the folder of files that a TFDS builder wants the user to have.
    What reading files through found out is kept in `cache_dir` under their paths, sizes and times of change.
    """
    check_rule(split, valid_fraction)
    if source == "missing":
        raise UserError("This model came without data. Give its text: --config.data.source=text:GLOB, or another.")
    kind, _, rest = source.partition(":")
    valid = {k.partition(":")[0]: k for k in KINDS}
    if kind not in valid:
        raise UserError(f"data.source: unknown kind {kind!r} in {source!r}.{nearest(kind, valid)}")
    if bool(rest) != (":" in valid[kind]):
        raise UserError(f"data.source: {source!r} should look like {valid[kind]!r}.")
    if manual_dir is not None and kind != "tfds":
        raise UserError(f"data.manual_dir={manual_dir!r} is for tfds: sources, not {source!r}.")
    if feature is not None and kind in ("stdlib", "text"):
        raise UserError(f"data.feature is {feature!r}, but a {kind} source has no features to choose from.")

    if kind in ("stdlib", "tfds"):
        data = _open_stdlib(cache_dir) if kind == "stdlib" else _open_tfds(rest, feature, manual_dir, cache_dir)
        return _record_source(source, data, split, valid_fraction, piece_bytes)
    if kind == "hf":
        folder = Path(rest).expanduser()
        paths = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("cache-"))
        indices = _indices(paths, folder, 1 << 62, cache_dir)
        data = records.open_hf(folder, feature, _digest([(i.name, i.size, i.sha256) for i in indices]))
        return _record_source(source, data, split, valid_fraction, piece_bytes)

    base, paths = _matching(rest, kind)
    indices = _indices(paths, base, piece_bytes, cache_dir)
    if kind == "text":
        rule, splits = _text_splits(source, indices, split, valid_fraction, piece_bytes)
    else:
        rule, splits = _jsonl_splits(source, indices, split, valid_fraction, feature or "text")
    content = [(i.name, i.size, i.sha256) for i in indices]
    fingerprint = _digest([PLAN_VERSION, kind, feature or "text", rule, piece_bytes, content])
    return _logged(Source(source, rule, fingerprint, splits), split)


def _logged(source: Source, asked: str) -> Source:
    if asked == "auto":
        _say_once(source.rule, source.name)
    return source


@functools.cache
def _say_once(rule: str, name: str) -> None:
    """Each field and each evaluator opens it anew."""
    log.info("data.split=auto chose %s for %s.", rule, name)


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _open_stdlib(cache_dir: Path) -> records.RecordSet:
    from tfm_jax.data import stdlib  # importing TFDS takes 0.4 s, which other sources need not pay

    return records.open_tfds_folder(stdlib.prepare(cache_dir / "tfds"), "text")


def _open_tfds(name: str, feature: str | None, manual_dir: str | None, cache_dir: Path) -> records.RecordSet:
    data = records.open_tfds(name, feature, manual_dir)
    folder = Path(data.folder)
    if records.made_of(folder):
        return data
    # Labels that were put right leave the name and all sizes as they are, and times of change are other ones on every machine: the
    # records are read, once for the files as they are.
    paths = sorted(path for path in folder.iterdir() if path.is_file())

    def read() -> str:
        log.info("data: reading the records of %s through.", folder)
        return records.tfds_digest(folder)

    content = _remembered(paths, folder, "records", cache_dir, read)
    return dataclasses.replace(data, fingerprint=_digest([data.fingerprint, content]))


def _matching(pattern: str, kind: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files that the glob matches, sorted."""
    expanded = os.path.expanduser(pattern)
    parts = Path(expanded).parts
    fixed = [i for i, part in enumerate(parts) if glob.has_magic(part)][:1] or [len(parts) - 1]
    base = Path(*parts[: fixed[0]])
    paths = sorted(Path(p) for p in glob.glob(expanded, recursive=True) if os.path.isfile(p))
    if not paths:
        parent = next((p for p in (base, *base.parents) if p.is_dir()), Path())
        wrong = Path(*parts[: len(parent.parts) + 1])
        hint = closest(wrong, [str(p) for p in sorted(parent.iterdir())[:1000]])
        raise UserError(f"data.source: {kind}:{pattern} matches no file.{hint}")
    return base, paths


def _indices(paths: list[Path], base: Path, piece_bytes: int, cache_dir: Path) -> list[files.FileIndex]:
    make = lambda: [files.index_file(p, p.relative_to(base).as_posix(), piece_bytes) for p in paths]  # noqa: E731
    return _remembered(paths, base, piece_bytes, cache_dir, make)


def _remembered(paths: list[Path], base: Path, how: int | str, cache_dir: Path, make: Callable[[], T]) -> T:
    """What reading files through finds out, done once for files as they are."""
    stats = [path.stat() for path in paths]
    facts = [
        PLAN_VERSION,
        how,
        str(base.absolute()),
        [(str(p.absolute()), s.st_size, s.st_mtime_ns) for p, s in zip(paths, stats, strict=True)],
    ]
    # A file changed a moment ago may change again within the clock's resolution.
    if any(time.time() - s.st_mtime < 2 for s in stats):
        return make()
    path = cache_dir / "files" / f"{_digest(facts)[:32]}.pickle"
    found: T = pickle.loads(once(path, lambda: pickle.dumps(make())))
    return found


def _rule_for_names(source: str, indices: list[files.FileIndex], rule: str) -> dict[str, list[files.FileIndex]]:
    """The files by the split in their names; all under "train" where names are not to be used."""
    named = {index.name: split_in_name(Path(index.name).name) for index in indices}
    unnamed = [name for name, found in named.items() if found is None]
    if rule == "names":
        if unnamed:
            raise UserError(f"{source}: data.split=names, but {unnamed[0]!r} names no split (train, valid, test).")
        missing = [s for s in ("train", "validation") if s not in named.values()]
        if missing:
            raise UserError(f"{source}: data.split=names, but no file names the {missing[0]} split.")
    elif rule != "auto" or unnamed or "train" not in named.values():
        return {"train": indices}
    groups: dict[str, list[files.FileIndex]] = {}
    for index in indices:
        groups.setdefault(named[index.name] or "train", []).append(index)
    return groups


def _text_splits(
    source: str, indices: list[files.FileIndex], rule: str, fraction: float | None, piece_bytes: int
) -> tuple[str, dict[str, list[Piece]]]:
    groups = _rule_for_names(source, indices, rule)
    train, used = groups["train"], "names"
    if rule == "all":
        groups, used = {"train": indices, "validation": indices}, "all"
    spans = {name: [s for i in group for s in files.text_spans(i, 0, i.size)] for name, group in groups.items()}
    if "validation" not in groups:
        single = len(train) == 1
        if rule == "tail" and not single:
            raise UserError(f"{source}: data.split=tail wants a single text, not {len(train)} files.")
        if rule == "hash" and single:
            raise UserError(f"{source}: data.split=hash wants several files, not one; use data.split=tail.")
        if single:
            held = TAIL_FRACTION if fraction is None else fraction
            border = files.byte_of_character(train[0].path, int(train[0].characters * (1 - held)))
            spans["train"] = files.text_spans(train[0], 0, border)
            spans["validation"] = files.text_spans(train[0], border, train[0].size)
            used = f"tail {held}"
        else:
            held = HASH_FRACTION if fraction is None else fraction
            # Of few files none may fall below the border: then the lowest one does.
            least = max(held, math.nextafter(min(draw(i.name) for i in train), 1))
            for name in ("train", "validation"):
                mine = [i for i in train if Keep(name, least)(i.name)]
                spans[name] = [s for i in mine for s in files.text_spans(i, 0, i.size)]
            used = f"hash {held}"
    return used, {name: list(files.text_pieces(found, piece_bytes)) for name, found in spans.items()}


def _jsonl_splits(
    source: str, indices: list[files.FileIndex], rule: str, fraction: float | None, feature: str
) -> tuple[str, dict[str, list[Piece]]]:
    if rule == "tail":
        raise UserError(f"{source}: data.split=tail is for a single text; use hash or names.")
    groups = _rule_for_names(source, indices, rule)
    keeps: dict[str, Keep | None] = dict.fromkeys(groups)
    used = "names"
    if rule == "all":
        groups, used = {"train": indices, "validation": indices}, "all"
        keeps = dict.fromkeys(groups)
    elif "validation" not in groups:
        held = HASH_FRACTION if fraction is None else fraction
        groups["validation"] = groups["train"]
        keeps |= {name: Keep(name, held) for name in ("train", "validation")}
        used = f"hash {held}"
    return used, {
        name: [p for i in group for p in files.jsonl_pieces(i, feature, keeps[name])] for name, group in groups.items()
    }


def _record_source(source: str, data: records.RecordSet, rule: str, fraction: float | None, piece_bytes: int) -> Source:
    if rule == "tail":
        raise UserError(f"{source}: data.split=tail is for a single text; use hash or names.")
    if rule == "all":
        # Others are left alone, as always, unless there is nothing else.
        read = [split for split in data.splits if split_in_name(split.name)] or data.splits
        every = [piece for split in read for piece in records.record_pieces(data, split, None, piece_bytes)]
        splits: dict[str, list[Piece]] = {"train": [*every], "validation": [*every]}
        used = "all" if len(read) == 1 else f"all of {', '.join(split.name for split in read)}"
    else:
        needed = ("train",) if rule == "hash" else ("train", "validation")
        own = records.canonical_splits(data, needed, " Or set data.split=hash, to hold out of train.")
        keeps: dict[str, Keep | None] = dict.fromkeys(own)
        used = "names"
        if rule == "hash" or "validation" not in own:
            if rule == "names":
                raise UserError(f"{source}: data.split=names, but it has no validation split of its own.")
            held = HASH_FRACTION if fraction is None else fraction
            own["validation"] = own["train"]
            keeps |= {name: Keep(name, held) for name in ("train", "validation")}
            used = f"hash {held}"
        splits = {
            name: list(records.record_pieces(data, split, keeps[name], piece_bytes)) for name, split in own.items()
        }
    facts = [PLAN_VERSION, data.kind, data.feature, used, piece_bytes, data.fingerprint]
    return _logged(Source(source, used, _digest(facts), splits), rule)
