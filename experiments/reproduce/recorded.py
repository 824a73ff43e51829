"""`data.name="tokens"`, writing down which rows of which global batch each process loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from tfm_jax.data import tokens
from tfm_jax.data.types import Batch, Data, Dataset, Rows

FOLDER = "RECORDED_ROWS"


def make(
    *, source: str, tokenizer: str, seq_len: int, batch_size: int, seed: int = 0, tokenizer_dir: str | None = None
) -> Data:
    """As `tfm_jax.data.tokens:make`; the rows go to the folder that the variable RECORDED_ROWS names."""
    made = tokens.make(
        source=source,
        tokenizer=tokenizer,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        tokenizer_dir=tokenizer_dir,
    )
    return dataclasses.replace(made, train=_Recorded(made.train, Path(os.environ[FOLDER])))


class _Recorded:
    def __init__(self, dataset: Dataset, folder: Path) -> None:
        self._dataset, self._folder = dataset, folder
        folder.mkdir(parents=True, exist_ok=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def batch_at(self, step: int, rows: Rows = slice(None)) -> Batch:
        batch = self._dataset.batch_at(step, rows)
        found = np.arange(self._dataset.batch_size)[rows]
        with open(self._folder / f"{os.getpid()}.jsonl", "a") as out:
            for row, x, y in zip(found, batch["inputs"]["tokens"], batch["targets"], strict=True):
                digest = hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()
                out.write(json.dumps([step, int(row), digest]) + "\n")
        return batch


def read(folder: Path) -> dict[int, dict[int, str]]:
    """Digest of each row of each step, from all processes.

    Raises:
      ValueError: two processes have loaded different rows as one.
    """
    found: dict[int, dict[int, str]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            step, row, digest = json.loads(line)
            if found.setdefault(step, {}).setdefault(row, digest) != digest:
                raise ValueError(f"Row {row} of step {step} is not the same everywhere in {folder}.")
    return found
