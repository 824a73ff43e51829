"""Runs side by side: which there are below some folders, in what they differ, and what they have come to."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from tfm_jax import config as configs
from tfm_jax.errors import UserError, nearest
from tfm_jax.metrics import Goal
from tfm_jax.sweep import trials
from tfm_jax.train.log import read_evaluations, read_metrics

# A folder with one of these is a run; a launcher writes the last three, of one that waits and of one that could not say it itself.
MARKS = ("config.json", "status.json", "trial.json", "pruned", "failed")
# Keys that say nothing of what a run has found.
IDLE = ("log", *configs.LOCAL_KEYS)


@dataclass(frozen=True)
class Run:
    """What a run directory says of itself.

    Attributes:
      name: its path below the folder that was asked for.
      config: its settings by dotted key; none where they cannot be read. Of a trial that has not begun, its overrides, and what
        all that have begun share.
      state: as in `status.json`; `pruned` where a study has stopped it, `damaged` where its files cannot be read.
      reason: of that state.
      lines: of `metrics.jsonl`.
      result: `result.json`, of a run that has finished.
      evaluations: what `evaluate` has found since.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    state: str
    reason: str = ""
    lines: Sequence[Mapping[str, Any]] = ()
    result: Mapping[str, Any] = field(default_factory=dict)
    evaluations: Sequence[Mapping[str, Any]] = ()

    @property
    def step(self) -> int:
        return max((int(line["step"]) for line in self.lines), default=int(self.result.get("step", 0)))

    @property
    def pruned(self) -> bool:
        """Whether a study has stopped it, so that its numbers are not those of a whole run."""
        return self.state == trials.PRUNED

    @property
    def finished(self) -> bool:
        return self.state == trials.FINISHED

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values that have been logged of a metric."""
        found = [(int(line["step"]), float(line[metric])) for line in self.lines if _is_number(line.get(metric))]
        return [step for step, _ in found], [value for _, value in found]

    def value(self, metric: str) -> float | None:
        """The last that has been logged of a metric, or None."""
        for line in reversed(self.lines):
            if _is_number(line.get(metric)):
                return float(line[metric])
        found = self.result.get(metric)
        return float(found) if _is_number(found) else None


def find(folders: Sequence[Path]) -> dict[str, Path]:
    """The run directories at or below some folders, by the part of their path in which they differ.

    Raises:
      UserError: a folder that does not exist, or has none.
    """
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            beside = [p.as_posix() for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
            raise UserError(f"There is no folder {folder}.{nearest(folder.as_posix(), beside)}")
        runs = list(_below(folder))
        if not runs and (folder / "sweep.json").is_file():
            raise UserError(f"{folder} is a sweep that has no trial yet.")
        if not runs:
            raise UserError(
                f"{folder} is no run, and there is none below it: no folder there has a config.json."
                f"{nearest(folder.as_posix(), _with_runs())}"
            )
        found += [run for run in runs if run not in found]
    root = found[0].parent if len(found) == 1 else Path(os.path.commonpath([run.absolute() for run in found]))
    return {run.absolute().relative_to(root.absolute()).as_posix(): run for run in found}


def _with_runs() -> set[str]:
    """Folders of runs that are not far below where a command is typed."""
    return {path.parent.parent.as_posix() for depth in ("*/*", "*/*/*") for path in Path().glob(f"{depth}/status.json")}


def _below(folder: Path) -> Iterator[Path]:
    for path, names, files in os.walk(folder):
        if any(mark in files for mark in MARKS):
            yield Path(path)
            names.clear()
        names[:] = sorted(name for name in names if not name.startswith("."))


def read(name: str, path: Path) -> Run:
    """A run from its files. What cannot be read is said in its state, so that one bad folder does not hide the others."""
    try:
        config = configs.flat(_object(path / "config.json")) or dict(_object(path / "trial.json").get("overrides", {}))
        result, lines, evaluations = _object(path / "result.json"), read_metrics(path), read_evaluations(path)
    except (OSError, ValueError, TypeError) as error:
        return Run(name, path, {}, "damaged", f"{type(error).__name__}: {error}")
    return Run(name, path, config, *trials.said(path), lines, result, evaluations)


def completed(runs: Sequence[Run]) -> list[Run]:
    """The runs, trials that have not begun with the settings that all others share."""
    waiting = {run.path for run in runs if run.config and not (run.path / "config.json").is_file()}
    begun = [run.config for run in runs if run.config and run.path not in waiting]
    shared = {k: v for k, v in (begun[0] if begun else {}).items() if all(repr(c.get(k)) == repr(v) for c in begun)}
    return [replace(run, config={**shared, **run.config}) if run.path in waiting else run for run in runs]


def read_all(folders: Sequence[Path]) -> list[Run]:
    return completed([read(name, path) for name, path in find(folders).items()])


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return found


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def differing(runs: Sequence[Run]) -> list[str]:
    """The dotted keys in which runs differ; of keys that always have the same value as each other, the first."""
    known = [run.config for run in runs if run.config]
    keys = sorted({key for config in known for key in config if not key.startswith(IDLE)})
    out: dict[tuple[str, ...], str] = {}
    for key in keys:
        column = tuple(repr(config.get(key)) for config in known)
        if len(set(column)) > 1:
            out.setdefault(column, key)
    return list(out.values())


def metrics(runs: Sequence[Run]) -> list[str]:
    """Names of all that has been logged or found, sorted."""
    logged = {name for run in runs for line in run.lines for name, value in line.items() if _is_number(value)}
    found = {name for run in runs for name, value in run.result.items() if _is_number(value)}
    return sorted((logged | found) - {"step"})


class Judged(NamedTuple):
    """By what runs are compared, as far as somebody has said it."""

    metric: str | None
    goal: Goal | None


def judged(runs: Sequence[Run], metric: str | None, goal: Goal | None) -> Judged:
    """What was asked for; where that leaves something open, what the study says whose trials all runs are.

    Raises:
      UserError: `sweep.json` is damaged.
    """
    above = {run.path.absolute().parent for run in runs}
    try:
        sweep = _object(above.pop() / "sweep.json") if len(above) == 1 else {}
    except ValueError as error:
        raise UserError(f"The sweep's sweep.json is damaged: {error}.") from None
    own = sweep.get("metric")
    if own is not None and metric in (None, own):
        direction: Goal = "higher" if sweep["direction"] == "maximize" else "lower"
        return Judged(own, goal or direction)
    return Judged(metric, goal)


def deciding(runs: Sequence[Run], metric: str | None) -> str:
    """The metric by which runs are compared: the one that is named, else an evaluator's loss, else that of training; of runs with
    several tokenizers, whose losses are of other tokens, bits per byte before these.

    Raises:
      UserError: no run has logged it.
    """
    known = metrics(runs)
    if metric is not None:
        if metric not in known:
            raise UserError(f"No run has logged {metric}; --metric names another.{nearest(metric, known)}")
        return metric
    several = len({repr(run.config.get("data.tokenizer")) for run in runs if run.config}) > 1
    for end in ("/bits_per_byte", "/loss")[not several :]:
        for name in known:
            if name.startswith("eval/") and name.endswith(end):
                return name
    if "train/loss" in known:
        return "train/loss"
    raise UserError(f"No run has logged a loss. Name what to compare with --metric.{nearest('', known)}")


def ranked(runs: Sequence[Run], metric: str, goal: Goal) -> list[Run]:
    """The best first; behind all that have finished those that go on or have failed, and those that were pruned: their number is
    that of an earlier step. Last, those that have no number."""

    def place(run: Run) -> tuple[bool, bool, bool, float]:
        value = run.value(metric)
        if value is None or not math.isfinite(value):
            return True, run.pruned, not run.finished, 0.0
        return False, run.pruned, not run.finished, value if goal == "lower" else -value

    return sorted(runs, key=place)
