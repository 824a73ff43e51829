"""Several data sets in one run: each batch comes from one of them, drawn by index arithmetic."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tfm_jax.data.index import hash_ints, permute
from tfm_jax.data.types import Batch, Data, Dataset, Rows
from tfm_jax.errors import UserError, nearest
from tfm_jax.sections import fill, make_named, section_fields

BLOCK = 1000
"""Batches among which every part has its share exactly, up to rounding."""


def make(
    *,
    parts: Mapping[str, Mapping[str, Any]],
    temperature: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
    seq_len: int = 128,
    tokenizer: str = "bpe:4096",
    manual_dir: str | None = None,
    cache_dir: str | None = None,
    workers: int = 0,
    tokenizer_dir: str | None = None,
) -> Data:
    """The config section `data` for `name="mixture"`.

    A batch is one of a part's, with `part` besides, a dict whose only key is the part's name. A part's share of the batches
    is proportional to its examples to the power of 1 / temperature (Raffel et al. 2020, section 3.5.2), and at least one
    batch in a thousand. Splits are `PART/SPLIT`.

    Args:
      parts: by name, the section `data` of each; the other arguments here hold for all parts that take them and have no
        such key of their own.
      temperature: 1 takes every example equally often, more favours small parts.
      batch_size: rows of the global batch.
      seed: of the order of the parts, and of their examples.
      seq_len, tokenizer, manual_dir, cache_dir, workers, tokenizer_dir: see the parts' own.

    Raises:
      UserError: no parts, parts whose tokenizers differ, or one that counts no examples.
    """
    if not parts:
        raise UserError('data.parts is empty: give each part a name and a section, {"a": {"source": "jsonl:..."}}.')
    if temperature <= 0:
        raise UserError(f"data.temperature={temperature}: must be above 0.")
    common = {
        "batch_size": batch_size, "seed": seed, "seq_len": seq_len, "tokenizer": tokenizer, "manual_dir": manual_dir,
        "cache_dir": cache_dir, "workers": workers,
    }  # fmt: skip
    made: dict[str, Data] = {}
    for name, section in parts.items():
        fields = section_fields("data", section, f"data.parts.{name}")
        # A folder of files is for builders that ask for one.
        given = {k: v for k, v in common.items() if k in fields and not (k == "manual_dir" and _needs_none(section))}
        full = fill(f"data.parts.{name}", {**given, **section}, fields)
        made[name] = make_named("data", full, tokenizer_dir=lambda _: tokenizer_dir)
    first = next(iter(made))
    for name, data in made.items():
        if _reads(data) != _reads(made[first]):
            raise UserError(
                f"data.parts.{name} and data.parts.{first} have tokenizers of their own; name one that is made already:"
                " run:FOLDER, file:PATH or sentencepiece:PATH."
            )
        if data.train.batch_size != batch_size:
            raise UserError(f"data.parts.{name}.batch_size={data.train.batch_size}: all parts have {batch_size} rows.")
    counts = {name: _examples(name, data) for name, data in made.items()}

    def placed(name: str) -> tuple[str, str]:
        part, _, split = name.partition("/")
        if part not in made or not split:
            known = [f"{p}/{s}" for p, data in made.items() for s in data.facts]
            raise UserError(f"evals: there is no split {name!r} in the mixture.{nearest(name, known)}")
        return part, split

    def evals(name: str, rows: int | None) -> Dataset:
        part, split = placed(name)
        return _Named(made[part].evals(split, rows), part)

    def texts(name: str) -> str:
        part, split = placed(name)
        found = made[part].texts
        return "" if found is None else found(split)

    facts = [{name: data.fingerprint for name, data in made.items()}, temperature]
    told = {name: data.told for name, data in made.items() if data.told}
    types = [data.sizes["types"] for data in made.values() if "types" in data.sizes]
    return Data(
        train=Training(
            {name: data.train for name, data in made.items()}, shares(counts, temperature), batch_size, seed
        ),
        evals=evals,
        vocab_size=made[first].vocab_size,
        tokenizer=made[first].tokenizer,
        facts={f"{name}/{split}": found for name, data in made.items() for split, found in data.facts.items()},
        fingerprint=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
        told=hashlib.sha256(json.dumps(told).encode()).hexdigest() if told else "",
        texts=texts,
        filled_in={"parts": {name: {**section, **made[name].filled_in} for name, section in parts.items()}},
        sizes={
            "classes": {name: data.sizes["classes"] for name, data in made.items() if "classes" in data.sizes},
        }
        | ({"types": max(types)} if types else {}),
    )


def _needs_none(section: Mapping[str, Any]) -> bool:
    return not str(section.get("source", "")).startswith("tfds:")


def _reads(data: Data) -> str | None:
    return None if data.tokenizer is None else data.tokenizer.fingerprint


def _examples(name: str, data: Data) -> int:
    found = data.facts.get("train", {})
    if "examples" not in found:
        raise UserError(f"data.parts.{name} counts no examples, so it has no share; mix examples and pairs.")
    return int(found["examples"])


def shares(counts: Mapping[str, int], temperature: float) -> dict[str, int]:
    """Batches of each part in a block, at least 1: the largest remainders are rounded up."""
    sizes = np.array([float(count) for count in counts.values()])
    weights = (sizes / sizes.max()) ** (1 / temperature)
    wanted = np.maximum(weights / weights.sum() * BLOCK, 1.0)
    wanted = wanted / wanted.sum() * BLOCK
    given = np.maximum(np.floor(wanted), 1).astype(int)
    # Where many small parts were raised to 1 the sum is above BLOCK already, and the largest part gives the rest.
    for i in np.argsort(given - wanted, kind="stable")[: max(0, BLOCK - int(given.sum()))]:
        given[i] += 1
    given[np.argmax(given)] += BLOCK - int(given.sum())
    return dict(zip(counts, given.tolist(), strict=True))


@dataclass(frozen=True)
class Training:
    """Each step's batch is the next one of the part whose turn it is."""

    parts: Mapping[str, Dataset]
    shares: Mapping[str, int]
    batch_size: int
    seed: int
    num_batches: None = None
    _orders: dict[int, np.ndarray] = field(default_factory=dict)

    def turn(self, step: int) -> tuple[str, int]:
        """The part of a step, and which of its own batches comes."""
        block, place = divmod(step, BLOCK)
        if block not in self._orders:
            self._orders.clear()
            key = hash_ints(self.seed, 5, block).view(np.int64)
            line = np.repeat(np.arange(len(self.shares)), list(self.shares.values()))
            self._orders[block] = line[permute(np.arange(BLOCK), BLOCK, key)]
        order = self._orders[block]
        part, name = order[place], list(self.shares)[order[place]]
        return name, block * self.shares[name] + int(np.sum(order[:place] == part))

    def batch_at(self, step: int, rows: Rows = slice(None)) -> Batch:
        name, own = self.turn(step)
        return {**self.parts[name].batch_at(own, rows), "part": {name: None}}


class _Named:
    """A part's pass, whose batches say whose they are."""

    def __init__(self, dataset: Dataset, part: str) -> None:
        self._dataset, self._part = dataset, part
        self.batch_size, self.num_batches = dataset.batch_size, dataset.num_batches

    def __getattr__(self, name: str) -> Any:
        # What an evaluator asks of a data set besides batches: references, names, the texts of windows.
        return getattr(self._dataset, name)

    def batch_at(self, step: int, rows: Rows = slice(None)) -> Batch:
        return {**self._dataset.batch_at(step, rows), "part": {self._part: None}}
