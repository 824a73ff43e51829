"""Scaling laws: loss against parameters and tokens, and the best size for a budget.

L(N, D) = E + A / N^alpha + B / D^beta, approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556), section 3.3 and appendix D.3.
N parameters, D training tokens, C FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares
from scipy.special import logsumexp

from tfm_jax.errors import UserError
from tfm_jax.units import short

# Beyond this residual of log L the Huber loss is linear (appendix D.3).
HUBER = 1e-3
# FLOPs of a parameter and token, forward and backward (Kaplan et al. 2020, section 2.1; Hoffmann et al., appendix F).
FLOPS = 6.0
# As many as there are constants, and one more, so that the fit can fail.
LEAST_RUNS = 6
# Between the smallest and the largest N, and D.
LEAST_SPREAD = 1.5
# The settings that change each.
UNITS = {"parameters": "model.width or model.layers", "tokens": "train.steps"}
# From the best of the grid's 4,500 starts, which end in few minima.
_STARTS = 10


class Run(NamedTuple):
    """One training run.

    Attributes:
      name: for the picture and for errors.
      parameters: N.
      tokens: D.
      loss: at the end of the run, nats.
    """

    name: str
    parameters: float
    tokens: float
    loss: float


class Law(NamedTuple):
    """The constants of L(N, D)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: Any, tokens: Any) -> Any:
        return self.E + self.A / np.power(parameters, self.alpha) + self.B / np.power(tokens, self.beta)

    def optimum(self, budget: float, flops: float = FLOPS) -> Optimum | None:
        """The size and tokens of least loss for `flops` N D = budget (equation 4); None where one of them would be less than 1, as
        when the loss does not fall with it."""
        if not min(self.A, self.B, self.alpha, self.beta) > 0:
            return None
        spent = math.log(budget / flops)
        ratio = math.log(self.alpha) + math.log(self.A) - math.log(self.beta) - math.log(self.B)
        size = (ratio + self.beta * spent) / (self.alpha + self.beta)
        if not 0 <= size <= spent:
            return None
        parameters = math.exp(size)
        tokens = budget / flops / parameters
        return Optimum(parameters, tokens, float(self.loss(parameters, tokens)))


class Optimum(NamedTuple):
    parameters: float
    tokens: float
    loss: float


class Fit(NamedTuple):
    """Attributes:
    law: of all runs.
    resampled: laws of as many runs drawn with replacement, the fit's uncertainty (Efron 1979).
    residual: root mean square of log L - log of the law's.
    """

    law: Law
    resampled: Sequence[Law]
    residual: float

    def interval(self, value: Any, share: float = 0.9) -> tuple[float, float]:
        """Between which the middle `share` of `value(law)` lies over the resampled laws."""
        return _middle([value(law) for law in self.resampled], share)


def _middle(values: Sequence[float], share: float = 0.9) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


class Best(NamedTuple):
    """Attributes:
    optimum: of the law of all runs.
    intervals: of each of its fields, over the resampled laws that have an optimum.
    without: how many of these have none.
    """

    optimum: Optimum
    intervals: Mapping[str, tuple[float, float]]
    without: int


def best(found: Fit, runs: Sequence[Run], budget: float) -> Best:
    """The best size for a budget.

    Raises:
      UserError: there is none, by the law or by most of the resampled ones: the loss does not fall with parameters, or tokens; or
        the budget is not a thousandth of the smallest run's.
    """
    least_spent = FLOPS * min(run.parameters * run.tokens for run in runs)
    if budget < least_spent / 1000:
        raise UserError(
            f"--budget={budget:.3g}: the smallest of these runs took {least_spent:.3g} FLOPs, and they say nothing of so few."
        )
    optimum, law = found.law.optimum(budget), found.law
    others = [other for one in found.resampled if (other := one.optimum(budget)) is not None]
    without = len(found.resampled) - len(others)
    if optimum is None or without > len(others):
        falls = {}
        for name, size, power in (("parameters", law.A, law.alpha), ("tokens", law.B, law.beta)):
            values = [getattr(run, name) for run in runs]
            falls[name] = size * (min(values) ** -power - max(values) ** -power)
        least = min(falls, key=falls.__getitem__)
        raise UserError(
            f"No size is the best one for a budget: the loss does not fall with {least} in these runs. From the fewest to the"
            f" most it falls by {falls[least]:.2g}, and {without} of {len(found.resampled)} resampled fits have no best size."
            f" What is needed are runs further apart by {UNITS[least]}, each with the best learning rate of its size and its"
            " whole decay, or more seeds."
        )
    intervals = {name: _middle([getattr(other, name) for other in others]) for name in Optimum._fields}
    return Best(optimum, intervals, without)


def fit(runs: Sequence[Run], *, resamples: int = 100, seed: int = 0) -> Fit:
    """The law that the runs follow.

    Raises:
      UserError: too few runs, or all of nearly the same size or length: no law follows from them.
    """
    check(runs)
    data = _logs(runs)
    starts = _grid()
    starts = starts[np.argsort([_huber(_residuals(start, *data)) for start in starts])[:_STARTS]]
    best = min((_descend(start, data) for start in starts), key=lambda found: found.cost)
    draw, resampled = np.random.default_rng(seed), list[Law]()
    while len(resampled) < resamples:
        chosen = draw.integers(0, len(runs), len(runs))
        some = [runs[i] for i in chosen]
        # A sample in which nothing varies says nothing of what it would do.
        if len({run.parameters for run in some}) > 1 and len({run.tokens for run in some}) > 1:
            # Near the law of all, with other exponents in case the sample has another minimum.
            near = [best.x, best.x + np.array([0, 1, 0, 0.1, 0]), best.x + np.array([0, 0, 1, 0, 0.1])]
            resampled.append(_law(min((_descend(x, _logs(some)) for x in near), key=lambda found: found.cost).x))
    law = _law(best.x)
    predicted = law.loss(*(np.array([getattr(run, name) for run in runs]) for name in ("parameters", "tokens")))
    residual = np.log([run.loss for run in runs]) - np.log(predicted)
    return Fit(law, resampled, float(np.sqrt(np.mean(residual**2))))


def check(runs: Sequence[Run]) -> None:
    """Refuse runs from which no law follows."""
    for run in runs:
        for name in ("parameters", "tokens", "loss"):
            if not (math.isfinite(getattr(run, name)) and getattr(run, name) > 0):
                raise UserError(f"{run.name}: {name}={getattr(run, name)} must be a number above 0.")
    points = {(run.parameters, run.tokens) for run in runs}
    if len(points) < LEAST_RUNS:
        raise UserError(
            f"A law of five constants needs at least {LEAST_RUNS} runs of different size or length; here are {len(points)}."
        )
    for name, unit in UNITS.items():
        values = [getattr(run, name) for run in runs]
        if max(values) < LEAST_SPREAD * min(values):
            raise UserError(
                f"All runs have nearly the same {name}, {min(values):.3g} to {max(values):.3g}: nothing says how the loss depends"
                f" on it. Train some with another {unit}."
            )


def _logs(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, d, y = np.log([[run.parameters, run.tokens, run.loss] for run in runs]).T
    return n, d, y


def _grid() -> np.ndarray:
    """The starts of appendix D.3, (starts, 5): log E, log A, log B, alpha, beta."""
    axes = [
        np.arange(0, 26, 5),
        np.arange(0, 26, 5),
        np.arange(-1, 1.1, 0.5),
        np.arange(0, 2.1, 0.5),
        np.arange(0, 2.1, 0.5),
    ]
    log_a, log_b, log_e, alpha, beta = np.meshgrid(*axes, indexing="ij")
    return np.stack([x.ravel() for x in (log_e, log_a, log_b, alpha, beta)], axis=1).astype(float)


def _residuals(x: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray) -> np.ndarray:
    """log L(N, D) - log L of each run; x is log E, log A, log B, alpha, beta."""
    return np.asarray(logsumexp(_terms(x, n, d), axis=0) - y)


def _jacobian(x: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray) -> np.ndarray:
    terms = _terms(x, n, d)
    e, a, b = np.exp(terms - logsumexp(terms, axis=0))
    return np.stack([e, a, b, -a * n, -b * d], axis=1)


def _terms(x: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    return np.stack([np.full_like(n, x[0]), x[1] - x[3] * n, x[2] - x[4] * d])


def _huber(r: np.ndarray) -> float:
    """The sum, half the square up to HUBER and linear from there."""
    size = np.abs(r)
    return float(np.sum(np.where(size <= HUBER, 0.5 * r**2, HUBER * (size - 0.5 * HUBER))))


def _descend(start: np.ndarray, data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Any:
    """The minimum of equation 3 near a start.

    By steps that know of the residuals, where the paper has L-BFGS, which can end too early (Besiroglu et al. 2024, arXiv
    2404.10102, section 3).
    """
    tight = dict(ftol=1e-12, xtol=1e-12, gtol=1e-12, max_nfev=300)
    # Where a resampled fit leaves a constant undetermined, scipy's search for the length of a step divides by a singular value of 0,
    # and goes on within its bounds.
    with np.errstate(divide="ignore"):
        return least_squares(
            _residuals, start, _jacobian, args=data, loss="huber", f_scale=HUBER, x_scale="jac", **tight
        )


def _law(x: np.ndarray) -> Law:
    return Law(*(float(v) for v in (*np.exp(x[:3]), x[3], x[4])))


def draw(path: Path, runs: Sequence[Run], found: Fit, budget: float, best: Optimum, flops: float = FLOPS) -> None:
    """The runs beside the law, and its best size for each budget with the resampled laws' own around it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    sizes = sorted({run.parameters for run in runs})
    tokens = np.array([run.tokens for run in runs])
    line = np.geomspace(tokens.min() / 1.5, tokens.max() * 1.5, 100)
    for i, size in enumerate(sizes):
        color = f"C{i % 10}"
        left.plot(
            line,
            found.law.loss(size, line),
            color=color,
            linewidth=1,
            label=f"{short(size)} parameters" if len(sizes) <= 10 else None,
        )
        own = [run for run in runs if run.parameters == size]
        left.plot([run.tokens for run in own], [run.loss for run in own], "o", color=color, markersize=4)
    left.set(xlabel="training tokens", ylabel="loss (nats)", xscale="log", title=_title(found))
    if len(sizes) <= 10:
        left.legend(fontsize=7)
    spent = [flops * run.parameters * run.tokens for run in runs]
    budgets = np.geomspace(min(spent), max(*spent, budget) * 2, 60)
    for law in found.resampled:
        right.plot(budgets, [_size(law, c, flops) for c in budgets], color="C0", alpha=0.08, linewidth=1)
    right.plot(budgets, [_size(found.law, c, flops) for c in budgets], color="C0", label="best size")
    right.plot(spent, [run.parameters for run in runs], "o", color="grey", markersize=3, label="runs")
    right.plot(
        [budget],
        [best.parameters],
        "*",
        color="C3",
        markersize=13,
        label=f"{short(best.parameters)}, {short(best.tokens)} tokens",
    )
    right.set(xlabel="FLOPs", ylabel="parameters", xscale="log", yscale="log", title="compute-optimal size")
    # A law that says nothing of N must not flatten what the others say.
    shown = [*(run.parameters for run in runs), best.parameters]
    right.set_ylim(min(shown) / 10, max(shown) * 10)
    right.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _size(law: Law, budget: float, flops: float) -> float:
    best = law.optimum(budget, flops)
    return math.nan if best is None else best.parameters


def _title(found: Fit) -> str:
    law = found.law
    return f"{law.E:.3g} + {law.A:.3g} / N^{law.alpha:.2f} + {law.B:.3g} / D^{law.beta:.2f}"


def constants(found: Fit) -> Mapping[str, tuple[float, float, float]]:
    """Each constant with its interval."""
    return {
        name: (getattr(found.law, name), *found.interval(lambda law, name=name: getattr(law, name)))
        for name in Law._fields
    }
