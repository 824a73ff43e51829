"""What a sweep tries: lists of flat overrides `{"optim.lr": 1e-3, ...}`, from small functions on plain dicts.

A sweep file has a function `sweep()` that returns such a list, or a `Study` that draws its trials one after the other:

    def sweep():
        return product(grid({"optim.lr": [1e-3, 3e-3], "model.width": [128, 256]}), seeds(2))
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tfm_jax.errors import UserError, nearest
from tfm_jax.units import cut

Overrides = dict[str, Any]
# Of a float in a folder's name, where they are enough.
DIGITS = 6


def grid(values: Mapping[str, Sequence[Any]]) -> list[Overrides]:
    """Every combination, the last key running fastest.

    Raises:
      UserError: no keys, or a key without values.
    """
    if not values:
        raise UserError("sweep: grid({}) has no keys: the space is empty.")
    for key, options in values.items():
        _some(key, options)
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def zipped(values: Mapping[str, Sequence[Any]]) -> list[Overrides]:
    """The first values of all keys, the second, and so on.

    Raises:
      UserError: keys with different numbers of values.
    """
    for key, options in values.items():
        _some(key, options)
    if len({len(options) for options in values.values()}) > 1:
        counts = ", ".join(f"{key} {len(options)}" for key, options in values.items())
        raise UserError(f"sweep: zipped() needs as many values of each key; there are: {counts}.")
    return [dict(zip(values, chosen, strict=True)) for chosen in zip(*values.values(), strict=True)]


def chain(*sweeps: Sequence[Overrides]) -> list[Overrides]:
    """One after the other."""
    return [dict(overrides) for sweep in sweeps for overrides in sweep]


def product(*sweeps: Sequence[Overrides]) -> list[Overrides]:
    """Every combination of what the sweeps try, the last one running fastest.

    Raises:
      UserError: a key that two of them set.
    """
    for i, j in itertools.combinations(range(len(sweeps)), 2):
        both = {key for one in sweeps[i] for key in one} & {key for one in sweeps[j] for key in one}
        if both:
            raise UserError(f"sweep: product() of spaces that overlap: {', '.join(sorted(both))} is in both.")
    return [{key: value for part in parts for key, value in part.items()} for parts in itertools.product(*sweeps)]


def seeds(count: int, first: int = 0) -> list[Overrides]:
    """The same with other initial weights, dropout and order of the data."""
    if count < 1:
        raise UserError(f"sweep: seeds({count}) is none.")
    return [{"train.seed": seed, "data.seed": seed} for seed in range(first, first + count)]


@dataclass(frozen=True)
class Uniform:
    """A number between two, whole if both are; by its logarithm if `log`."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or not math.isfinite(self.high - self.low) or (self.log and self.low <= 0):
            raise UserError(
                f"sweep: nothing lies between {self.low} and {self.high}{' by logarithm' if self.log else ''}."
            )

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def at(self, place: float) -> float:
        """The value at a place in [0, 1)."""
        # Whole numbers have a cell each, of equal width.
        low, high = (self.low, self.high + 1) if self.whole else (self.low, self.high)
        value = low * (high / low) ** place if self.log else low + (high - low) * place
        return math.floor(value) if self.whole else value


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    options: tuple[Any, ...]

    def __post_init__(self) -> None:
        _some("a choice", self.options)

    def at(self, place: float) -> Any:
        return self.options[int(place * len(self.options))]


Distribution = Uniform | Choice


def uniform(low: float, high: float) -> Uniform:
    return Uniform(low, high)


def log_uniform(low: float, high: float) -> Uniform:
    return Uniform(low, high, log=True)


def choice(*options: Any) -> Choice:
    return Choice(options)


def sample(space: Mapping[str, Distribution], count: int, seed: int = 0) -> list[Overrides]:
    """So many random draws, each key independently; what was drawn before is left out, so that of whole numbers and choices there
    may be fewer."""
    if count < 1:
        raise UserError(f"sweep: sample({count}) is none.")
    _checked(space)
    places = np.random.default_rng(seed).random((count, len(space)))
    drawn = [{key: one.at(float(p)) for p, (key, one) in zip(row, space.items(), strict=True)} for row in places]
    return list({repr(one): one for one in drawn}.values())


Direction = Literal["minimize", "maximize"]
Sampler = Literal["tpe", "cmaes", "random", "grid"]
Pruner = Literal["none", "asha", "hyperband", "median"]


@dataclass(frozen=True)
class Study:
    """Trials that Optuna draws, each from what the earlier ones have found (extra: sweep).

    Attributes:
      space: a distribution for each key; for `grid` choices.
      metric: of a run's `metrics.jsonl`, which decides.
      trials: how many.
      direction: `minimize` or `maximize`.
      sampler: how they are drawn: `tpe` (Bergstra et al. 2011), `cmaes` (Hansen 2016), `random`, `grid`.
      pruner: which of them are stopped early, by their metric so far: `asha` (Li et al. 2020), `hyperband` (Li et al. 2018),
        `median`, `none`.
      reduction: of `asha` and `hyperband`: one of so many goes on at each rung.
      first_rung: evaluations before a trial can be stopped.
      seed: of the draws, which depend on it and on the finished trials.
      fixed: overrides that all trials share.
    """

    space: Mapping[str, Distribution]
    metric: str
    trials: int
    direction: Direction = "minimize"
    sampler: Sampler = "tpe"
    pruner: Pruner = "none"
    reduction: int = 3
    first_rung: int = 1
    seed: int = 0
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _checked(self.space)
        for name, known in (("direction", Direction), ("sampler", Sampler), ("pruner", Pruner)):
            options = known.__args__  # type: ignore[attr-defined]
            if getattr(self, name) not in options:
                raise UserError(
                    f"sweep: {name}={getattr(self, name)!r} does not exist.{nearest(getattr(self, name), options)}"
                )
        for name, least in (("trials", 1), ("reduction", 2), ("first_rung", 1)):
            if getattr(self, name) < least:
                raise UserError(f"sweep: {name}={getattr(self, name)}: must be at least {least}.")
        if both := sorted(set(self.space) & set(self.fixed)):
            raise UserError(f"sweep: {', '.join(both)} is in the space and fixed.")
        if self.sampler == "grid" and any(not isinstance(one, Choice) for one in self.space.values()):
            raise UserError("sweep: sampler='grid' needs a choice for each key.")

    @property
    def limit(self) -> int:
        """Trials that there will be: no more than a grid has places."""
        if self.sampler != "grid":
            return self.trials
        return min(self.trials, math.prod(len(one.options) for one in self.space.values() if isinstance(one, Choice)))


@dataclass(frozen=True)
class Trial:
    """A run of a sweep: its folder's name, and what it changes."""

    name: str
    overrides: Overrides


def named(sweep: Sequence[Overrides]) -> list[Trial]:
    """A name for each from what differs between them: `lr=0.001,seed=0`, with the digits that tell numbers apart.

    Raises:
      UserError: no trials, or one that is there twice.
    """
    if not sweep:
        raise UserError("sweep: the space is empty.")
    keys = list(dict.fromkeys(key for one in sweep for key in one))
    varying = [key for key in keys if len({repr(one.get(key, _UNSET)) for one in sweep}) > 1]
    said = short_names(_told_apart(varying, sweep))
    texts = {key: _texts([one[key] for one in sweep if key in one]) for key in said}
    seen: dict[str, Overrides] = {}
    for one in sweep:
        parts = [f"{end}={texts[key][repr(one[key])]}" for key, end in said.items() if key in one]
        name = folder_name(",".join(parts) or "only")
        if name in seen:
            raise UserError(f"sweep: the spaces overlap: {name} is there twice.")
        seen[name] = dict(one)
    return [Trial(name, one) for name, one in seen.items()]


_UNSET = object()


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted key, where no other key ends so."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def _told_apart(keys: Sequence[str], sweep: Sequence[Overrides]) -> list[str]:
    """Of keys that end alike and always have the same value, the first."""
    by_end: dict[str, list[str]] = {}
    for key in keys:
        by_end.setdefault(key.rpartition(".")[2], []).append(key)
    out: list[str] = []
    for those in by_end.values():
        alike = all(len({repr(one.get(key, _UNSET)) for key in those}) == 1 for one in sweep)
        out += those[:1] if alike else those
    return out


def folder_name(name: str) -> str:
    """A trial's name, as long as a folder's may be."""
    return cut(name, 255)


def _texts(values: Sequence[Any]) -> dict[str, str]:
    """Values as parts of folders' names by their `repr`: floats with six digits, or as many as no other value shares."""
    out, left = dict[str, str](), {repr(value): value for value in values}
    for digits in range(DIGITS, 18):
        texts = {key: text_of(value, digits) for key, value in left.items()}
        shared = Counter([*out.values(), *texts.values()])
        out |= {key: text for key, text in texts.items() if shared[text] == 1}
        left = {key: value for key, value in left.items() if key not in out}
    return out | {key: text_of(value) for key, value in left.items()}


def text_of(value: Any, digits: int = DIGITS) -> str:
    """A value as a part of a folder's name."""
    text = f"{value:.{digits}g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isalnum() or c in "+-._" else "_" for c in text)


def spelled(values: Mapping[str, Any]) -> str:
    """All of some values, as a folder's name or a part of it: `lr=0.001,layers=2`."""
    return ",".join(f"{key.rpartition('.')[2]}={text_of(value)}" for key, value in values.items())


def _some(key: str, options: Sequence[Any]) -> None:
    if isinstance(options, str) or not options:
        raise UserError(f"sweep: {key} has no values to try: {options!r}. Give a list.")


def _checked(space: Mapping[str, Distribution]) -> None:
    if not space:
        raise UserError("sweep: the space is empty.")
    for key, one in space.items():
        if not isinstance(one, Uniform | Choice):
            raise UserError(f"sweep: {key}={one!r} is no distribution; there are uniform, log_uniform and choice.")
