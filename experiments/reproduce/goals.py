"""What a recipe's figures should be: a number, or another recipe's figure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from tfm_jax.errors import UserError


class Goal(TypedDict, total=False):
    """A bound of one metric: `least` or `most`, or what `beside` has, changed by `times`, `plus` and `errors`.

    Attributes:
      metric: which; the recipe's first if it is not said.
      least, most: the bound.
      beside: name of the result that has the bound; the figure is to be higher, or lower with `lower`.
      seed: of the other's, the one that has the bound; the mean of all if it is not said.
      lower: whether lower is better.
      times, plus: the bound is so many times the other's figure, and so much more.
      errors: standard errors of the two means' difference that the figure is to be better by, from the seeds' deviations.
    """

    metric: str
    least: float
    most: float
    beside: str
    seed: int
    lower: bool
    times: float
    plus: float
    errors: float


def check(goal: Goal, figures: Mapping[str, Any], folder: Path) -> tuple[str, bool | None]:
    """The goal in words, and whether it is met; None where the other has no result in `folder` yet."""
    metric = goal.get("metric", figures["metric"])
    name = "" if metric == figures["metric"] else f"{metric.removeprefix('eval/')} "
    value = _mean(figures, metric)
    if "least" in goal:
        return f"{name}at least {number(goal['least'])}", value >= goal["least"]
    if "most" in goal:
        return f"{name}at most {number(goal['most'])}", value <= goal["most"]
    lower = goal.get("lower", False)
    bound, how = _beside(goal, figures, folder, -1 if lower else 1)
    words = f"{name}at {'most' if lower else 'least'}"
    if bound is None:
        return f"{words} {how}, which has no figure yet", None
    return f"{words} {number(bound)} ({how})", value <= bound if lower else value >= bound


def _beside(goal: Goal, figures: Mapping[str, Any], folder: Path, sign: int) -> tuple[float | None, str]:
    """The bound, and what it is."""
    other = goal["beside"]
    times, plus, errors = goal.get("times", 1.0), goal.get("plus", 0.0), goal.get("errors", 0.0)
    how = (f"{number(times)} times " if times != 1 else "") + f"`{other}`"
    seed = goal.get("seed")
    how += "" if seed is None else f", seed {seed}"
    how += f" {'less' if plus < 0 else 'and'} {number(abs(plus))}" if plus else ""
    how += f" and {number(errors)} standard errors" if errors else ""
    path = folder / f"{other}.json"
    if not path.is_file():
        return None, how
    theirs = json.loads(path.read_text())["figures"]
    own = _mean(theirs, theirs["metric"]) if seed is None else theirs["by_seed"].get(str(seed))
    if own is None:
        return None, how
    bound = times * own + plus
    if errors:
        if min(len(x["by_seed"]) for x in (figures, theirs)) < 2:
            return None, f"{how}, with several seeds each"
        error = math.sqrt(sum(x["deviation"] ** 2 / len(x["by_seed"]) for x in (figures, theirs)))
        bound += sign * errors * error
    return bound, how


def _mean(figures: Mapping[str, Any], metric: str) -> float:
    known = {figures["metric"]: figures["mean"], **figures["also"]}
    if metric not in known:
        raise UserError(f"A goal is for {metric}, and the recipe's metrics are {', '.join(known)}.")
    return float(known[metric])


def number(value: float) -> str:
    """Four digits that count."""
    return f"{value:.4g}"
