"""What trials cost before any has run, by their step's FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tfm_jax import config as configs
from tfm_jax.parallel.plan import drawn
from tfm_jax.parallel.search import step_flops
from tfm_jax.sweep.space import Choice, Study, Trial, grid, named
from tfm_jax.train.build import build


class Cost(NamedTuple):
    """Steps of a trial, and the FLOPs of all of them."""

    steps: int
    flops: float


class Costs:
    """`costs(trial)`; trials that differ in numbers only are traced once.

    Args:
      resolved: the config of a trial.
    """

    def __init__(self, resolved: Callable[[Trial], configs.Config]) -> None:
        self._resolved, self._known = resolved, dict[str, float]()

    def __call__(self, trial: Trial) -> Cost:
        config = self._resolved(trial)
        key, steps = configs.to_json(_without_numbers(config)), config["train"]["steps"]
        if key not in self._known:
            self._known[key] = step_flops(build(drawn(config)))
        return Cost(steps, steps * self._known[key])


def telling(study: Study, costs: Callable[[Trial], Cost]) -> list[Trial]:
    """A study's cheapest and dearest trials, and those between: every combination of the options, or the ends of the range, of
    those keys that change what a trial costs."""
    options = {k: one.options if isinstance(one, Choice) else (one.low, one.high) for k, one in study.space.items()}
    rest = {**study.fixed, **{key: values[0] for key, values in options.items()}}

    def matters(key: str) -> bool:
        return len({costs(Trial("", {**rest, key: value})) for value in options[key]}) > 1

    chosen = {key: values for key, values in options.items() if matters(key)}
    if not chosen:
        return [Trial("any values", rest)]
    return [Trial(one.name, {**rest, **one.overrides}) for one in named(grid(chosen))]


def _without_numbers(config: configs.Config) -> configs.Config:
    """What a step's products depend on: not seeds, rates and lengths of schedules, nor what runs beside it."""
    out = {name: dict(config[name]) for name in ("model", "task", "data", "train")}
    for section, keys in (("train", ("seed", "steps", "eval_every")), ("data", ("seed",))):
        for key in keys:
            out[section].pop(key, None)
    return {**out, "optim": {"name": config["optim"]["name"]}}
