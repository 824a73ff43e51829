"""Scaling laws from runs made by known ones."""

import numpy as np
import pytest

from tfm_jax.errors import UserError
from tfm_jax.sweep import scaling
from tfm_jax.sweep.scaling import Law, Run

# Hoffmann et al. 2022, equation 10.
CHINCHILLA = Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
SIZES, TOKENS = (7e7, 2.5e8, 1e9, 4e9, 1.6e10), (2e9, 1e10, 6e10, 4e11)


def made(law, noise=0.0, sizes=SIZES, tokens=TOKENS):
    """A run of each size and length, its loss the law's times exp(noise * normal)."""
    away = np.exp(noise * np.random.default_rng(1).standard_normal((len(sizes), len(tokens))))
    return [
        Run(f"{n:.0e}-{d:.0e}", n, d, float(law.loss(n, d) * away[i, j]))
        for i, n in enumerate(sizes)
        for j, d in enumerate(tokens)
    ]


def test_the_published_constants_come_back():
    """Exactly from exact runs; from noisy ones about as far away as the fit says."""
    found = scaling.fit(made(CHINCHILLA), resamples=10)
    np.testing.assert_allclose(found.law, CHINCHILLA, rtol=1e-6)
    assert found.residual < 1e-9
    assert np.ptp(found.interval(lambda law: law.alpha)) < 1e-6
    noisy = scaling.fit(made(CHINCHILLA, noise=3e-3), resamples=20)
    assert 1e-3 < noisy.residual < 6e-3
    for name, (value, low, high) in scaling.constants(noisy).items():
        assert low <= high and abs(value - getattr(CHINCHILLA, name)) < 1.5 * (high - low), name
        assert 0.005 < (high - low) / value < 0.5, name


def test_an_outlier_counts_little():
    """A run that went wrong moves squared errors far, Huber's little."""
    runs = made(CHINCHILLA)
    runs[7] = runs[7]._replace(loss=runs[7].loss * 1.3)
    law = scaling.fit(runs, resamples=0).law
    np.testing.assert_allclose((law.alpha, law.beta, law.E), (0.34, 0.28, 1.69), rtol=0.05)


def test_the_optimum_is_the_least_loss_of_its_budget():
    """The closed form beside every size tried out."""
    budget = 5.76e23
    best = CHINCHILLA.optimum(budget)
    sizes = np.geomspace(1e9, 1e12, 20001)
    losses = CHINCHILLA.loss(sizes, budget / 6 / sizes)
    np.testing.assert_allclose(best.parameters, sizes[np.argmin(losses)], rtol=1e-3)
    np.testing.assert_allclose(best.loss, losses.min(), rtol=1e-9)
    np.testing.assert_allclose(6 * best.parameters * best.tokens, budget, rtol=1e-9)


@pytest.mark.parametrize(
    "runs, message",
    [
        (made(CHINCHILLA)[:5], "needs at least 6 runs of different size or length; here are 5"),
        (made(CHINCHILLA, sizes=(1e9,), tokens=np.geomspace(1e9, 1e11, 8)), "All runs have nearly the same parameters"),
        (made(CHINCHILLA, sizes=np.geomspace(1e8, 1e10, 8), tokens=(1e10,)), "All runs have nearly the same tokens"),
        ([*made(CHINCHILLA), Run("runs/bad", 1e9, 1e9, float("nan"))], "runs/bad: loss=nan must be a number above 0"),
    ],
)
def test_runs_that_say_too_little_are_refused(runs, message):
    with pytest.raises(UserError, match=message):
        scaling.fit(runs)


@pytest.mark.parametrize(
    "law, named",
    [
        (CHINCHILLA._replace(A=0.0), "parameters"),
        (CHINCHILLA._replace(A=1e-200), "parameters"),
        (CHINCHILLA._replace(A=0.02, alpha=-0.05), "parameters"),
        (CHINCHILLA._replace(B=0.0), "tokens"),
        (CHINCHILLA._replace(B=0.02, beta=-0.05), "tokens"),
    ],
)
def test_a_loss_that_does_not_fall_has_no_best_size(law, named):
    with pytest.raises(UserError, match=f"the loss does not fall with {named} in these runs"):
        scaling.best(scaling.Fit(law, [law], 0.0), made(law), 1e22)


def test_a_fit_of_runs_whose_loss_does_not_fall_has_no_best_size():
    runs = made(CHINCHILLA._replace(A=0.0), noise=1e-4, sizes=SIZES[:3], tokens=TOKENS[:3])
    with pytest.raises(UserError, match="the loss does not fall with parameters in these runs"):
        scaling.best(scaling.fit(runs, resamples=2), runs, 1e22)


def test_resampled_fits_without_a_best_size_are_counted():
    flat = CHINCHILLA._replace(A=0.0)
    found = scaling.Fit(CHINCHILLA, [CHINCHILLA, CHINCHILLA, flat], 0.0)
    best = scaling.best(found, made(CHINCHILLA), 1e22)
    assert best.without == 1 and best.intervals["loss"] == pytest.approx((best.optimum.loss,) * 2)
    with pytest.raises(UserError, match="2 of 3 resampled fits have no best size"):
        scaling.best(found._replace(resampled=[CHINCHILLA, flat, flat]), made(CHINCHILLA), 1e22)
