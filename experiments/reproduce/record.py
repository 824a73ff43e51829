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


def _each(results: Iterable[Mapping[str, Any]], key: str) -> str:
    """What results say of themselves, each text once: a finished run may be older than the code, the day and the machine."""
    return ", ".join(sorted({str(result.get(key, "not recorded")) for result in results}))


def origin(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Code, day, machine and libraries of runs, from their `result.json`, for `write_result`."""
    known = [*results]
    versions = [result.get("versions", {}) for result in known]
    said: dict[str, Any] = {key: _each(known, key) for key in ("revision", "date", "machine")}
    return {**said, "versions": {name: _each(versions, name) for name in sorted({n for one in versions for n in one})}}


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
        "revision": rundir.revision() if revision is None else revision,
        "date": time.strftime("%Y-%m-%d") if date is None else date,
        "machine": rundir.machine() if machine is None else machine,
        "versions": rundir.versions() if versions is None else versions,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_atomic(path, configs.to_json(record))
    return path
