"""Figures with what they were measured on: `results/NAME.json`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tfm_jax import config as configs
from tfm_jax.files import write_atomic
from tfm_jax.train import rundir

RESULTS = Path("results")


def _each(results: Iterable[Mapping[str, Any]], key: str) -> Any:
    """What results say of themselves, each thing once: a finished run may be older than the code, the day and the machine."""
    said = [result.get(key, "not recorded") for result in results]
    return said[0] if said and all(one == said[0] for one in said) else ", ".join(sorted({str(one) for one in said}))


def origin(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Code, day, machine and libraries of runs, from their `result.json`, for `write_result`."""
    known = [*results]
    return {key: _each(known, key) for key in ("revision", "date", "machine", "versions")}


def write_result(
    name: str,
    figures: dict[str, Any],
    *,
    config: Any,
    seed: int | None = None,
    folder: Path = RESULTS,
    revision: str | None = None,
    date: str | None = None,
    machine: str | None = None,
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Write figures beside the config, seed, code revision, date, machine and libraries that they came from: those of here and
    today where they are None."""
    record = {
        "name": name,
        "figures": figures,
        "config": config,
        "seed": seed,
        "revision": revision or rundir.revision(),
        "date": date or time.strftime("%Y-%m-%d"),
        "machine": machine or rundir.machine(),
        "versions": versions or rundir.versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_atomic(path, configs.to_json(record))
    return path
