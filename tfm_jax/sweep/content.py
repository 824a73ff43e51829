"""What a report shows, and how its values are drawn; each way of drawing it is a file of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfm_jax.metrics import Goal
from tfm_jax.sweep.importance import is_log, is_numeric
from tfm_jax.sweep.results import Run

# Points of a curve; more cannot be seen.
POINTS = 400
# Rows of the table that are seen at once.
ROWS = 24
# The color of a pruned run.
GREY = "#b0b0b0"
PERFORMANCE = ("optim/lr", "train/grad_norm", "_per_sec", "perf/data_wait_frac")
HIDDEN = ("perf/steps_per_sec", "per_sec_per_device")


@dataclass(frozen=True)
class Map:
    """Attention weights (T, S) of one head, and the tokens that look and that are looked at."""

    title: str
    weights: np.ndarray
    looking: Sequence[str]
    seen: Sequence[str]


@dataclass(frozen=True)
class Report:
    """What a page shows.

    Attributes:
      keys: the settings in which the runs differ.
      metric, goal: by which they are compared.
      importance: of each key, see `importance.importances`.
      samples: prompt and answer pairs of the run `chosen`.
      maps: of its attention.
    """

    title: str
    runs: Sequence[Run]
    keys: Sequence[str]
    metric: str
    goal: Goal
    importance: Mapping[str, float]
    chosen: str = ""
    samples: Sequence[tuple[str, str]] = ()
    maps: Sequence[Map] = ()


def curves(runs: Sequence[Run]) -> list[str]:
    """The metrics that are drawn over steps: losses and scores first, then how training went."""
    names = {name for run in runs for line in run.lines for name in line}
    scores = sorted(n for n in names if n.startswith("eval/") and not n.endswith(("/tokens", "/examples")))
    went = [n for end in PERFORMANCE for n in sorted(names) if n.endswith(end) and not n.endswith(HIDDEN)]
    return [n for n in ["train/loss", *scores, *went] if any(len(run.series(n)[0]) > 1 for run in runs)]


def thinned(values: Sequence[Any]) -> list[Any]:
    """At most `POINTS` of them, evenly spaced, the first and the last among them."""
    if len(values) <= POINTS:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, POINTS).round().astype(int)]


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def finite(value: float | None) -> float:
    return math.nan if value is None else float(value)


def scale(values: Sequence[Any]) -> str:
    """`log`, `linear`, or `category` of values that are not all numbers."""
    return "category" if not is_numeric(values) else "log" if is_log(values) else "linear"
