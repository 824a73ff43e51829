"""Figures with what they were measured on: `results/NAME.json`."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tfm_jax import config as configs
from tfm_jax.files import write_atomic
from tfm_jax.train import rundir

RESULTS = Path("results")


def each(results: Iterable[Mapping[str, Any]], key: str) -> str:
    """What results say of themselves, each text once: a finished run may be older than the code and the day."""
    return ", ".join(sorted({str(result[key]) for result in results if key in result}))


def write_result(
    name: str,
    figures: dict[str, Any],
    *,
    config: Any,
    seed: int | None = None,
    folder: Path = RESULTS,
    revision: str | None = None,
    date: str | None = None,
) -> Path:
    """Write figures beside the config, seed, code revision (here and today if None), date and machine that they came from."""
    record = {
        "name": name,
        "figures": figures,
        "config": config,
        "seed": seed,
        "revision": revision or rundir.revision(),
        "date": date or time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": rundir.versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_atomic(path, configs.to_json(record))
    return path
